"""One generation of an index: its open segments and their searchers."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from intaglio.search import ann
from intaglio.search.lexical import BM25, LexicalSearch, Postings
from intaglio.search.storage import CorruptSegmentError, SegmentRow, Store

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass
class Segment:
    """An open segment with the mask of its live rows, uint8 [N] (None: all), and norms of prefixes by their width."""

    row: SegmentRow
    arrays: dict[str, NDArray[Any]]
    alive: NDArray[np.uint8] | None
    ann_file: Path
    norms: dict[int, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def space(self) -> int:
        """The number of the encoder of its vectors, 0 before any upgrade."""
        return int(self.arrays["space"][0]) if "space" in self.arrays else 0

    def prefix_norms(self, width: int) -> NDArray[np.float32]:
        """Return the norms of the first dimensions of the vectors, float32 [N]."""
        if width not in self.norms:
            self.norms[width] = np.linalg.norm(self.arrays["dense.vectors"][:, :width], axis=1).clip(1e-12)
        return self.norms[width]

    @property
    def live(self) -> NDArray[np.bool_]:
        """The mask of the live rows, bool [N]."""
        return np.ones(self.row.rows, np.bool_) if self.alive is None else self.alive != 0

    @cached_property
    def approximate(self) -> ann.Rows:
        """The vectors with their approximate index, if there is one."""
        return ann.load(self.arrays, self.ann_file)

    @cached_property
    def bm25(self) -> Postings:
        """The term frequencies."""
        return Postings.from_arrays(self.arrays, "bm25")

    @cached_property
    def sparse(self) -> Postings:
        """The learned-sparse vectors."""
        return Postings.from_arrays(self.arrays, "sparse")


class Snapshot:
    """The open segments of a generation.

    Args:
        generation: number of commits.
        segments: in order of chunks.
        damaged: a sentence for each corrupt segment.
        bm25: the weighting, if the index has BM25.
        space: number of the current encoder. Default 0.
        mixable: whether the first dimensions of its vectors can be compared with those of all others. Default True.
    """

    def __init__(
        self,
        generation: int,
        segments: list[Segment],
        damaged: dict[SegmentRow, str],
        bm25: BM25 | None,
        space: int = 0,
        mixable: bool = True,
    ) -> None:
        self.generation, self.segments, self.damaged, self._bm25 = generation, segments, damaged, bm25
        self.space, self.mixable = space, mixable
        self.sizes = [segment.row.rows for segment in segments]
        self.bases = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        self.alive = [segment.alive for segment in segments]
        self.masks: dict[str, list[NDArray[np.uint8]]] = {}

    @classmethod
    def read(cls, store: Store, bm25: BM25 | None, previous: Snapshot | None, tolerate_missing: bool) -> Snapshot:
        """Open the segments that `previous` does not hold.

        Raises:
            FileNotFoundError: a segment is missing, unless that is tolerated.
        """
        store.read_settings()
        known = {segment.row: segment for segment in previous.segments} if previous else {}
        dead, segments, damaged = store.dead(), [], {}
        for row in store.segments():
            try:
                arrays = known[row].arrays if row in known else store.read_segment(row)
            except (CorruptSegmentError, FileNotFoundError) as error:
                missing = isinstance(error, FileNotFoundError)
                if missing and not tolerate_missing:
                    raise
                damaged[row] = (
                    f"the segment {store.file(row.number)} is damaged ({'it is missing' if missing else error}): its "
                    f"{row.rows} chunks are left out until their documents are added again"
                )
                continue
            gone = dead[np.searchsorted(dead, row.first) : np.searchsorted(dead, row.last, side="right")]
            alive = (~member(arrays["chunks"], gone)).astype(np.uint8) if len(gone) else None
            norms = known[row].norms if row in known else {}
            segments.append(Segment(row, arrays, alive, store.ann_file(row.number), norms))
        space, mixable = store.settings.get("space", 0), store.settings.get("mixable", True)
        return cls(store.generation(), segments, damaged, bm25, space, mixable)

    @property
    def older(self) -> list[Segment]:
        """The segments whose vectors are of an earlier encoder."""
        return [segment for segment in self.segments if segment.space != self.space]

    @cached_property
    def lexical_bm25(self) -> LexicalSearch:
        """The BM25 searcher."""
        return LexicalSearch([segment.bm25 for segment in self.segments], self.alive, self.sizes, self._bm25)

    @cached_property
    def lexical_sparse(self) -> LexicalSearch:
        """The learned-sparse searcher."""
        return LexicalSearch([segment.sparse for segment in self.segments], self.alive, self.sizes, None)

    def lexical(self, name: str) -> LexicalSearch:
        """Return the searcher of "bm25" or "sparse"."""
        return self.lexical_bm25 if name == "bm25" else self.lexical_sparse

    def locate(self, position: int) -> tuple[int, int]:
        """Return the segment and row of a position (rows counted over all segments)."""
        segment = int(np.searchsorted(self.bases, position, side="right")) - 1
        return segment, int(position - self.bases[segment])

    def chunk(self, position: int) -> int:
        """Return the chunk at a position."""
        segment, row = self.locate(position)
        return int(self.segments[segment].arrays["chunks"][row])

    def apart(self, left: Segment, right: Segment) -> bool:
        """Return whether a corrupt segment lies between two segments, which then cannot be merged."""
        return any(left.row.last < row.first < right.row.first for row in self.damaged)


class Snapshots:
    """The current snapshot of an index, read again after a commit.

    Args:
        store: the index's directory.
        bm25: the weighting, if the index has BM25.
    """

    def __init__(self, store: Store, bm25: BM25 | None) -> None:
        self._store, self._bm25 = store, bm25
        self._current: Snapshot | None = None

    @contextlib.contextmanager
    def view(self) -> Iterator[Snapshot]:
        """Give the block one consistent view of database and segments; warn of newly damaged segments."""
        missing = -1
        while True:
            with self._store.reading():
                generation, previous = self._store.generation(), self._current
                if previous is None or previous.generation != generation:
                    try:
                        self._current = Snapshot.read(self._store, self._bm25, previous, missing == generation)
                    except FileNotFoundError:
                        # Unlinked by a compaction since this view began; if not, the next view is of this generation.
                        missing = generation
                        continue
                    for row, sentence in self._current.damaged.items():
                        if previous is None or row not in previous.damaged:
                            warnings.warn(sentence, stacklevel=4)
                assert self._current is not None
                yield self._current
                return

    def drop(self) -> None:
        """Close the current snapshot."""
        self._current = None


def member(values: NDArray[np.int64], members: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which values are among ascending members."""
    if not len(members):
        return np.zeros(len(values), np.bool_)
    result: NDArray[np.bool_] = members[np.minimum(np.searchsorted(members, values), len(members) - 1)] == values
    return result


__all__ = ["Segment", "Snapshot", "Snapshots", "member"]
