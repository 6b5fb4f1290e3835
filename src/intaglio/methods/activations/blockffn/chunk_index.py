"""Chunks and neighbours among the tokens of a batch: documents are never mixed, padding never counts.

Dimension letters: B rows, T tokens of a row, N = B T, C chunks, L tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ChunkIndex:
    """Chunks of each document's tokens; documents are cut from their first token on, the last chunk may be short.

    Args:
        follows_N: bool, whether the token before belongs to the same document.
        real_N: bool, False at padding.
        chunk_N: int64, index of the token's chunk; arbitrary at padding.
        size_C: tokens of each chunk, 1 to L.
        length: L.
    """

    follows_N: Tensor
    real_N: Tensor
    chunk_N: Tensor
    size_C: Tensor
    length: int

    @classmethod
    def from_batch(cls, batch: Mapping[str, Any], length: int) -> ChunkIndex:
        """Index the tokens of a batch.

        A document begins where `position_ids` restart, and at the first token of a row. Padding is where
        `attention_mask` is 0; in packed rows, which have no mask, a document without any `target`.

        Args:
            batch: `input_ids` [B, T]; perhaps `attention_mask`, `position_ids` and `target`, all [B, T].
            length: L.
        """
        ids_BT: Tensor = batch["input_ids"]
        shape = ids_BT.shape
        mask, positions, target = (
            value if isinstance(value := batch.get(name), Tensor) and value.shape == shape else None
            for name in ("attention_mask", "position_ids", "target")
        )
        real_BT = torch.ones(shape, dtype=torch.bool, device=ids_BT.device) if mask is None else mask.bool()
        begins_BT = real_BT & ~F.pad(real_BT[:, :-1], (1, 0))
        if positions is not None:
            continues = positions[:, 1:] == positions[:, :-1] + 1
            begins_BT = begins_BT | real_BT & F.pad(~continues, (1, 0), value=True)
        document_N = begins_BT.flatten().cumsum(0) - 1
        real_N = real_BT.flatten()
        if positions is not None and mask is None and target is not None:
            targets_M = torch.zeros(int(document_N[-1]) + 1, dtype=torch.int64, device=ids_BT.device)
            targets_M.index_add_(0, document_N, (target.flatten() >= 0).to(torch.int64))
            real_N = targets_M[document_N] > 0
        position_N = torch.arange(real_N.numel(), device=ids_BT.device)
        first_N = torch.where(begins_BT.flatten(), position_N, 0).cummax(0).values
        opens_N = ((position_N - first_N) % length == 0) & real_N
        chunk_N = (opens_N.cumsum(0) - 1).clamp(min=0)
        size_C = torch.zeros(int(opens_N.sum()), dtype=torch.int64, device=ids_BT.device)
        if size_C.numel():
            size_C.index_add_(0, chunk_N, real_N.to(torch.int64))
        before_N = real_N.roll(1)
        before_N[0] = False
        return cls(~begins_BT.flatten() & real_N & before_N, real_N, chunk_N, size_C, length)
