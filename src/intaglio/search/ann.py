"""Approximate retrieval: an index beside each large segment, by usearch (dense, HNSW) or by Seismic (learned-sparse).

Both give candidates, which are scored exactly. Dimension letters: B queries, N rows, D width, K results.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from intaglio import atomic_io
from intaglio.errors import IntaglioError
from intaglio.search import dense
from intaglio.search.lexical import LexicalSearch, Postings

if TYPE_CHECKING:
    from numpy.typing import NDArray

MIN_ROWS = 20_000
"""Fewest rows of a segment with an approximate index; smaller ones are searched exactly."""
MIN_ALLOWED = 0.25
"""Least share of a segment's rows that a filter allows; below it, exact search is faster."""
EXPANSION = 128
"""(usearch) Least number of candidates during construction and search."""
QUERY_CUT, HEAP_FACTOR = 20, 0.8
"""(Seismic) Terms of a query whose lists are read, and the share of the k-th score that a block's bound must reach."""
MAX_SMALL_VOCABULARY = 1 << 16
"""(Seismic) Most terms of a segment in the format of 16-bit terms."""
PACKAGES = {"dense": ("usearch", "ann"), "sparse": ("seismic", "seismic")}
"""Package and extra of each kind of vectors."""


class Rows(Protocol):
    """A segment's vectors, with their approximate index."""

    @property
    def index(self) -> Any:
        """The opened index; None where the segment has none."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def exact(
        self, query: Any, k: int, mask: NDArray[np.uint8] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the scores and numbers of the best rows that a mask allows, in descending order."""

    def candidates(self, query: Any, count: int) -> NDArray[np.int64]:
        """Return about the best rows by the approximate index; fewer where it has no more."""

    def scores(self, query: Any, rows_K: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the exact scores of some rows."""


@dataclass(frozen=True)
class DenseRows:
    """Dense vectors with a usearch graph; a query is a vector [D]."""

    vectors_ND: NDArray[np.float32]
    index: Any = None

    def __len__(self) -> int:
        return len(self.vectors_ND)

    def build(self, file: Path) -> None:
        """Write the graph."""
        from usearch.index import Index as Graph

        graph = Graph(ndim=self.vectors_ND.shape[1], metric="ip", dtype="f32", expansion_add=EXPANSION)
        graph.add(np.arange(len(self), dtype=np.uint64), self.vectors_ND)
        graph.save(str(file))

    def opened(self, file: Path) -> DenseRows:
        """Return the rows with their graph, mapped from its file."""
        from usearch.index import Index as Graph

        graph = Graph.restore(str(file), view=True)
        if graph is None:
            raise OSError("it is no usearch index")
        return DenseRows(self.vectors_ND, graph)

    def exact(
        self, query: Any, k: int, mask: NDArray[np.uint8] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        return dense.search([self.vectors_ND], [mask], query[None], k)[0]

    def candidates(self, query: Any, count: int) -> NDArray[np.int64]:
        self.index.expansion_search = max(EXPANSION, 2 * count)
        rows_K: NDArray[np.int64] = self.index.search(query, count).keys.astype(np.int64)
        return rows_K

    def scores(self, query: Any, rows_K: NDArray[np.int64]) -> NDArray[np.float32]:
        scores_K: NDArray[np.float32] = self.vectors_ND[rows_K] @ query
        return scores_K


@dataclass(frozen=True)
class SparseRows:
    """Learned-sparse vectors with a Seismic index, held in memory; a query is the weight of each term by key."""

    postings: Postings
    size: int
    index: Any = None

    def __len__(self) -> int:
        return self.size

    @property
    def _large(self) -> bool:
        return len(self.postings.keys) > MAX_SMALL_VOCABULARY

    def build(self, file: Path) -> None:
        """Write the Seismic index; its terms are the segment's lists by number."""
        import seismic

        own = self.postings
        order = np.argsort(own.rows, kind="stable")
        slots_P = np.repeat(np.arange(len(own.keys)), np.diff(own.ptr))[order]
        ptr_N = np.concatenate([[0], np.cumsum(np.bincount(own.rows, minlength=self.size))]).astype(np.int64)
        rows = (seismic.SeismicDatasetLV if self._large else seismic.SeismicDataset)(dim=len(own.keys))
        rows.add_documents_by_id([str(row) for row in range(self.size)], slots_P, own.values[order], ptr_N)
        with _quiet():
            index = (seismic.SeismicIndexLV if self._large else seismic.SeismicIndex).build_from_dataset(rows)
            index.save(str(file))
        os.replace(f"{file}.index.seismic", file)

    def opened(self, file: Path) -> SparseRows:
        """Return the rows with their Seismic index, read from its file."""
        import seismic

        kind = seismic.SeismicIndexLV if self._large else seismic.SeismicIndex
        return SparseRows(self.postings, self.size, kind.load(str(file)))

    def exact(
        self, query: Any, k: int, mask: NDArray[np.uint8] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        return LexicalSearch([self.postings], [mask], [self.size], None).search(query, k)

    def candidates(self, query: Any, count: int) -> NDArray[np.int64]:
        from seismic import get_seismic_string

        slots_T, weights_T = self._lists(query)
        if not len(slots_T):
            return np.empty(0, np.int64)
        names_T = slots_T.astype(get_seismic_string())
        hits = self.index.search("", names_T, weights_T, count, QUERY_CUT, HEAP_FACTOR)
        return np.array([int(row) for _, _, row in hits], np.int64)

    def scores(self, query: Any, rows_K: NDArray[np.int64]) -> NDArray[np.float32]:
        scores_K = np.zeros(len(rows_K), np.float32)
        for slot, weight in zip(*self._lists(query), strict=True):
            scores_K += weight * self.postings.values_at(int(slot), rows_K)
        return scores_K

    def _lists(self, query: Mapping[int, float]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the lists of a query's terms and their weights."""
        slots_T = self.postings.find(np.fromiter(query, np.uint64, len(query)))
        weights_T = np.fromiter(query.values(), np.float32, len(query))
        return slots_T[slots_T >= 0], weights_T[slots_T >= 0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Discard the output that Seismic's builder prints past Python."""
    kept = [os.dup(stream) for stream in (1, 2)]
    with open(os.devnull, "wb") as nowhere:
        for stream in (1, 2):
            os.dup2(nowhere.fileno(), stream)
    try:
        yield
    finally:
        for stream, own in zip((1, 2), kept, strict=True):
            os.dup2(own, stream)
            os.close(own)


def check_installed(kind: str) -> None:
    """Refuse, in a sentence, if the package for dense or sparse vectors is missing."""
    package, extra = PACKAGES[kind]
    if find_spec(package) is None:
        raise IntaglioError(f"approximate search of {kind} vectors needs {package}: pip install 'intaglio[{extra}]'")


def _rows(arrays: Mapping[str, NDArray[Any]]) -> DenseRows | SparseRows:
    """Return a segment's vectors."""
    if "dense.vectors" in arrays:
        return DenseRows(arrays["dense.vectors"])
    return SparseRows(Postings.from_arrays(arrays, "sparse"), len(arrays["chunks"]))


def build(arrays: Mapping[str, NDArray[Any]], file: Path) -> None:
    """Write the approximate index of a segment's vectors."""
    partial = file.with_suffix(".partial")  # removed by the next writer if this one is killed
    _rows(arrays).build(partial)
    atomic_io.fsync_path(partial)
    os.replace(partial, file)


def load(arrays: Mapping[str, NDArray[Any]], file: Path) -> Rows:
    """Return a segment's vectors, with the approximate index if it has one."""
    rows = _rows(arrays)
    if not file.exists():
        return rows
    check_installed("dense" if isinstance(rows, DenseRows) else "sparse")
    try:
        return rows.opened(file)
    except (OSError, RuntimeError, ValueError) as error:
        raise IntaglioError(
            f"the approximate index {file} cannot be read; delete it, and `index compact --ann` builds it again"
        ) from error


def search(
    segments: Sequence[Rows], masks: Sequence[NDArray[np.uint8] | None], queries: Sequence[Any], k: int
) -> list[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Return, for each query, exact scores and positions (rows counted over all segments) of about the best rows.

    Args:
        segments: their vectors; one without an approximate index is searched exactly.
        masks: rows to consider, uint8 [N]; None for all.
        queries: vectors [D], or weights of terms by key.
        k: most rows for each query.
    """
    result = []
    for query in queries:
        base, scores, keys = 0, np.empty(0, np.float32), np.empty(0, np.int64)
        for rows, mask in zip(segments, masks, strict=True):
            exact = rows.index is None or (mask is not None and mask.mean() < MIN_ALLOWED)
            count = min(k, len(rows))
            own_scores, own = rows.exact(query, count, mask) if exact else _candidates(rows, query, count, mask)
            scores, keys = np.concatenate([scores, own_scores]), np.concatenate([keys, base + own])
            base += len(rows)
        order = np.lexsort((keys, -scores))[:k]
        result.append((scores[order], keys[order]))
    return result


def _candidates(
    rows: Rows, query: Any, k: int, mask: NDArray[np.uint8] | None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Do as `Rows.exact` by the approximate index, unless that has too few rows."""
    wanted = min(k if mask is None else 2 * k, len(rows))
    while True:
        rows_K = rows.candidates(query, wanted)
        exhausted = len(rows_K) < wanted
        if mask is not None:
            rows_K = rows_K[mask[rows_K] != 0]
        if len(rows_K) >= k or (wanted == len(rows) and not exhausted):
            break
        if exhausted:
            return rows.exact(query, k, mask)
        wanted = min(4 * wanted, len(rows))
    scores_K = rows.scores(query, rows_K)
    order = np.lexsort((rows_K, -scores_K))[:k]
    return scores_K[order], rows_K[order]


__all__ = ["MIN_ROWS", "build", "check_installed", "load", "search"]
