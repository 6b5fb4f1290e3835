"""Losses over a vocabulary, a few rows at a time, so that memory holds the logits of those rows alone.

The gradient of each piece is taken at once and kept for the states and parameters only; the logits (a row of 49,152
numbers is as large as 85 hidden states of width 576) are never all there, neither forward nor backward.

Dimension letters: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 128
"""Rows of a piece by default."""

Piece = Callable[..., tuple[Tensor, Tensor, Tensor | None]]
"""Rows in; the piece's loss (a scalar sum), other sums that need no gradient, and something for each row, or None."""


def kl(teacher_RV: Tensor, student_RV: Tensor) -> Tensor:
    """KL(teacher || student) of each row in nats [R], in float32.

    Args:
        teacher_RV: logits.
        student_RV: logits.
    """
    log_q_RV = torch.log_softmax(student_RV.float(), -1)
    log_p_RV = torch.log_softmax(teacher_RV.float(), -1)
    return F.kl_div(log_q_RV, log_p_RV, reduction="none", log_target=True).sum(-1)


class _Pieces(torch.autograd.Function):
    """Runs `piece` over the rows and keeps the gradients that it finds on the way."""

    @staticmethod
    def forward(
        ctx: Any, piece: Piece, size: int, count: int, kept: list[Any], parameters: Sequence[Tensor], *tensors: Tensor
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
                loss, sums, each = piece(*leaves)
            kept.append((sums.detach(), each))
            total += loss.detach()
            wanted = [leaf for leaf in leaves if leaf.requires_grad] + [p for p in parameters if p.requires_grad]
            found = iter(torch.autograd.grad(loss, wanted, allow_unused=True) if wanted else ())
            for grad, leaf in zip(row_grads, leaves, strict=True):
                if leaf.requires_grad and (own := next(found)) is not None:
                    assert grad is not None
                    grad[part] = own
            for place, parameter in enumerate(parameters):
                if parameter.requires_grad and (own := next(found)) is not None:
                    before = own_grads[place]
                    own_grads[place] = own if before is None else before + own
        ctx.grads = [*row_grads, *own_grads]
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        scaled = [None if own is None else own * grads[0] for own in ctx.grads]
        return (None, None, None, None, None, *scaled)


def in_pieces(
    piece: Piece, rows: Sequence[Tensor], parameters: Sequence[Tensor], size: int = ROWS
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sum a loss over rows, a piece at a time.

    Args:
        piece: see `Piece`; called with the same rows of every tensor.
        rows: tensors with rows as their first dimension, at least one row.
        parameters: what `piece` uses beside the rows and gradients are wanted for.
        size: rows of a piece. Default 128.

    Returns:
        the loss, the other sums, and what was given for each row, one behind the other.
    """
    kept: list[Any] = []
    if torch.is_grad_enabled():
        total: Tensor = _Pieces.apply(piece, size, len(rows), kept, parameters, *rows, *parameters)
    else:
        total = torch.zeros((), device=rows[0].device)
        for start in range(0, len(rows[0]), size):
            loss, sums, each = piece(*(x[start : start + size] for x in rows))
            kept.append((sums, each))
            total = total + loss
    sums = torch.stack([sums for sums, _ in kept]).sum(0)
    each = None if kept[0][1] is None else torch.cat([each for _, each in kept])
    return total, sums, each


def nothing(parameters: Sequence[Tensor]) -> Tensor:
    """A loss of 0 of which every parameter has the gradient 0: for a batch with nothing to predict.

    Args:
        parameters: all of them.
    """
    return torch.stack([parameter.sum() * 0 for parameter in parameters]).sum()
