"""Parametrization of a layer's weight: its mask and its gradient.

    forward     w * (m + z (1 - m))
    chain       gradient = g * (m + z (1 - m))
    ste         gradient = g
    sr-ste      gradient = g + lambda (1 - m) w          (with z = 0)

g is the gradient of the masked weight. `torch.nn.utils.parametrize` puts this between the parameter and the layer; the
bias stays the layer's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from intaglio.methods.weights.progressive_nm.masks import keep_mask
from intaglio.methods.weights.progressive_nm.schedule import Gradient, Moment, Schedule
from intaglio.methods.weights.sparsity_target import mask_to_float


class StraightThrough(torch.autograd.Function):
    """w * factor with a straight-through gradient, plus lambda w where the mask is False (SR-STE).

    Source of the decay: Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch, ICLR
    2021, equation 7.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, factor: Tensor, keep: Tensor, pull: float) -> Tensor:
        """Return the masked weight."""
        ctx.pull = pull
        if pull:
            ctx.save_for_backward(weight, keep)
        return weight * factor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradient of the dense weight."""
        (gradient,) = gradients
        if ctx.pull:
            weight, keep = ctx.saved_tensors
            gradient = gradient + ctx.pull * (weight * mask_to_float(~keep, weight.dtype))
        return gradient, None, None, None


@dataclass(frozen=True)
class Part:
    """Output rows of a weight with one schedule: all of them (None), or one projection of a fused layer."""

    schedule: Schedule
    rows: Tensor | None = None


class ProgressiveMask(nn.Module):
    """The parametrization of one weight; groups run along the stored dimension `axis`.

    In training mode the weight is that of the current step; in evaluation mode it is always the sparse one that would
    be baked now, so that the evaluated model is one that can be saved.
    """

    z: Tensor

    def __init__(
        self, parts: Sequence[Part], axis: int, out_axis: int, gradient: Gradient = "chain", pull: float = 0.0
    ) -> None:
        super().__init__()
        self.parts, self.axis, self.out_axis = tuple(parts), axis, out_axis
        self.straight, self.pull = gradient == "ste", pull
        # A buffer: a number would be baked into a compiled graph and never change.
        self.register_buffer("z", torch.ones(()), persistent=False)
        self.moments: tuple[Moment, ...] = ()
        self.set(1)

    def set(self, t: int) -> None:
        """Move to step `t`, from 1."""
        self.moments = tuple(part.schedule.at(t) for part in self.parts)
        self.z.fill_(self.moments[0].z)

    @property
    def dense(self) -> bool:
        """Whether nothing is masked in this step."""
        return all(now.phase == "dense" for now in self.moments)

    def keep(self, weight: Tensor, *, final: bool = False) -> Tensor:
        """Return the mask in force, or the final one, True = kept."""
        amounts = [p.schedule.amount if final else now.amount for p, now in zip(self.parts, self.moments, strict=True)]
        if self.parts[0].rows is None:
            return keep_mask(weight, amounts[0], self.axis)
        kept = torch.ones_like(weight, dtype=torch.bool)
        for part, amount in zip(self.parts, amounts, strict=True):
            assert part.rows is not None  # a layer is whole, or in parts
            rows = part.rows.to(weight.device)
            mask = keep_mask(weight.detach().index_select(self.out_axis, rows), amount, self.axis)
            kept = kept.index_copy(self.out_axis, rows, mask)
        return kept

    def forward(self, weight: Tensor) -> Tensor:
        """Return the masked weight."""
        if self.training and self.dense:
            return weight
        keep = self.keep(weight, final=not self.training)
        factor = mask_to_float(keep, weight.dtype)
        if self.training:
            factor = factor.clamp_(min=self.z.to(weight.dtype))
        if self.straight:
            masked: Tensor = StraightThrough.apply(weight, factor, keep, self.pull)
            return masked
        return weight * factor
