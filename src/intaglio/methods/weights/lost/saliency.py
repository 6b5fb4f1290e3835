"""Column saliency: norms of the columns of the loss's gradient.

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
    """Return the norm of each column of the next-token loss's gradient, [I] by projection; the model is unchanged."""
    with preserve_grads(model), torch.enable_grad():
        model.requires_grad_(False)
        for _, linear in linears:
            cast(Tensor, linear.module.weight).requires_grad_(True)
        device = next(model.parameters()).device
        for batch in data.batches(batch_size):
            inputs = {name: value.to(device) for name, value in batch.items()}
            mask = inputs.get("attention_mask")
            labels = inputs["input_ids"] if mask is None else inputs["input_ids"].masked_fill(mask == 0, -100)
            model(**inputs, labels=labels, use_cache=False).loss.backward()
        norms: dict[str, Tensor] = {}
        for name, linear in linears:
            grad = cast(Tensor, cast(Tensor, linear.module.weight).grad).float()
            grad_OI = grad.T if isinstance(linear.module, Conv1D) else grad
            grad_OI = grad_OI if linear.rows is None else grad_OI[linear.rows.to(device)]
            norms[name] = grad_OI.square().sum(0).sqrt()
    return norms
