"""Losses over a vocabulary, a few rows at a time, so that memory holds the logits of those rows only.

The gradient of each chunk is computed at once and kept for the states and parameters; the logits (a row of 49,152
numbers is as large as 85 hidden states of width 576) are never all in memory, neither forward nor backward.

Dimension letters: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 128
"""Rows of a chunk by default."""

ChunkLoss = Callable[..., tuple[Tensor, Tensor, Tensor | None]]
"""From rows to the chunk's loss (a scalar sum), other sums that need no gradient, and a value of each row, or None."""


def kl(teacher_RV: Tensor, student_RV: Tensor) -> Tensor:
    """Return KL(teacher || student) of each row of logits in nats [R], in float32."""
    log_q_RV = torch.log_softmax(student_RV.float(), -1)
    log_p_RV = torch.log_softmax(teacher_RV.float(), -1)
    return F.kl_div(log_q_RV, log_p_RV, reduction="none", log_target=True).sum(-1)


class _Chunked(torch.autograd.Function):
    """Runs the loss over the chunks and keeps their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        loss_fn: ChunkLoss,
        size: int,
        count: int,
        kept: list[Any],
        parameters: Sequence[Tensor],
        *tensors: Tensor,
    ) -> Tensor:
        rows = tensors[:count]
        needs = ctx.needs_input_grad[5:]
        row_grads = [torch.zeros_like(x) if need else None for x, need in zip(rows, needs, strict=False)]
        own_grads: list[Tensor | None] = [None] * len(parameters)
        total = torch.zeros((), device=rows[0].device)
        for start in range(0, len(rows[0]), size):
            part = slice(start, start + size)
            leaves = [x[part].detach().requires_grad_(need) for x, need in zip(rows, needs, strict=False)]
            with torch.enable_grad():
                loss, sums, each = loss_fn(*leaves)
            kept.append((sums.detach(), each))
            total += loss.detach()
            inputs = [leaf for leaf in leaves if leaf.requires_grad] + [p for p in parameters if p.requires_grad]
            grads = iter(torch.autograd.grad(loss, inputs, allow_unused=True) if inputs else ())
            for row_grad, leaf in zip(row_grads, leaves, strict=True):
                if leaf.requires_grad and (grad := next(grads)) is not None:
                    assert row_grad is not None
                    row_grad[part] = grad
            for index, parameter in enumerate(parameters):
                if parameter.requires_grad and (grad := next(grads)) is not None:
                    before = own_grads[index]
                    own_grads[index] = grad if before is None else before + grad
        ctx.grads = [*row_grads, *own_grads]
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return (None, None, None, None, None, *(None if own is None else own * grads[0] for own in ctx.grads))


def chunked(
    loss_fn: ChunkLoss, rows: Sequence[Tensor], parameters: Sequence[Tensor], size: int = ROWS
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sum a loss over rows, a chunk at a time.

    Args:
        loss_fn: called with the same rows of every tensor.
        rows: tensors with rows as their first dimension, at least one row.
        parameters: trained tensors that `loss_fn` uses besides the rows.
        size: rows of a chunk. Default 128.

    Returns:
        the loss, the other sums, and the concatenated values of each row.
    """
    kept: list[Any] = []
    if torch.is_grad_enabled():
        total: Tensor = _Chunked.apply(loss_fn, size, len(rows), kept, parameters, *rows, *parameters)
    else:
        total = torch.zeros((), device=rows[0].device)
        for start in range(0, len(rows[0]), size):
            loss, sums, each = loss_fn(*(x[start : start + size] for x in rows))
            kept.append((sums, each))
            total = total + loss
    sums = torch.stack([sums for sums, _ in kept]).sum(0)
    each = None if kept[0][1] is None else torch.cat([each for _, each in kept])
    return total, sums, each


def zero_loss(parameters: Sequence[Tensor]) -> Tensor:
    """Return a loss of 0 that gives every parameter a zero gradient, for a batch with nothing to predict."""
    return torch.stack([parameter.sum() * 0 for parameter in parameters]).sum()
