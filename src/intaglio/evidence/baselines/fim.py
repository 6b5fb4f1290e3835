"""Fill-in-the-middle training (FIM), the baseline of CodeGen2: one hole a document, moved to its end.

    PSM    <fim_prefix> prefix <fim_suffix> suffix <fim_middle> middle <eot>
    SPM    <fim_prefix> <fim_suffix> suffix <fim_middle> prefix middle <eot>

Source: Bavarian et al., Efficient Training of Language Models to Fill in the Middle, 2022, arXiv 2207.14255, at the
level of tokens; SPM as in its section 3 ("variant 2").

Dimension letters: T tokens of a document.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.data.infill_format import FIM, FillInMiddle
from intaglio.methods.objectives.codegen2 import SHORTEST, CodeGen2
from intaglio.trainer.special_token import reserve_tokens


class FillInMiddleTraining(CodeGen2):
    """Fill-in-the-middle training; `corruption_ratio` is the FIM rate, and there are no span settings.

    Args:
        spm_ratio: share of the transformed documents in the order suffix, prefix, middle. Default 0.5.
    """

    spm_ratio: Annotated[float, Field(ge=0, le=1)] = 0.5

    def _reserve(self, checkpoint: Checkpoint, stop: Any, seed: int) -> Any:
        prefix, suffix, middle = reserve_tokens(checkpoint, FIM[0], grow=self.grow, seed=seed)
        return FillInMiddle(prefix, suffix, middle, stop)

    def _rearrangement(
        self, begin: int, tokens: int, room: int, rng: torch.Generator
    ) -> Callable[[Tensor], Tensor] | None:
        tokens = min(tokens, room - 4)
        if tokens < SHORTEST:
            return None
        spm = float(torch.rand(1, generator=rng)) < self.spm_ratio
        first, second = torch.randint(tokens + 1, (2,), generator=rng).sort().values.tolist()
        return lambda row_T: middle_last(row_T[: begin + tokens], begin + first, begin + second, self._tokens, spm)


def middle_last(row_T: Tensor, first: int, second: int, tokens: FillInMiddle, spm: bool) -> Tensor:
    """Return a document with the tokens from `first` to `second` moved to its end, int64 [T + 4]."""
    prefix, suffix, middle, end = torch.tensor([[tokens.prefix], [tokens.suffix], [tokens.middle], [tokens.end]])
    before_T, hole_T, after_T = row_T[:first], row_T[first:second], row_T[second:]
    if spm:
        return torch.cat([prefix, suffix, after_T, middle, before_T, hole_T, end])
    return torch.cat([prefix, before_T, suffix, after_T, middle, hole_T, end])
