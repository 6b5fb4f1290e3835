"""Data selection: a selector's choice, applied before rows are made; and the random baseline."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from intaglio import atomic_io
from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.methods.base import Method, Progress, no_progress
from intaglio.trainer.dataset import all_examples
from intaglio.trainer.protocols import Example, Selection, Selector
from intaglio.trainer.resume import describe, model_digest, plain
from intaglio.trainer.rng import KeyedRNG, generator

CHOICE = "choice.json"
"""In the directory of a run: which examples were chosen."""

Original = Checkpoint | Callable[[], Checkpoint] | None
"""The checkpoint before it was compressed, or a function that loads it only for the comparison."""


@dataclass(frozen=True)
class SelectedExamples:
    """The examples that a run trains on; `digest` identifies the inputs of the choice, "" without a directory."""

    digest: str
    indices: list[int]
    metadata: dict[str, Any]
    examples: list[Example]

    def record(self) -> dict[str, Any]:
        """Return the record's part: `bars` stand apart, and seconds are left out."""
        facts = {name: value for name, value in self.metadata.items() if name not in ("bars", "seconds")}
        bars = {"bars": self.metadata["bars"]} if self.metadata.get("bars") else {}
        return ({"selection": plain(facts)} if facts else {}) | bars

    def save(self, directory: Path) -> None:
        """Write the choice into the directory of a run, so that a resumed run need not choose again."""
        value = {"digest": self.digest, "indices": self.indices, "metadata": plain(self.metadata)}
        atomic_io.write_json(directory / CHOICE, value)


def choose(
    checkpoint: Checkpoint,
    data: Any,
    selector: Selector | None,
    original: Original,
    seed: int,
    directory: Path | None,
    model: str,
    progress: Progress,
) -> SelectedExamples | None:
    """Choose the examples of a run, or read the choice of a resumed run; None without a selector.

    `model` is the digest of the model, "" where the run has no directory.
    """
    if selector is None:
        return None
    if not isinstance(selector, Selector):
        raise IntaglioError(f"select is {type(selector).__name__}; it needs select and budget")
    examples = all_examples(checkpoint, data)
    if examples is None:
        raise IntaglioError("select needs data in memory; give a list of examples or texts")
    digest = _digest(selector, examples, model, original, seed) if model else ""
    saved = None if directory is None else _read(directory, digest)
    indices, metadata = saved or chosen(selector, examples, checkpoint, original, seed, progress)
    return SelectedExamples(digest, indices, metadata, [examples[index] for index in indices])


def chosen(
    selector: Selector,
    examples: list[Example],
    checkpoint: Checkpoint,
    original: Original,
    seed: int,
    progress: Progress = no_progress,
) -> tuple[list[int], dict[str, Any]]:
    """Return the indices that a selector chose, in order, and its metadata.

    Weights are turned into copies by systematic resampling: of n examples, one with share w of the weight comes
    `floor(n w)` or `ceil(n w)` times.
    """
    name = getattr(selector, "slug", type(selector).__name__)
    before = original
    if not isinstance(before, Checkpoint) and before is not None:
        before = before() if getattr(selector, "compares", True) else None
    selection = selector.select(examples, checkpoint, before, selector.budget, KeyedRNG(seed), progress=progress)
    metadata = dict(selection.metadata) if isinstance(selection, Selection) else {}
    picked: list[Any] = list(selection)
    if picked and all(isinstance(value, float) for value in picked):
        picked = _resampled(picked, len(examples), seed, name)
    if not picked:
        raise IntaglioError(f"{name} chose none of the {len(examples)} examples; give it a larger budget")
    wrong = [value for value in picked if not 0 <= int(value) < len(examples)]
    if wrong:
        raise IntaglioError(f"{name} chose the example {wrong[0]}; there are {len(examples)}")
    return sorted(int(index) for index in picked), metadata


def _resampled(weights: list[Any], count: int, seed: int, name: str) -> list[int]:
    share = torch.tensor(weights, dtype=torch.float64)
    if len(share) != count or bool((share < 0).any()) or not bool(torch.isfinite(share).all()) or not share.sum():
        raise IntaglioError(f"{name} gave {len(share)} weights for {count} examples; one at least 0 for each is needed")
    start = torch.rand((), generator=generator(seed, "select"), dtype=torch.float64)
    ends = (share / share.sum() * count).cumsum(0)
    copies = torch.diff(torch.floor(ends - start), prepend=torch.floor(-start)[None]).to(torch.int64)
    return torch.repeat_interleave(torch.arange(count), copies).tolist()


def _digest(selector: Selector, examples: list[Example], model: str, original: Original, seed: int) -> str:
    """Digest of the inputs of a choice; an original that is loaded on demand is left out."""
    before = model_digest(original.model) if isinstance(original, Checkpoint) else ""
    total = hashlib.sha256(repr([plain(describe(selector)), model, before, seed, len(examples)]).encode())
    for example in examples:
        for key in sorted(example):
            value = example[key]
            total.update(f"{key}:{value.tolist() if isinstance(value, torch.Tensor) else value!r};".encode())
    return total.hexdigest()


def _read(directory: Path, digest: str) -> tuple[list[int], dict[str, Any]] | None:
    """Return the saved choice with that digest; None if there is none or the file is damaged."""
    try:
        saved = json.loads((directory / CHOICE).read_text(encoding="utf-8"))
        return (saved["indices"], saved["metadata"]) if saved["digest"] == digest else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


class RandomExamples(Method, slug="random"):
    """Uniform random choice of examples, the baseline for selectors.

    Args:
        budget: share of the examples, above 0 and at most 1; at least one is chosen. Default 0.2.
    """

    kinds = ("selector",)
    summary = "selects examples at random"

    compares: ClassVar[bool] = False

    budget: Annotated[float, Field(gt=0, le=1)] = 0.2

    def select(
        self,
        dataset: Sequence[Example],
        model: Checkpoint,
        original: Checkpoint | None,
        budget: float,
        rng: KeyedRNG,
        *,
        progress: Progress = no_progress,
    ) -> Selection:
        """Return random indices; a larger budget chooses the same ones and more."""
        order = torch.randperm(len(dataset), generator=generator(rng.seed, "random examples")).tolist()
        kept = order[: max(1, int(budget * len(dataset) + 1e-9))] if dataset else []
        return Selection(kept, {"examples": len(dataset), "chosen": len(kept)})
