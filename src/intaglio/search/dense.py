"""Exact dense retrieval: inner products in blocks of rows.

Dimension letters: B queries, N rows, D width, K results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK_SCORES = 4 << 20
"""Scores computed at a time."""


def search(
    segments: Sequence[NDArray[np.float32]],
    masks: Sequence[NDArray[np.uint8] | None],
    queries_BD: NDArray[np.float32],
    k: int,
    norms: Sequence[NDArray[np.float32]] | None = None,
) -> list[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Return, for each query, the scores and positions (rows counted over all segments) of the best rows.

    Args:
        segments: vectors, float32 [N, D] each.
        masks: rows to consider, uint8 [N]; None for all.
        queries_BD: the queries.
        k: most rows for each query.
        norms: by which the products are divided, float32 [N] each. Default: none.
    """
    lists: list[list[tuple[NDArray[np.float32], NDArray[np.int64]]]] = [[] for _ in queries_BD]
    base = 0
    for number, (vectors_ND, mask) in enumerate(zip(segments, masks, strict=True)):
        step = max(BLOCK_SCORES // max(len(queries_BD), 1), 1)
        for low in range(0, len(vectors_ND), step):
            block_ND = vectors_ND[low : low + step]
            # A matrix-vector product reads each row once, without the packing of a matrix product.
            scores_BN = (block_ND @ queries_BD[0])[None] if len(queries_BD) == 1 else queries_BD @ block_ND.T
            if norms is not None:
                scores_BN /= norms[number][low : low + step]
            if mask is not None:
                scores_BN[:, mask[low : low + step] == 0] = -np.inf
            for own, scores_N in zip(lists, scores_BN, strict=True):
                rows_K = _top(scores_N, k)
                own.append((scores_N[rows_K], base + low + rows_K))
        base += len(vectors_ND)
    result = []
    for own in lists:
        scores_S = np.concatenate([np.empty(0, np.float32), *(scores for scores, _ in own)])
        keys_S = np.concatenate([np.empty(0, np.int64), *(keys for _, keys in own)])
        best_K = np.lexsort((keys_S, -scores_S))[:k]
        result.append((scores_S[best_K], keys_S[best_K]))
    return result


def _top(scores_N: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Return the rows of the best finite scores in descending order, equal ones by row."""
    # The k-th greatest of the maxima of disjoint groups is at most the k-th score, and a maximum over strided groups is
    # cheaper than a partition of all scores.
    size = min(max(len(scores_N) // (4 * k), 1), 64)
    count = len(scores_N) // size
    cut = np.finfo(np.float32).min
    if count > k:
        maxima = scores_N[: size * count].reshape(size, count).max(axis=0)
        cut = max(cut, np.partition(maxima, -k)[-k])
    rows = np.flatnonzero(scores_N >= cut)
    return rows[np.lexsort((rows, -scores_N[rows]))[:k]]


__all__ = ["search"]
