"""Initial values of the parts of a projection, from the weight that they replace.

    W0 = U diag(S) Vᵀ
    B = U_r √S_r, A = √S_r V_rᵀ                            the best approximation of rank r
    W_comp = the sum of the next k singular triples        (or of the last k)
    I = the c columns of W_comp with the largest norms, Ws = W0[:, I]

Dimension letters: I inputs, O outputs, R rank, K triples of the complement, C columns, E single weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from intaglio.checkpoint import DTYPES
from intaglio.errors import IntaglioError
from intaglio.methods.weights.lost.layers import ElementsLinear, LostLinear, LostLinearConfig
from intaglio.methods.weights.lost.sizing import LayerSizes
from intaglio.modeling.anatomy import Linear
from intaglio.trainer.rng import generator

Init = Literal["svd", "cola", "kaiming", "zero"]
ColumnScore = Literal["l2", "l1", "random", "gradient"]


@dataclass(frozen=True, eq=False)
class Decomposition:
    """Thin singular value decomposition of a weight, n = min(O, I), singular values in descending order."""

    U_On: Tensor
    S_n: Tensor
    Vt_nI: Tensor

    @classmethod
    def from_weight(cls, weight_OI: Tensor) -> Decomposition:
        """Decompose a weight, in float32 or wider.

        Raises:
            IntaglioError: it holds values that are not finite.
        """
        wide = weight_OI.detach().to(torch.promote_types(weight_OI.dtype, torch.float32))
        if not torch.isfinite(wide).all():
            raise IntaglioError("a weight holds NaN or infinite values, so it has no singular values")
        return cls(*torch.linalg.svd(wide, full_matrices=False))

    def pair(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return A [R, I] and B [O, R] of the best approximation of a rank, at most n."""
        root_R = self.S_n[:rank].sqrt()
        return root_R[:, None] * self.Vt_nI[:rank], self.U_On[:, :rank] * root_R

    def tail(self, rank: int, triples: int, inverse: bool = False) -> slice:
        """Return which triples make the complement: the next ones after `rank`, or the smallest (`inverse`)."""
        count = len(self.S_n)
        triples = min(triples, count - rank)
        return slice(count - triples, count) if inverse else slice(rank, rank + triples)

    def complement(self, rank: int, triples: int, inverse: bool = False) -> Tensor:
        """Return W_comp [O, I]; see `tail`."""
        tail = self.tail(rank, triples, inverse)
        return (self.U_On[:, tail] * self.S_n[tail]) @ self.Vt_nI[tail]

    def norms(self, rank: int, triples: int, by: ColumnScore, inverse: bool = False) -> Tensor:
        """Return the `l1` or `l2` norm of each column of the complement [I]; see `tail`."""
        if by == "l1":
            return self.complement(rank, triples, inverse).abs().sum(0)
        # Left vectors are orthonormal, so the others alone give the l2 norm.
        tail = self.tail(rank, triples, inverse)
        return (self.S_n[tail, None] * self.Vt_nI[tail]).square().sum(0).sqrt()


@dataclass(frozen=True)
class InitConfig:
    """Initial values of the parts; the fields are those of `LOST`.

    Args:
        config: how the parts are combined, the scale of an adapter left out (it is `alpha` over the rank).
        triples: K.
        alpha: of an adapter; None: the parts replace the weight.
        seed: of the random draws.
    """

    config: LostLinearConfig
    init: Init = "svd"
    columns_by: ColumnScore = "l2"
    inverse: bool = False
    column_values: str = "weight"
    triples: int = 256
    alpha: float | None = None
    seed: int = 0

    def empty(self, sizes: LayerSizes, bias: bool, transposed: bool) -> LostLinear | ElementsLinear:
        """Return a module without values, on the meta device: nothing is drawn from the global generator."""
        kind, count = (ElementsLinear, sizes.elements) if sizes.elements else (LostLinear, sizes.columns)
        config = replace(self.config, adapter=None if self.alpha is None else self.alpha / sizes.rank)
        with torch.device("meta"):
            return kind(sizes.inputs, sizes.outputs, sizes.rank, count, config, bias=bias, transposed=transposed)

    @torch.no_grad()
    def build(
        self, name: str, linear: Linear, sizes: LayerSizes, score_I: Tensor | None = None
    ) -> LostLinear | ElementsLinear:
        """Return the replacement of one projection, on its device and in its dtype; `name` keys the random draws.

        Raises:
            IntaglioError: the weight is packed, or not finite.
        """
        weight_OI, bias_O = linear.read(), linear.read_bias()
        if weight_OI.dtype not in DTYPES.values():
            dtype = str(weight_OI.dtype).removeprefix("torch.")
            raise IntaglioError(f"{name} stores its weight as {dtype}; lost needs {', '.join(DTYPES)}")
        module = self.empty(sizes, bias_O is not None, isinstance(linear.module, Conv1D)).to(weight_OI.dtype)
        module.to_empty(device=weight_OI.device)
        draws = generator(self.seed, "lost", name)
        by_norm = self.columns_by in ("l1", "l2") and 0 < sizes.columns < sizes.inputs
        from_complement = bool(sizes.columns) and self.column_values == "complement"
        svd = None
        if self.init == "svd" or by_norm or from_complement:
            svd = Decomposition.from_weight(weight_OI)
        if self.init == "svd" and svd is not None:
            A_RI, B_OR = svd.pair(sizes.rank)
        else:
            A_RI, B_OR = random_pair(sizes.inputs, sizes.outputs, sizes.rank, self.init, draws)
        module.down.weight.copy_(A_RI)
        module.up.weight[:, : sizes.rank].copy_(B_OR)
        if bias_O is not None:
            module.up.bias.copy_(bias_O)
        if isinstance(module, ElementsLinear):
            module.places.copy_(random_subset(sizes.dense, sizes.elements, draws))
            module.values.copy_(kaiming(torch.rand(sizes.elements, generator=draws), sizes.inputs))
            return module
        if sizes.columns:
            columns_C = self._columns(sizes, svd, score_I, draws).to(weight_OI.device)
            module.columns.copy_(columns_C)
            source_OI = weight_OI
            if from_complement and svd is not None:
                source_OI = svd.complement(sizes.rank, self.triples, self.inverse)
            module.up.weight[:, sizes.rank :].copy_(source_OI[:, columns_C])
        if module.weight is not None:
            module.weight.copy_(weight_OI)
        return module

    def _columns(
        self, sizes: LayerSizes, svd: Decomposition | None, score_I: Tensor | None, draws: torch.Generator
    ) -> Tensor:
        """Return the indices of the chosen columns, sorted [C]."""
        if sizes.columns == sizes.inputs:
            return torch.arange(sizes.inputs)
        if self.columns_by == "random":
            return random_subset(sizes.inputs, sizes.columns, draws)
        if self.columns_by == "gradient":
            if score_I is None:
                raise IntaglioError("columns_by is gradient, which needs a checkpoint and calibration texts")
            return largest(score_I, sizes.columns)
        assert svd is not None  # made for these two
        return largest(svd.norms(sizes.rank, self.triples, self.columns_by, self.inverse), sizes.columns)


def random_pair(inputs: int, outputs: int, rank: int, init: Init, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return A [R, I] and B [O, R] that do not depend on a weight, float32.

    `cola`: normal with standard deviation R^(-1/4) (I + O)^(-1/4); `kaiming`: both as `nn.Linear` is drawn, uniform
    within 1 / √(inputs of the factor); `zero`: A so, B zero.
    """
    if init == "cola":
        scale = rank**-0.25 * (inputs + outputs) ** -0.25
        A_RI = scale * torch.randn(rank, inputs, generator=generator)
        return A_RI, scale * torch.randn(outputs, rank, generator=generator)
    A_RI = kaiming(torch.rand(rank, inputs, generator=generator), inputs)
    if init == "zero":
        return A_RI, torch.zeros(outputs, rank)
    return A_RI, kaiming(torch.rand(outputs, rank, generator=generator), rank)


def kaiming(uniform: Tensor, inputs: int) -> Tensor:
    """Map draws from 0 to 1 to ± 1 / √inputs."""
    return (2 * uniform - 1) / math.sqrt(inputs)


def largest(score_I: Tensor, count: int) -> Tensor:
    """Return the indices of the largest scores, sorted, int64 [C]; among equal ones the first."""
    return score_I.sort(descending=True, stable=True).indices[:count].sort().values


def random_subset(size: int, count: int, generator: torch.Generator) -> Tensor:
    """Return distinct random indices below `size`, sorted, int64."""
    return torch.randperm(size, generator=generator)[:count].sort().values
