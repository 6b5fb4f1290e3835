"""Products with a sparse code matrix: only active entries are decoded and receive gradients.

A training step of a sparse autoencoder needs one dense product, the pre-activations x Wᵀ. Everything after it is a
product with the codes Z [B, M], of which a few percent are not zero:

    decode           Z W                     gradient of Z at its active entries: (G Wᵀ)_bm = g_b · w_m
    gradient of W    Zᵀ G  and  Gzᵀ x        rows of active latents only

Dimension letters: B batch, D width, M latents, E active entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DENSE = 0.12
"""Share of active entries from which dense products are used: with AVX2 they take 1.5 times as long there and as long
at 0.15 to 0.2; wider vectors shorten them alone."""


@dataclass(frozen=True, eq=False)
class ActiveEntries:
    """Positions of the active entries of a code matrix [B, M], in row order.

    Args:
        rows_E: int64, ascending.
        latents_E: int64.
        shape: `(B, M)`.
    """

    rows_E: Tensor
    latents_E: Tensor
    shape: tuple[int, int]

    @classmethod
    def from_mask(cls, mask_BM: Tensor) -> ActiveEntries:
        """Return the entries where a mask is true."""
        rows_E, latents_E = mask_BM.nonzero(as_tuple=True)
        return cls(rows_E, latents_E, (mask_BM.shape[0], mask_BM.shape[1]))

    @classmethod
    def from_topk(cls, latents_BK: Tensor, width: int) -> ActiveEntries:
        """Return the entries of K latents a row."""
        batch, k = latents_BK.shape
        rows_E = torch.arange(batch, device=latents_BK.device).repeat_interleave(k)
        return cls(rows_E, latents_BK.reshape(-1), (batch, width))

    def where(self, keep_E: Tensor) -> ActiveEntries:
        """Return some of the entries."""
        return ActiveEntries(self.rows_E[keep_E], self.latents_E[keep_E], self.shape)

    @property
    def dense(self) -> bool:
        """Whether dense products are faster."""
        return len(self.rows_E) > DENSE * self.shape[0] * self.shape[1]

    @cached_property
    def _by_latent(self) -> Tensor:
        return torch.argsort(self.latents_E, stable=True)

    @cached_property
    def _row_starts(self) -> Tensor:
        return _starts(self.rows_E, self.shape[0])

    @cached_property
    def _latent_starts(self) -> Tensor:
        return _starts(self.latents_E, self.shape[1])

    def gather(self, full_BM: Tensor) -> Tensor:
        """Return the entries [E] of a matrix."""
        return full_BM[self.rows_E, self.latents_E]

    def to_dense(self, values_E: Tensor) -> Tensor:
        """Return the code matrix [B, M]."""
        full_BM = values_E.new_zeros(self.shape)
        full_BM[self.rows_E, self.latents_E] = values_E
        return full_BM

    def sum_by_latent(self, values_E: Tensor) -> Tensor:
        """Return the sum of the values of each latent [M]."""
        return values_E.new_zeros(self.shape[1]).index_add_(0, self.latents_E, values_E)

    def times(self, values_E: Tensor, x_MD: Tensor) -> Tensor:
        """Return Z x [B, D]."""
        if self.dense:
            return self.to_dense(values_E) @ x_MD
        return _sums(self.latents_E, self._row_starts, values_E, x_MD)

    def transposed_times(self, values_E: Tensor, x_BD: Tensor) -> Tensor:
        """Return Zᵀ x [M, D]."""
        if self.dense:
            return self.to_dense(values_E).T @ x_BD
        order = self._by_latent
        return _sums(self.rows_E[order], self._latent_starts, values_E[order], x_BD)

    def row_products(self, x_BD: Tensor, y_MD: Tensor) -> Tensor:
        """Return x_b · y_m for every entry (b, m) [E]."""
        if self.dense:
            return self.gather(x_BD @ y_MD.T)
        # The gradient of a weighted sum of rows with respect to its weights: no row is copied.
        products_E: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            x_BD.contiguous(), y_MD.contiguous(), self.latents_E, self._row_starts, self.rows_E, 0
        )
        return products_E


def _starts(rows_E: Tensor, count: int) -> Tensor:
    """Return the first entry of each row [count]."""
    sizes = torch.bincount(rows_E, minlength=count)
    return sizes.cumsum(0) - sizes


def _sums(columns_E: Tensor, starts: Tensor, values_E: Tensor, x: Tensor) -> Tensor:
    """Return the weighted sum of the rows of x for each run of entries."""
    return F.embedding_bag(columns_E, x.contiguous(), starts, mode="sum", per_sample_weights=values_E)


class _PreActivations(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pre_E: Tensor, centred_BD: Tensor, weight_MD: Tensor, bias_M: Tensor, offset_D: Tensor, at: Any
    ) -> Tensor:
        ctx.save_for_backward(centred_BD, weight_MD)
        ctx.at = at
        return pre_E.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_E: Tensor = grads[0]
        centred_BD, weight_MD = ctx.saved_tensors
        sums_M = ctx.at.sum_by_latent(grad_E)
        weight = ctx.at.transposed_times(grad_E, centred_BD) if ctx.needs_input_grad[2] else None
        return None, None, weight, sums_M, -(sums_M @ weight_MD), None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_E: Tensor, weight_MD: Tensor, at: Any) -> Tensor:
        ctx.save_for_backward(values_E, weight_MD)
        ctx.at = at
        out_BD: Tensor = at.times(values_E, weight_MD)
        return out_BD

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_BD: Tensor = grads[0]
        values_E, weight_MD = ctx.saved_tensors
        weight = ctx.at.transposed_times(values_E, grad_BD) if ctx.needs_input_grad[1] else None
        return ctx.at.row_products(grad_BD, weight_MD), weight, None


def pre_activations(
    pre_BM: Tensor, x_BD: Tensor, weight_MD: Tensor, bias_M: Tensor, offset_D: Tensor, at: ActiveEntries
) -> Tensor:
    """Return w_m · (x_b - offset) + bias_m at active entries [E], with gradients for weight, bias and offset.

    Args:
        pre_BM: the pre-activations, computed without gradients.
        x_BD: inputs; they receive no gradient.
        weight_MD: encoder rows.
        bias_M: encoder bias.
        offset_D: subtracted from the inputs.
        at: the entries.
    """
    with torch.no_grad():
        pre_E, centred_BD = at.gather(pre_BM), x_BD - offset_D
    values_E: Tensor = _PreActivations.apply(pre_E, centred_BD, weight_MD, bias_M, offset_D, at)
    return values_E


def decode(values_E: Tensor, weight_MD: Tensor, offset_D: Tensor, at: ActiveEntries) -> Tensor:
    """Return Z W + offset [B, D], with gradients for the values, the weight and the offset."""
    out_BD: Tensor = _Decode.apply(values_E, weight_MD, at)
    return out_BD + offset_D
