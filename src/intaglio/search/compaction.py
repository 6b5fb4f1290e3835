"""Merging of segments: tiers during writes, all of them on request."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from intaglio.search import ann
from intaglio.search.lexical import Postings
from intaglio.search.results import Progress
from intaglio.search.snapshot import Segment, Snapshot
from intaglio.search.storage import SegmentRow, Store

if TYPE_CHECKING:
    from numpy.typing import NDArray

MERGE_FACTOR = 8
"""Adjacent segments of the same order of size that are merged."""
MERGE_BYTES = 512 << 20
"""Most bytes of segments merged in memory."""


@dataclass(frozen=True)
class Compaction:
    """Replaces adjacent segments by merged ones; the writer's lock is held.

    Args:
        store: the index's directory.
        view: gives one consistent view of database and segments.
    """

    store: Store
    view: Callable[[], AbstractContextManager[Snapshot]]

    def merge_all(self, progress: Progress | None) -> None:
        """Merge as many segments as fit in memory, and drop deleted rows."""
        self.drop_damaged()
        with self.view() as snapshot:
            segments = list(snapshot.segments)
        groups: list[list[Segment]] = []
        for segment in segments:
            last = groups[-1] if groups else []
            size = sum(other.row.bytes for other in last) + segment.row.bytes
            other_space = bool(last) and last[-1].space != segment.space
            if not last or size > MERGE_BYTES or other_space or snapshot.apart(last[-1], segment):
                groups.append([])
            groups[-1].append(segment)
        for number, group in enumerate(groups):
            if progress:
                progress(number, len(groups), "merging")
            if len(group) > 1 or group[0].alive is not None:
                self.merge(group)
        self.store.shrink()

    def build_approximate(self, progress: Progress | None) -> None:
        """Write the missing approximate indexes of large segments."""
        with self.view() as snapshot:
            large = [s for s in snapshot.segments if s.row.rows >= ann.MIN_ROWS and not s.ann_file.exists()]
        for number, segment in enumerate(large):
            if progress:
                progress(number, len(large), "building approximate indexes")
            ann.build(segment.arrays, segment.ann_file)

    def drop_damaged(self) -> None:
        """Drop corrupt segments without a live chunk."""
        count = "SELECT count(*) FROM dead WHERE chunk BETWEEN ? AND ?"
        with self.view() as snapshot:
            dead = {row: self.store.db.execute(count, (row.first, row.last)).fetchone()[0] for row in snapshot.damaged}
        if empty := [row for row, rows in dead.items() if rows >= row.rows]:
            self.replace(empty, [])

    def merge_tiers(self) -> None:
        """Merge runs of adjacent segments of the same order of size; those of an earlier encoder are left alone."""
        while True:
            with self.view() as snapshot:
                segments = list(snapshot.segments)
            run: list[Segment] = []
            for segment in segments:
                if segment.space != snapshot.space:
                    run = []
                    continue
                fits = run and _tier(run[-1]) == _tier(segment) and not snapshot.apart(run[-1], segment)
                run = [*run, segment] if fits else [segment]
                if len(run) == MERGE_FACTOR:
                    break
            if len(run) < MERGE_FACTOR or sum(segment.row.bytes for segment in run) > MERGE_BYTES:
                return
            self.merge(run)

    def merge(self, group: Sequence[Segment]) -> None:
        """Replace adjacent segments by one without their deleted rows."""
        arrays = self.arrays(group, [segment.live for segment in group])
        new = [self.store.write_segment(arrays)] if len(arrays["chunks"]) else []
        self.replace([segment.row for segment in group], new)

    def split(self, segment: Segment, rows: int) -> None:
        """Replace a segment by some of at most so many rows, without its deleted ones."""
        live = np.flatnonzero(segment.live)
        new = []
        for low in range(0, len(live), rows):
            mask = np.zeros(segment.row.rows, np.bool_)
            mask[live[low : low + rows]] = True
            new.append(self.store.write_segment(self.arrays([segment], [mask])))
        self.replace([segment.row], new)

    @staticmethod
    def arrays(group: Sequence[Segment], alive: Sequence[NDArray[np.bool_]]) -> dict[str, NDArray[Any]]:
        """Return the arrays of a segment of the rows of some, all of one encoder."""
        arrays: dict[str, NDArray[Any]] = {
            name: np.concatenate([s.arrays[name][live] for s, live in zip(group, alive, strict=True)])
            for name in ("chunks", "dense.vectors")
            if name in group[0].arrays
        }
        for name in ("bm25", "sparse"):
            if f"{name}.keys" in group[0].arrays:
                arrays |= Postings.merge([getattr(segment, name) for segment in group], alive).arrays(name)
        if "space" in group[0].arrays:
            arrays["space"] = group[0].arrays["space"]
        return arrays

    def replace(self, rows: Sequence[SegmentRow], new: Sequence[SegmentRow]) -> None:
        """Replace registered segments by written ones, in one commit."""
        with self.store.transaction() as db:
            for row in rows:
                db.execute("DELETE FROM segments WHERE number = ?", (row.number,))
                db.execute("DELETE FROM dead WHERE chunk BETWEEN ? AND ?", (row.first, row.last))
            for row in new:
                self.store.register(row)
        for row in rows:
            self.store.file(row.number).unlink(missing_ok=True)
            self.store.ann_file(row.number).unlink(missing_ok=True)


def _tier(segment: Segment) -> int:
    return int(math.log(segment.row.rows, MERGE_FACTOR))


__all__ = ["Compaction"]
