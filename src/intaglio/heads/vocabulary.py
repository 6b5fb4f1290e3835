"""From a draft's state to logits: the model's own frozen output head, with a trained change.

    full:      logits_i = C_i x                          C_i starts as [W, ..., W]
    low rank:  logits_i = [W, ..., W] x + A B_i x        A (shared by all heads) starts at 0
    none:      logits_i = [W, ..., W] x

W [V, D] is the model's output matrix and x [X] has one or more parts of width D. For a vocabulary of 49,152 and a width
of 576 a full matrix has 28 or 57 million entries a head; a shared low-rank change has under two.

Dimension letters: R rows, V vocabulary, D width, X inputs, M heads, r rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FULL = 1 << 20
"""Entries of all heads' matrices together up to which they are full where no rank is given."""
RANK = 32
"""The rank beyond that."""


def rank_of(rank: int | None, heads: int, vocabulary: int, inputs: int) -> int | None:
    """The rank to use: what was asked for, or full matrices (None) where they are small, else 32.

    Args:
        rank: asked for; None: the rule above.
        heads: M.
        vocabulary: V.
        inputs: X.
    """
    return rank if rank is not None else None if heads * vocabulary * inputs <= FULL else RANK


class Vocabulary(nn.Module):
    """The output of M heads.

    Args:
        weight_VD: the model's output matrix.
        heads: M.
        copies: parts of width D in an input. Default 1.
        rank: of the shared change; 0: no change at all; None: full matrices, copies of the model's.
        generator: what B is drawn from.
    """

    def __init__(
        self, weight_VD: Tensor, heads: int, copies: int, rank: int | None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        vocabulary, width = weight_VD.shape
        inputs = copies * width
        self.copies, self.rank = copies, rank
        if rank is None:
            start = weight_VD.detach().float().cpu().repeat(1, copies)
            self.full_MVX = nn.Parameter(start.expand(heads, -1, -1).clone())
        elif rank:
            self.out_Vr = nn.Parameter(torch.zeros(vocabulary, rank))
            self.in_MrX = nn.Parameter(torch.randn(heads, rank, inputs, generator=generator) / inputs**0.5)

    def forward(self, x_RX: Tensor, head: int, weight_VD: Tensor) -> Tensor:
        """Logits [R, V] of one head, of the state's dtype.

        Args:
            x_RX: states.
            head: from 0.
            weight_VD: the model's output matrix.
        """
        if self.rank is None:
            return F.linear(x_RX, self.full_MVX[head])
        summed_RD = sum(x_RX.chunk(self.copies, -1))
        assert isinstance(summed_RD, Tensor)
        logits_RV = F.linear(summed_RD.to(weight_VD.dtype), weight_VD).to(x_RX.dtype)
        if not self.rank:
            return logits_RV
        return logits_RV + F.linear(F.linear(x_RX, self.in_MrX[head]), self.out_Vr)
