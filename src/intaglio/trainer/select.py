"""Which examples are trained on: a selector's choice, applied before rows are made."""

from __future__ import annotations

from typing import Any

import torch

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.trainer.draws import Draws, generator
from intaglio.trainer.protocols import Example, Selector


def chosen(
    selector: Selector, examples: list[Example], checkpoint: Checkpoint, original: Checkpoint | None, seed: int
) -> list[Example]:
    """Return the examples that a selector chose, in their own order.

    Indices are taken as they are. Weights are turned into copies by systematic resampling: of n examples, one with
    share w of the weight comes `floor(n w)` or `ceil(n w)` times.

    Args:
        selector: the method.
        examples: all of them.
        checkpoint: what is trained.
        original: the checkpoint before it was carved, or None.
        seed: of the selector's draws and of the resampling.

    Raises:
        IntaglioError: the selector chose nothing, or no example that there is.
    """
    name = getattr(selector, "slug", type(selector).__name__)
    picked: list[Any] = list(selector.select(examples, checkpoint, original, selector.budget, Draws(seed)))
    if picked and all(isinstance(value, float) for value in picked):
        picked = _resampled(picked, len(examples), seed, name)
    if not picked:
        raise IntaglioError(f"{name} chose none of the {len(examples)} examples; give it a larger budget")
    wrong = [value for value in picked if not 0 <= int(value) < len(examples)]
    if wrong:
        raise IntaglioError(f"{name} chose the example {wrong[0]}; there are {len(examples)}")
    return [examples[int(index)] for index in sorted(picked)]


def _resampled(weights: list[Any], count: int, seed: int, name: str) -> list[int]:
    share = torch.tensor(weights, dtype=torch.float64)
    if len(share) != count or bool((share < 0).any()) or not bool(torch.isfinite(share).all()) or not share.sum():
        raise IntaglioError(f"{name} gave {len(share)} weights for {count} examples; one at least 0 for each is needed")
    start = torch.rand((), generator=generator(seed, "select"), dtype=torch.float64)
    ends = (share / share.sum() * count).cumsum(0)
    copies = torch.diff(torch.floor(ends - start), prepend=torch.floor(-start)[None]).to(torch.int64)
    return torch.repeat_interleave(torch.arange(count), copies).tolist()
