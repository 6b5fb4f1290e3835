"""Heads whose first M outputs can be searched among vectors of an older encoder; the rest is theirs.

Dimension letters: N texts, H inputs of the head (pooled hidden states or cached vectors), M old dimensions, D outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from intaglio.errors import IntaglioError

Arm = Literal["bt2", "bct", "bct_distill", "naive", "procrustes"]
ARMS: tuple[Arm, ...] = ("bt2", "bct", "bct_distill", "naive", "procrustes")


@dataclass(frozen=True)
class Sizes:
    """Sizes of a head.

    Args:
        inputs: H.
        old: M, the old dimensions.
        new: n, dimensions of new information.
        extra: r, dimensions of old information beside them.
        scale: C, the weight of new information.
    """

    inputs: int
    old: int
    new: int
    extra: int
    scale: float


@dataclass(frozen=True)
class HeadOutput:
    """Vectors [N, D] that are stored and searched, and the part [N, ...] that the task is trained on, unit norm."""

    vectors: Tensor
    task: Tensor


class CompatibleHead(nn.Module):
    """Base of the heads: `dimensions` outputs, of which the first `old_dimensions` are searched among old vectors."""

    def __init__(self, sizes: Sizes, dimensions: int) -> None:
        super().__init__()
        self.sizes, self.old_dimensions, self.dimensions = sizes, sizes.old, dimensions
        if dimensions < sizes.old:
            raise IntaglioError(
                f"the head has {dimensions} dimensions; at least the {sizes.old} of the old vectors are needed: raise"
                " extra_dims or new_dims"
            )

    def forward(self, inputs_NH: Tensor) -> HeadOutput:
        """Return the vectors of texts."""
        raise NotImplementedError

    def old_block(self, vectors_ND: Tensor) -> Tensor:
        """Return bhat, the first M outputs with unit norm."""
        return F.normalize(vectors_ND[:, : self.old_dimensions], dim=-1)


def _linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """Return a layer that starts as the identity, or between other widths with orthonormal columns or rows."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    if inputs == outputs:
        nn.init.eye_(layer.weight)
    else:
        nn.init.orthogonal_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def _rotation(width: int) -> nn.Linear:
    """Return a learnable orthogonal matrix, float32; it starts as a random one.

    Cayley's map has the gradient of torch's default, the matrix exponential, at the start, at a third of its time.
    """
    layer = nn.Linear(width, width, bias=False)
    nn.init.orthogonal_(layer.weight)
    return orthogonal(layer, orthogonal_map="cayley")  # type: ignore[return-value]


class BasisTransformation(CompatibleHead):
    """BT2's head.

    b = [W_n f, W_m f]                    phi = b[:n] / |b[:n]|
    o = W_o relu(b) / |W_o relu(b)|       e = o[:r] / |o[:r]|
    u = [e, P (C phi)]                    old' = Q u[:m]            new = [old', u[m:]]
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes, sizes.new + sizes.extra)
        self.new_features = _linear(sizes.inputs, sizes.new)
        self.old_features = nn.Linear(sizes.inputs, sizes.old)
        self.to_old = nn.Linear(sizes.new + sizes.old, sizes.old)
        self.P, self.Q = _rotation(sizes.new), _rotation(sizes.old)

    def parts(self, inputs_NH: Tensor) -> tuple[Tensor, Tensor]:
        """Return phi, [N, n], and e, [N, r]."""
        new_Nn, old_NM = self.new_features(inputs_NH.float()), self.old_features(inputs_NH.float())
        o_NM = F.normalize(self.to_old(torch.cat([new_Nn, old_NM], 1).relu()), dim=-1)
        return F.normalize(new_Nn, dim=-1), F.normalize(o_NM[:, : self.sizes.extra], dim=-1)

    def forward(self, inputs_NH: Tensor) -> HeadOutput:
        """Return the vectors, whose squared norm is C^2 + 1, and phi."""
        phi_Nn, e_Nr = self.parts(inputs_NH)
        u_ND = torch.cat([e_Nr, self.P(self.sizes.scale * phi_Nn)], 1)
        old = self.old_dimensions
        return HeadOutput(torch.cat([self.Q(u_ND[:, :old]), u_ND[:, old:]], 1), phi_Nn)


class OneVector(CompatibleHead):
    """BCT's head (Shen et al., CVPR 2020): one vector of n + r dimensions, trained to be searched among old ones.

    With `distilled`, a projection to the dimensions of the independent encoder is trained beside it.
    """

    def __init__(self, sizes: Sizes, distilled: bool) -> None:
        super().__init__(sizes, sizes.new + sizes.extra)
        self.features = _linear(sizes.inputs, self.dimensions)
        self.to_independent = nn.Linear(self.dimensions, sizes.new, bias=False) if distilled else None
        if self.to_independent is not None and sizes.new == sizes.inputs:
            self.to_independent.weight.data.copy_(self.features.weight.T)  # its inverse, as columns are orthonormal

    def forward(self, inputs_NH: Tensor) -> HeadOutput:
        """Return the vector, on which the task is trained as well."""
        vectors_ND = F.normalize(self.features(inputs_NH.float()), dim=-1)
        return HeadOutput(vectors_ND, vectors_ND)


class SeparateBlocks(CompatibleHead):
    """New dimensions beside old ones, without a change of basis; the paper's ablation."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes, sizes.old + sizes.new)
        self.new_features, self.old_features = _linear(sizes.inputs, sizes.new), nn.Linear(sizes.inputs, sizes.old)

    def forward(self, inputs_NH: Tensor) -> HeadOutput:
        """Return both blocks, and the new one."""
        phi_Nn = F.normalize(self.new_features(inputs_NH.float()), dim=-1)
        old_NM = F.normalize(self.old_features(inputs_NH.float()), dim=-1)
        return HeadOutput(torch.cat([old_NM, self.sizes.scale * phi_Nn], 1), phi_Nn)


class Rotation(CompatibleHead):
    """A fixed rotation of cached vectors, which keeps their inner products; see `functional.procrustes`."""

    matrix_HD: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes, max(sizes.inputs, sizes.old))
        self.register_buffer("matrix_HD", torch.eye(sizes.inputs, self.dimensions))

    def forward(self, inputs_NH: Tensor) -> HeadOutput:
        """Return rotated vectors, and the inputs."""
        return HeadOutput(inputs_NH.float() @ self.matrix_HD, F.normalize(inputs_NH.float(), dim=-1))


def new_head(arm: Arm, sizes: Sizes) -> CompatibleHead:
    """Return an untrained head, drawn from torch's global generator."""
    if arm == "bt2":
        return BasisTransformation(sizes)
    if arm in ("bct", "bct_distill"):
        return OneVector(sizes, arm == "bct_distill")
    return SeparateBlocks(sizes) if arm == "naive" else Rotation(sizes)
