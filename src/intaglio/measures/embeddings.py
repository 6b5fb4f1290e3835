"""Pooled embeddings of an encoder (or of a decoder's last hidden state).

Dimension letters: B batch, L sequence, D width, N texts.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.data.segments import Segments
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.partial_pass import final_hidden

Pooling = Literal["mean", "cls", "last"]


def pool(hidden_BLD: Tensor, mask_BL: Tensor | None, how: Pooling = "mean") -> Tensor:
    """Return the pooled embedding of each text, float32 [B, D], not normalised."""
    hidden_BLD = hidden_BLD.float()
    if mask_BL is None:
        mask_BL = torch.ones(hidden_BLD.shape[:2], dtype=torch.bool, device=hidden_BLD.device)
    if how == "mean":
        weight_BL1 = mask_BL[..., None].float()
        return (hidden_BLD * weight_BL1).sum(1) / weight_BL1.sum(1).clamp(min=1)
    position_L = torch.arange(mask_BL.shape[1], device=mask_BL.device)
    excluded = mask_BL.shape[1] if how == "cls" else -1
    index_BL = torch.where(mask_BL, position_L, excluded)
    index_B = (index_BL.amin(1) if how == "cls" else index_BL.amax(1)).clamp(0, mask_BL.shape[1] - 1)
    return hidden_BLD[torch.arange(len(index_B), device=index_B.device), index_B]


@torch.no_grad()
def embeddings(checkpoint: Checkpoint, data: Segments, how: Pooling = "mean", batch_size: int = 8) -> Tensor:
    """Embed every segment; float32 [N, D] on the CPU, not normalised."""
    parts = anatomy(checkpoint.model)
    result = []
    for batch in data.batches(batch_size):
        hidden_BLD = final_hidden(parts, batch)
        mask = batch.get("attention_mask")
        result.append(pool(hidden_BLD, None if mask is None else mask.bool().to(hidden_BLD.device), how).cpu())
    return torch.cat(result)
