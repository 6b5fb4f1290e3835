"""Which examples are trained on: a selector's choice, applied before rows are made; and the choice at random."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.method import Method, Progress, silent
from intaglio.trainer.draws import Draws, generator
from intaglio.trainer.protocols import Example, Selection, Selector

Original = Checkpoint | Callable[[], Checkpoint] | None
"""The checkpoint before it was carved, or what loads it, so that it is in memory only while it is compared with."""


def chosen(
    selector: Selector,
    examples: list[Example],
    checkpoint: Checkpoint,
    original: Original,
    seed: int,
    progress: Progress = silent,
) -> tuple[list[Example], dict[str, Any]]:
    """Return the examples that a selector chose, in their own order, and what it tells of them.

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
    found = selector.select(examples, checkpoint, before, selector.budget, Draws(seed), progress=progress)
    told = dict(found.told) if isinstance(found, Selection) else {}
    picked: list[Any] = list(found)
    if picked and all(isinstance(value, float) for value in picked):
        picked = _resampled(picked, len(examples), seed, name)
    if not picked:
        raise IntaglioError(f"{name} chose none of the {len(examples)} examples; give it a larger budget")
    wrong = [value for value in picked if not 0 <= int(value) < len(examples)]
    if wrong:
        raise IntaglioError(f"{name} chose the example {wrong[0]}; there are {len(examples)}")
    return [examples[int(index)] for index in sorted(picked)], told


def _resampled(weights: list[Any], count: int, seed: int, name: str) -> list[int]:
    share = torch.tensor(weights, dtype=torch.float64)
    if len(share) != count or bool((share < 0).any()) or not bool(torch.isfinite(share).all()) or not share.sum():
        raise IntaglioError(f"{name} gave {len(share)} weights for {count} examples; one at least 0 for each is needed")
    start = torch.rand((), generator=generator(seed, "select"), dtype=torch.float64)
    ends = (share / share.sum() * count).cumsum(0)
    copies = torch.diff(torch.floor(ends - start), prepend=torch.floor(-start)[None]).to(torch.int64)
    return torch.repeat_interleave(torch.arange(count), copies).tolist()


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
        rng: Draws,
        *,
        progress: Progress = silent,
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
