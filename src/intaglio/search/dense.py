"""Exact dense retrieval: inner products in blocks.

Dimension letters: B queries, N rows, D width, K results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK_BYTES = 16 << 20
"""Bytes of vectors multiplied at a time."""


def search(
    segments: Sequence[NDArray[np.float32]],
    masks: Sequence[NDArray[np.uint8] | None],
    queries_BD: NDArray[np.float32],
    k: int,
) -> list[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Return, for each query, the scores and positions (rows counted over all segments) of the best rows.

    Args:
        segments: vectors, float32 [N, D] each.
        masks: rows to consider, uint8 [N]; None for all.
        queries_BD: the queries.
        k: most rows for each query.
    """
    best_S, best_K = np.empty((len(queries_BD), 0), np.float32), np.empty((len(queries_BD), 0), np.int64)
    base = 0
    for vectors_ND, mask in zip(segments, masks, strict=True):
        step = max(BLOCK_BYTES // max(4 * vectors_ND.shape[1], 1), 1)
        for low in range(0, len(vectors_ND), step):
            block_ND = vectors_ND[low : low + step]
            # A matrix-vector product reads each row once, without the packing of a matrix product.
            scores_BN = (block_ND @ queries_BD[0])[None] if len(queries_BD) == 1 else queries_BD @ block_ND.T
            if mask is not None:
                scores_BN[:, mask[low : low + step] == 0] = -np.inf
            # A row below the k-th best so far cannot enter; usually that is all of a block.
            if best_S.shape[1] == k and not (scores_BN > best_S[:, -1:]).any():
                continue
            top_S, top_K = _top(scores_BN, np.arange(base + low, base + low + len(block_ND)), k)
            best_S, best_K = _top(np.hstack([best_S, top_S]), np.hstack([best_K, top_K]), k)
        base += len(vectors_ND)
    return [(s[np.isfinite(s)], keys[np.isfinite(s)]) for s, keys in zip(best_S, best_K, strict=True)]


def _top(
    scores_BN: NDArray[np.float32], keys_BN: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the best scores with their keys in descending order, equal ones by key."""
    keys_BN = np.broadcast_to(keys_BN, scores_BN.shape)
    if scores_BN.shape[1] > k:
        # Every row above the k-th score, then the first of those equal to it.
        cut_B1 = np.partition(scores_BN, -k, axis=1)[:, -k : -k + 1 or None]
        picks = []
        for scores_N, keys_N, cut in zip(scores_BN, keys_BN, cut_B1[:, 0], strict=True):
            above = np.flatnonzero(scores_N >= cut)
            order = np.lexsort((keys_N[above], -scores_N[above]))[:k]
            picks.append(above[order])
        index_BK = np.stack(picks)
    else:
        index_BK = np.lexsort((keys_BN, -scores_BN), axis=1)
    return np.take_along_axis(scores_BN, index_BK, 1), np.take_along_axis(keys_BN, index_BK, 1)


__all__ = ["search"]
