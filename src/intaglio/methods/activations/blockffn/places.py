"""Which tokens of a batch are neighbours and which lie in one chunk: documents are never mixed, padding never counted.

Dimension letters: B rows, T tokens of a row, N = B T, C chunks, L tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Places:
    """Where the tokens of a batch lie; documents are cut into chunks from their first token on, the last may be short.

    Args:
        follows_N: bool, whether a token has the one before it in its document.
        real_N: bool, False at padding.
        chunk_N: int64, the number of a token's chunk; of padding, any.
        size_C: tokens of each chunk, 1 to L.
        length: L.
    """

    follows_N: Tensor
    real_N: Tensor
    chunk_N: Tensor
    size_C: Tensor
    length: int

    @classmethod
    def of(cls, batch: Mapping[str, Any], length: int) -> Places:
        """Read them off a batch.

        A document begins where `position_ids` begin anew, and at the first token of a row. Padding is where
        `attention_mask` is 0; in packed rows, which have no mask, a document of which nothing is a `target`.

        Args:
            batch: `input_ids` [B, T]; perhaps `attention_mask`, `position_ids` and `target`, all [B, T].
            length: L.
        """
        ids_BT: Tensor = batch["input_ids"]
        like = ids_BT.shape
        mask, positions, target = (
            value if isinstance(value := batch.get(name), Tensor) and value.shape == like else None
            for name in ("attention_mask", "position_ids", "target")
        )
        real_BT = torch.ones(like, dtype=torch.bool, device=ids_BT.device) if mask is None else mask.bool()
        begins_BT = real_BT & ~_before(real_BT)
        if positions is not None:
            begins_BT = begins_BT | real_BT & _anew(positions)
        document_N = begins_BT.flatten().cumsum(0) - 1
        real_N = real_BT.flatten()
        if positions is not None and mask is None and target is not None:
            wanted_M = torch.zeros(int(document_N[-1]) + 1, dtype=torch.int64, device=ids_BT.device)
            wanted_M.index_add_(0, document_N, (target.flatten() >= 0).to(torch.int64))
            real_N = wanted_M[document_N] > 0
        place_N = torch.arange(real_N.numel(), device=ids_BT.device)
        first_N = torch.where(begins_BT.flatten(), place_N, 0).cummax(0).values
        opens_N = ((place_N - first_N) % length == 0) & real_N
        chunk_N = (opens_N.cumsum(0) - 1).clamp(min=0)
        size_C = torch.zeros(int(opens_N.sum()), dtype=torch.int64, device=ids_BT.device)
        if size_C.numel():
            size_C.index_add_(0, chunk_N, real_N.to(torch.int64))
        before_N = real_N.roll(1)
        before_N[0] = False
        return cls(~begins_BT.flatten() & real_N & before_N, real_N, chunk_N, size_C, length)


def _before(real_BT: Tensor) -> Tensor:
    """Whether the token before is real; there is none before the first."""
    return torch.nn.functional.pad(real_BT[:, :-1], (1, 0))


def _anew(position_BT: Tensor) -> Tensor:
    """Where positions do not go on from the token before."""
    goes_on = position_BT[:, 1:] == position_BT[:, :-1] + 1
    return torch.nn.functional.pad(~goes_on, (1, 0), value=True)


__all__ = ["Places"]
