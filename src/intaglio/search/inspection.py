"""The description of an index."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from intaglio.search.encoders import describe_setting
from intaglio.search.snapshot import Snapshot
from intaglio.search.storage import DATABASE, CorruptSegmentError, Store


def describe(store: Store, snapshot: Snapshot, verify: bool) -> dict[str, Any]:
    """Return the content of `Index.info`."""
    db, settings, damaged = store.db, store.settings, list(snapshot.damaged.values())
    if verify:
        for segment in snapshot.segments:
            try:
                store.read_segment(segment.row, verify=True)
            except (CorruptSegmentError, OSError) as error:
                damaged.append(f"the segment {store.file(segment.row.number)} is damaged ({error})")
    documents, text = db.execute("SELECT count(*), coalesce(sum(bytes), 0) FROM documents").fetchone()
    files = [store.path / name for name in (DATABASE, f"{DATABASE}-wal")]
    database = sum(file.stat().st_size for file in files if file.exists())
    rows = store.segments()
    approximate = [file for file in (store.ann_file(row.number) for row in rows) if file.exists()]
    held = sum(row.bytes for row in rows) + sum(file.stat().st_size for file in approximate)
    return {
        "path": str(store.path),
        "version": settings["version"],
        "kind": settings["kind"],
        "documents": documents,
        "chunks": db.execute("SELECT count(*) FROM chunks").fetchone()[0],
        "deleted": db.execute("SELECT count(*) FROM dead").fetchone()[0],
        "segments": len(rows),
        "approximate": len(approximate),
        "bytes": {"text": text, "database": database, "segments": held, "total": database + held},
        "vectors": _vectors(settings, snapshot),
        "upgrade": settings.get("upgrade"),
        "encoder": settings["encoder"],
        "bm25": settings["bm25"],
        "chunk": settings["chunk"],
        "damaged": damaged,
    }


def _vectors(settings: Mapping[str, Any], snapshot: Snapshot) -> dict[str, dict[str, int]]:
    """Return the number of segments and of their live chunks by encoder."""
    current = {str(snapshot.space): settings["encoder"]} if settings["encoder"] else {}
    known = {**settings.get("spaces", {}), **current}
    counts: dict[str, dict[str, int]] = {}
    for segment in snapshot.segments:
        if known:
            own = counts.setdefault(describe_setting(known[str(segment.space)]), {"segments": 0, "chunks": 0})
            own["segments"] += 1
            own["chunks"] += int(segment.live.sum())
    return counts


__all__ = ["describe"]
