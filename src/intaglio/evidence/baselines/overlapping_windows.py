"""Overlapping windows: the baseline of recurrence that reads part of the window before again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from intaglio.methods.decoding.apply_pretrained.hidden_state_optimization import negative_log_likelihood


@torch.no_grad()
def overlapping_windows(model: Any, ids_BT: Tensor, window: int, stride: int) -> Tensor:
    """Return -log p of every token but the first in nats, [B, T-1].

    Windows of `window` tokens begin every `stride`; each token is scored in the first that reaches it, so past the
    first window with a context of at least `window - stride` tokens. With stride = window nothing overlaps.
    """
    losses, scored = [], 0
    for start in range(0, ids_BT.shape[1] - 1, stride):
        inputs_BL, target_BL = ids_BT[:, start : start + window], ids_BT[:, start + 1 : start + window + 1]
        length = target_BL.shape[1]
        nll_BL = negative_log_likelihood(model(input_ids=inputs_BL[:, :length]).logits, target_BL)
        losses.append(nll_BL[:, scored - start :])
        scored = start + length
        if scored == ids_BT.shape[1] - 1:
            break
    return torch.cat(losses, 1)
