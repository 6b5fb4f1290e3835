"""What the parts of a projection begin as, from the weight that they replace.

    W0 = U diag(S) Vᵀ
    B = U_r √S_r, A = √S_r V_rᵀ                            the best approximation of rank r
    W_comp = the sum of the next k singular triples        (or of the last k)
    I = the c columns of W_comp with the largest norms, Ws = W0[:, I]

Dimension letters: I inputs, O outputs, R rank, K triples of the complement, C columns, E single weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from intaglio.errors import IntaglioError

Init = Literal["svd", "cola", "kaiming", "zero"]
By = Literal["l2", "l1", "random", "gradient"]


@dataclass(frozen=True, eq=False)
class Decomposition:
    """The thin singular value decomposition of a weight, n = min(O, I).

    Args:
        U_On: left vectors.
        S_n: values, largest first.
        Vt_nI: right vectors.
    """

    U_On: Tensor
    S_n: Tensor
    Vt_nI: Tensor

    @classmethod
    def of(cls, weight_OI: Tensor) -> Decomposition:
        """Decompose a weight, in float32 at the least.

        Args:
            weight_OI: the weight.

        Raises:
            IntaglioError: it holds values that are not finite.
        """
        wide = weight_OI.detach().to(torch.promote_types(weight_OI.dtype, torch.float32))
        if not torch.isfinite(wide).all():
            raise IntaglioError("a weight holds NaN or infinite values, so it has no singular values")
        return cls(*torch.linalg.svd(wide, full_matrices=False))

    def pair(self, rank: int) -> tuple[Tensor, Tensor]:
        """A [R, I] and B [O, R] of the best approximation of a rank.

        Args:
            rank: R, at most n.
        """
        root_R = self.S_n[:rank].sqrt()
        return root_R[:, None] * self.Vt_nI[:rank], self.U_On[:, :rank] * root_R

    def tail(self, rank: int, triples: int, inverse: bool = False) -> slice:
        """Which triples make the complement.

        Args:
            rank: those before belong to the pair.
            triples: how many, cut to what is left.
            inverse: the smallest in the place of the next ones. Default False.
        """
        count = len(self.S_n)
        triples = min(triples, count - rank)
        return slice(count - triples, count) if inverse else slice(rank, rank + triples)

    def complement(self, rank: int, triples: int, inverse: bool = False) -> Tensor:
        """W_comp [O, I]; see `tail`."""
        tail = self.tail(rank, triples, inverse)
        return (self.U_On[:, tail] * self.S_n[tail]) @ self.Vt_nI[tail]

    def norms(self, rank: int, triples: int, by: By, inverse: bool = False) -> Tensor:
        """The norm of each column of the complement [I].

        Args:
            rank: see `tail`.
            triples: see `tail`.
            by: `l2`, which the values and right vectors alone give, or `l1`.
            inverse: see `tail`.
        """
        if by == "l1":
            return self.complement(rank, triples, inverse).abs().sum(0)
        tail = self.tail(rank, triples, inverse)
        return (self.S_n[tail, None] * self.Vt_nI[tail]).square().sum(0).sqrt()


def drawn_pair(inputs: int, outputs: int, rank: int, init: Init, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A [R, I] and B [O, R] that look at no weight, float32.

    Args:
        inputs: I.
        outputs: O.
        rank: R.
        init: `cola`: normal, with R^(-1/4) (I + O)^(-1/4) as standard deviation; `kaiming`: both as `nn.Linear` is
            drawn, uniform within 1 / √(inputs of the factor); `zero`: A so, B zero.
        generator: of the draws.
    """
    if init == "cola":
        scale = rank**-0.25 * (inputs + outputs) ** -0.25
        A_RI = scale * torch.randn(rank, inputs, generator=generator)
        return A_RI, scale * torch.randn(outputs, rank, generator=generator)
    A_RI = within(torch.rand(rank, inputs, generator=generator), inputs)
    if init == "zero":
        return A_RI, torch.zeros(outputs, rank)
    return A_RI, within(torch.rand(outputs, rank, generator=generator), rank)


def within(drawn: Tensor, inputs: int) -> Tensor:
    """Numbers from 0 to 1 moved to ± 1 / √inputs.

    Args:
        drawn: uniform.
        inputs: of the factor.
    """
    return (2 * drawn - 1) / math.sqrt(inputs)


def largest(score_I: Tensor, count: int) -> Tensor:
    """The places of the largest scores, sorted, int64 [C]; among equal ones the first.

    Args:
        score_I: a score a column.
        count: C.
    """
    return score_I.sort(descending=True, stable=True).indices[:count].sort().values


def drawn_places(of: int, count: int, generator: torch.Generator) -> Tensor:
    """Places at random, each once, sorted, int64.

    Args:
        of: among how many.
        count: how many.
        generator: of the draw.
    """
    return torch.randperm(of, generator=generator)[:count].sort().values


__all__ = ["By", "Decomposition", "Init", "drawn_pair", "drawn_places", "largest", "within"]
