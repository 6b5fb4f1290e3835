"""Approximate dense retrieval: a usearch graph (HNSW) beside each large segment.

Dimension letters: B queries, N rows, D width, K results.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from intaglio import atomic_io
from intaglio.errors import IntaglioError
from intaglio.search import dense

if TYPE_CHECKING:
    from numpy.typing import NDArray

MIN_ROWS = 20_000
"""Fewest rows of a segment with a graph; smaller ones are searched exactly."""
EXPANSION = 128
"""Least number of candidates during construction and search."""
MIN_ALLOWED = 0.25
"""Least share of a segment's rows that a filter allows; below it, the exact product is faster."""


def check_installed() -> None:
    """Refuse, in a sentence, if usearch is missing."""
    if find_spec("usearch") is None:
        raise IntaglioError("approximate search needs usearch: pip install 'intaglio[ann]'")


def build(vectors_ND: NDArray[np.float32], file: Path) -> None:
    """Write the graph of a segment's vectors."""
    from usearch.index import Index as Graph

    graph = Graph(ndim=vectors_ND.shape[1], metric="ip", dtype="f32", expansion_add=EXPANSION)
    graph.add(np.arange(len(vectors_ND), dtype=np.uint64), vectors_ND)
    partial = file.with_suffix(".partial")  # removed by the next writer if this one is killed
    graph.save(str(partial))
    atomic_io.fsync_path(partial)
    os.replace(partial, file)


def load(file: Path) -> Any:
    """Map a graph, or return None where there is none."""
    if not file.exists():
        return None
    check_installed()
    from usearch.index import Index as Graph

    graph = Graph.restore(str(file), view=True)
    if graph is None:
        raise IntaglioError(f"the graph {file} cannot be read; `intaglio index compact` with --ann builds it again")
    return graph


def search(
    segments: Sequence[tuple[NDArray[np.float32], Any]],
    masks: Sequence[NDArray[np.uint8] | None],
    queries_BD: NDArray[np.float32],
    k: int,
) -> list[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Do as `dense.search`, by graph where a segment (vectors, graph or None) has one."""
    result = []
    for query_D in queries_BD:
        base, scores, keys = 0, np.empty(0, np.float32), np.empty(0, np.int64)
        for (vectors_ND, graph), mask in zip(segments, masks, strict=True):
            if graph is None or (mask is not None and mask.mean() < MIN_ALLOWED):
                ((own_scores, rows),) = dense.search([vectors_ND], [mask], query_D[None], k)
            else:
                own_scores, rows = _search_graph(graph, vectors_ND, mask, query_D, k)
            scores, keys = np.concatenate([scores, own_scores]), np.concatenate([keys, base + rows])
            base += len(vectors_ND)
        order = np.lexsort((keys, -scores))[:k]
        result.append((scores[order], keys[order]))
    return result


def _search_graph(
    graph: Any, vectors_ND: NDArray[np.float32], mask: NDArray[np.uint8] | None, query_D: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return exact scores and rows of about the best k rows that a mask allows, in descending order."""
    N = len(vectors_ND)
    wanted = min(k if mask is None else 2 * k, N)
    while True:
        graph.expansion_search = max(EXPANSION, 2 * wanted)
        rows_K = graph.search(query_D, wanted).keys.astype(np.int64)
        if mask is not None:
            rows_K = rows_K[mask[rows_K] != 0]
        if len(rows_K) >= k or wanted == N:
            break
        wanted = min(4 * wanted, N)
    scores_K = vectors_ND[rows_K] @ query_D
    order = np.lexsort((rows_K, -scores_K))[:k]
    return scores_K[order], rows_K[order]


__all__ = ["MIN_ROWS", "build", "check_installed", "load", "search"]
