"""Which examples are trained on: a selector's choice, applied before rows are made; and the choice at random."""

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
"""The checkpoint before it was carved, or what loads it, so that it is in memory only while it is compared with."""


@dataclass(frozen=True)
class SelectedExamples:
    """The examples that a run trains on.

    Args:
        digest: of what decides the choice; "" where the run has no directory.
        indices: of the examples, in their order.
        told: by the selector.
        examples: they themselves.
    """

    digest: str
    indices: list[int]
    told: dict[str, Any]
    examples: list[Example]

    def noted(self) -> dict[str, Any]:
        """What the record has of it: what is drawn stands apart, and seconds are not part of it."""
        words = {name: value for name, value in self.told.items() if name not in ("bars", "seconds")}
        bars = {"bars": self.told["bars"]} if self.told.get("bars") else {}
        return ({"selection": plain(words)} if words else {}) | bars

    def put_aside(self, directory: Path) -> None:
        """Write it into the directory of a run, which need not choose again when it goes on.

        Args:
            directory: of the run.
        """
        found = {"digest": self.digest, "indices": self.indices, "told": plain(self.told)}
        atomic_io.write_json(directory / CHOICE, found)


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
    """Choose what a run trains on, or find the choice of a run that goes on; None without a selector.

    Args:
        checkpoint: what is trained.
        data: as `train` takes it.
        selector: the method.
        original: as for `chosen`.
        seed: of the run.
        directory: of the run; None: nothing is looked for.
        model: digest of what is trained; "" where the run has no directory.
        progress: called as the selector goes on.

    Raises:
        IntaglioError: it is no selector, the data are not in memory, or as `chosen`.
    """
    if selector is None:
        return None
    if not isinstance(selector, Selector):
        raise IntaglioError(f"select is {type(selector).__name__}; it needs select and budget")
    examples = all_examples(checkpoint, data)
    if examples is None:
        raise IntaglioError("select needs data in memory; give a list of examples or texts")
    digest = _digest(selector, examples, model, original, seed) if model else ""
    found = None if directory is None else _read(directory, digest)
    indices, told = found or chosen(selector, examples, checkpoint, original, seed, progress)
    return SelectedExamples(digest, indices, told, [examples[index] for index in indices])


def chosen(
    selector: Selector,
    examples: list[Example],
    checkpoint: Checkpoint,
    original: Original,
    seed: int,
    progress: Progress = no_progress,
) -> tuple[list[int], dict[str, Any]]:
    """Return which examples a selector chose, in their order, and what it tells of them.

    Indices are taken as they are. Weights are turned into copies by systematic resampling: of n examples, one with
    share w of the weight comes `floor(n w)` or `ceil(n w)` times.

    Args:
        selector: the method.
        examples: all of them.
        checkpoint: what is trained.
        original: the checkpoint before it was carved, what loads it, or None.
        seed: of the selector's draws and of the resampling.
        progress: called as the selector goes on.

    Raises:
        IntaglioError: the selector chose nothing, or no example that there is.
    """
    name = getattr(selector, "slug", type(selector).__name__)
    before = original
    if not isinstance(before, Checkpoint) and before is not None:
        before = before() if getattr(selector, "compares", True) else None
    found = selector.select(examples, checkpoint, before, selector.budget, KeyedRNG(seed), progress=progress)
    told = dict(found.told) if isinstance(found, Selection) else {}
    picked: list[Any] = list(found)
    if picked and all(isinstance(value, float) for value in picked):
        picked = _resampled(picked, len(examples), seed, name)
    if not picked:
        raise IntaglioError(f"{name} chose none of the {len(examples)} examples; give it a larger budget")
    wrong = [value for value in picked if not 0 <= int(value) < len(examples)]
    if wrong:
        raise IntaglioError(f"{name} chose the example {wrong[0]}; there are {len(examples)}")
    return sorted(int(index) for index in picked), told


def _resampled(weights: list[Any], count: int, seed: int, name: str) -> list[int]:
    share = torch.tensor(weights, dtype=torch.float64)
    if len(share) != count or bool((share < 0).any()) or not bool(torch.isfinite(share).all()) or not share.sum():
        raise IntaglioError(f"{name} gave {len(share)} weights for {count} examples; one at least 0 for each is needed")
    start = torch.rand((), generator=generator(seed, "select"), dtype=torch.float64)
    ends = (share / share.sum() * count).cumsum(0)
    copies = torch.diff(torch.floor(ends - start), prepend=torch.floor(-start)[None]).to(torch.int64)
    return torch.repeat_interleave(torch.arange(count), copies).tolist()


def _digest(selector: Selector, examples: list[Example], model: str, original: Original, seed: int) -> str:
    """What decides a choice; an original that is only loaded when it is asked for counts as the same."""
    before = model_digest(original.model) if isinstance(original, Checkpoint) else ""
    total = hashlib.sha256(repr([plain(describe(selector)), model, before, seed, len(examples)]).encode())
    for example in examples:
        for key in sorted(example):
            value = example[key]
            total.update(f"{key}:{value.tolist() if isinstance(value, torch.Tensor) else value!r};".encode())
    return total.hexdigest()


def _read(directory: Path, digest: str) -> tuple[list[int], dict[str, Any]] | None:
    """The choice that was put aside, if it is the same one and whole."""
    try:
        found = json.loads((directory / CHOICE).read_text(encoding="utf-8"))
        return (found["indices"], found["told"]) if found["digest"] == digest else None
    except (OSError, ValueError, TypeError, KeyError):
        return None  # it is made again


class RandomExamples(Method, slug="random"):
    """Chooses examples at random, each as likely as any other: what selectors are held against.

    Args:
        budget: share of the examples, above 0 and at most 1; at least one is chosen. Default 0.2.
    """

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
        """Return the indices of the chosen examples; a larger budget chooses the same ones and more.

        Args:
            dataset: the examples.
            model: not looked at.
            original: not looked at.
            budget: share of the examples.
            rng: its seed decides.
            progress: never called.
        """
        order = torch.randperm(len(dataset), generator=generator(rng.seed, "random examples")).tolist()
        kept = order[: max(1, int(budget * len(dataset) + 1e-9))] if dataset else []
        return Selection(kept, {"examples": len(dataset), "chosen": len(kept)})
