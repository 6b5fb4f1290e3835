"""Writing of documents: chunks, term frequencies and vectors of a segment, and its commit."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from intaglio.errors import IntaglioError
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
    """

    store: Store
    analyzer: Analyzer | None
    encoder: TextEncoder | None
    chunk: int

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
            arrays |= _encode(encoder, texts, progress)
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


def _encode(encoder: TextEncoder, texts: Sequence[str], progress: Progress | None) -> dict[str, NDArray[Any]]:
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


__all__ = ["SegmentWriter"]
