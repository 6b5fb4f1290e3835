"""Writing of documents: chunks, term frequencies and vectors of a segment, and its commit."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from intaglio.errors import IntaglioError, shorten
from intaglio.search.documents import Document, chunk_spans
from intaglio.search.encoders import TextEncoder
from intaglio.search.lexical import Analyzer, Postings
from intaglio.search.results import AddReport, Progress
from intaglio.search.storage import Store

if TYPE_CHECKING:
    from numpy.typing import NDArray

ENCODE_CHUNKS = 256
"""Chunks given to an encoder at a time."""


@dataclass(frozen=True)
class SegmentWriter:
    """Writes documents as segments; the writer's lock is held.

    Args:
        store: the index's directory.
        analyzer: of BM25; None without it.
        encoder: None without vectors.
        chunk: most characters of a chunk; 0 keeps documents whole.
        committed: called after each commit.
        space: number of the encoder, 0 before any upgrade. Default 0.
    """

    store: Store
    analyzer: Analyzer | None
    encoder: TextEncoder | None
    chunk: int
    committed: Callable[[], None]
    space: int = 0

    def write(
        self,
        documents: Iterable[Document],
        most: int,
        damaged: Sequence[tuple[int, int]],
        report: AddReport,
        progress: Progress | None,
    ) -> int:
        """Commit new and changed documents, at most about `most` characters at a time; return the number read.

        Documents with chunks in the ranges `damaged` are written again.

        Raises:
            IntaglioError: two different documents have the same id.
        """
        db, pending = self.store.db, dict[str, Document]()
        count = characters = 0
        # In a temporary file: the ids of a source may not fit in memory.
        db.execute("CREATE TEMP TABLE IF NOT EXISTS seen (id TEXT PRIMARY KEY) WITHOUT ROWID")
        db.execute("DELETE FROM seen")
        for count, document in enumerate(documents, start=1):
            if progress:
                progress(count, 0, "reading")
            if not document.text.strip():
                report.skipped.append(f"the document {shorten(document.id)!r} is empty")
                continue
            known = db.execute("SELECT number, digest FROM documents WHERE id = ?", (document.id,)).fetchone()
            waiting = pending.get(document.id)
            digest = waiting.digest if waiting else known[1] if known else None
            new = db.execute("INSERT OR IGNORE INTO seen VALUES (?)", (document.id,)).rowcount
            if not new and digest != document.digest:
                raise IntaglioError(
                    f"the id {shorten(document.id)!r} is that of two documents; ids must be unique (what was"
                    " committed before is kept)"
                )
            if digest == document.digest and (waiting or not self._overlaps(known[0], damaged)):
                report.unchanged += 1
                continue
            pending[document.id] = document
            characters += len(document.text)
            if characters >= most:
                self.flush(pending, report, progress)
                characters = 0
        if pending:
            self.flush(pending, report, progress)
        return count

    def _overlaps(self, document: int, ranges: Sequence[tuple[int, int]]) -> bool:
        """Return whether a chunk of a document lies in one of these ranges."""
        sql = "SELECT 1 FROM chunks WHERE document = ? AND chunk BETWEEN ? AND ?"
        return any(self.store.db.execute(sql, (document, *ends)).fetchone() for ends in ranges)

    def flush(self, pending: dict[str, Document], report: AddReport, progress: Progress | None) -> None:
        """Commit documents as one segment."""
        encoder, store, updated = self.encoder, self.store, 0
        too_long: Callable[[list[str]], list[bool]] | None = None
        if encoder is not None:
            counts, context = encoder.count_tokens, encoder.max_tokens
            too_long = lambda texts: [tokens > context for tokens in counts(texts)]  # noqa: E731
        spans = [chunk_spans(document.text, self.chunk, too_long) for document in pending.values()]
        texts = [d.text[a:b] for d, own in zip(pending.values(), spans, strict=True) for a, b in own]
        first = int(store.db.execute("SELECT value FROM settings WHERE key = 'next_chunk'").fetchone()[0])
        arrays: dict[str, NDArray[Any]] = {"chunks": np.arange(first, first + len(texts))}
        if self.analyzer:
            arrays |= Postings.from_texts(texts, self.analyzer).arrays("bm25")
        if encoder is not None:
            arrays |= encode_chunks(encoder, texts, progress) | space_arrays(self.space)
        row = store.write_segment(arrays)
        numbers = itertools.count(first)
        with store.transaction() as db:
            for document, own in zip(pending.values(), spans, strict=True):
                old = db.execute("SELECT number FROM documents WHERE id = ?", (document.id,)).fetchone()
                if old:
                    store.remove(old[0])
                    updated += 1
                content = document.text.encode()
                number = db.execute(
                    "INSERT INTO documents (id, title, metadata, digest, bytes, text) VALUES (?, ?, ?, ?, ?, ?)",
                    (document.id, document.title, document.metadata_json, document.digest, len(content),
                     zlib.compress(content, 3)),
                ).lastrowid  # fmt: skip
                db.executemany("INSERT INTO chunks VALUES (?, ?, ?, ?)", [(next(numbers), number, *s) for s in own])
            store.register(row)
            db.execute("UPDATE settings SET value = ? WHERE key = 'next_chunk'", (str(first + len(texts)),))
        report.added += len(pending) - updated
        report.updated += updated
        report.chunks += len(texts)
        pending.clear()
        self.committed()


def space_arrays(space: int) -> dict[str, NDArray[Any]]:
    """Return the array that names the encoder of a segment; none before any upgrade."""
    return {"space": np.array([space], np.int64)} if space else {}


def encode_chunks(encoder: TextEncoder, texts: Sequence[str], progress: Progress | None) -> dict[str, NDArray[Any]]:
    """Return the arrays of a segment with the vectors of some chunks."""
    parts: list[Any] = []
    for low in range(0, len(texts), ENCODE_CHUNKS):
        if progress:
            progress(low, len(texts), "encoding")
        parts.append(encoder.encode_documents(texts[low : low + ENCODE_CHUNKS]))
    if encoder.kind == "dense":
        vectors = np.concatenate([np.asarray(part, np.float32) for part in parts])
        if vectors.shape != (len(texts), encoder.dimensions) or not np.isfinite(vectors).all():
            raise IntaglioError(
                f"the encoder {encoder.name} gave vectors of shape {list(vectors.shape)}; finite numbers of shape"
                f" [{len(texts)}, {encoder.dimensions}] are accepted"
            )
        return {"dense.vectors": vectors}
    weights = np.concatenate([part.weights for part in parts])
    if not (np.isfinite(weights) & (weights > 0)).all():
        raise IntaglioError(f"the encoder {encoder.name} gave weights that are not positive and finite")
    ptr = np.concatenate([[0], np.cumsum(np.concatenate([np.diff(part.ptr) for part in parts]))])
    return Postings.from_vectors(ptr, np.concatenate([part.terms for part in parts]), weights).arrays("sparse")


__all__ = ["SegmentWriter", "encode_chunks", "space_arrays"]
