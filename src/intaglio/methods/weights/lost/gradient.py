"""Scores of columns by the gradient of the loss.

Dimension letters: I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from intaglio.data.segments import Segments
from intaglio.modeling.anatomy import Linear
from intaglio.trainer.preserve_state import preserve_grads


def column_gradients(
    model: nn.Module, linears: Sequence[tuple[str, Linear]], data: Segments, batch_size: int
) -> dict[str, Tensor]:
    """The norm of each column of the gradient of the next-token loss over some texts, [I] by projection.

    Args:
        model: is left as it was.
        linears: projections by name.
        data: the texts.
        batch_size: segments that pass at a time.
    """
    with preserve_grads(model), torch.enable_grad():
        model.requires_grad_(False)
        for _, linear in linears:
            cast(Tensor, linear.module.weight).requires_grad_(True)
        device = next(model.parameters()).device
        for batch in data.batches(batch_size):
            given = {name: value.to(device) for name, value in batch.items()}
            mask = given.get("attention_mask")
            labels = given["input_ids"] if mask is None else given["input_ids"].masked_fill(mask == 0, -100)
            model(**given, labels=labels, use_cache=False).loss.backward()
        found = {}
        for name, linear in linears:
            grad = cast(Tensor, cast(Tensor, linear.module.weight).grad).float()
            grad_OI = grad.T if isinstance(linear.module, Conv1D) else grad
            found[name] = (grad_OI if linear.rows is None else grad_OI[linear.rows.to(device)]).square().sum(0).sqrt()
    return found


__all__ = ["column_gradients"]
