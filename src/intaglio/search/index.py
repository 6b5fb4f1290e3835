"""The search index: create, open, add, delete, search, compact."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from intaglio.errors import IntaglioError, shorten
from intaglio.search import dense, fusion
from intaglio.search import filters as conditions
from intaglio.search.documents import Document, chunk_spans, read_documents
from intaglio.search.encoders import (
    SparseVectors,
    TextEncoder,
    check_space,
    describe_encoder,
    describe_setting,
    resolve_encoder,
)
from intaglio.search.lexical import BM25, Analyzer, Postings, check_installed, term_key
from intaglio.search.snapshot import Segment, Snapshot, member
from intaglio.search.storage import DATABASE, CorruptSegmentError, SegmentRow, Store, sentences

if TYPE_CHECKING:
    from numpy.typing import NDArray

Kind = Literal["bm25", "dense", "sparse", "hybrid"]
Filters = Mapping[str, Any] | Sequence[str]
"""`{"field": value}` (equality), or conditions such as `year>=2020`, `type=md`, `title~=mask` (substring)."""
Progress = Callable[[int, int, str], None]
KINDS = ("bm25", "dense", "sparse", "hybrid")
DEFAULT_ENCODER = {"dense": "minilm", "hybrid": "minilm", "sparse": "splade-tiny"}
BATCH_CHUNKS, BATCH_CHARACTERS = 4096, 32 << 20
"""Chunks (with an encoder) and characters of a commit of `add`."""
ENCODE_CHUNKS = 256
"""Chunks given to an encoder at a time."""
MERGE_FACTOR = 8
"""Adjacent segments of the same order of size that are merged."""
MERGE_BYTES = 512 << 20
"""Most bytes of segments merged in memory."""
FUSION_DEPTH = 100
"""Fewest documents of each retriever that are fused."""


@dataclass(frozen=True)
class Hit:
    """A document that matches a query, with its best chunk.

    Args:
        id: the document's id.
        score: BM25 score, inner product, or reciprocal-rank sum; higher is better.
        rank: 1 for the best.
        title: the document's title, possibly "".
        text: the text of the best chunk.
        start: offset of the chunk in the document, in characters.
        metadata: the document's metadata.
        spans: (start, stop) of the query's words in `text` (BM25 and sparse), in characters.
        terms: weight of each matching term, in descending order (sparse: query weight times document weight; BM25: its
            share of the score); empty for dense. Only with `explain=True`.
        parts: for each retriever of a hybrid index, {"rank", "score"}; e.g. {"bm25": {"rank": 2, "score": 7.1}}. Only
            with `explain=True`.
    """

    id: str
    score: float
    rank: int
    title: str
    text: str
    start: int
    metadata: dict[str, Any]
    spans: tuple[tuple[int, int], ...] = ()
    terms: dict[str, float] = field(default_factory=dict)
    parts: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass
class AddReport:
    """Counts of an `add`.

    Args:
        added: new documents.
        updated: documents whose id was known and whose content or metadata differ.
        unchanged: documents that were in the index already.
        chunks: chunks written.
        skipped: a sentence for each skipped file or empty document.
        seconds: duration.
    """

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    chunks: int = 0
    skipped: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Index:
    """A search index in a directory; use `Index.create` or `Index.open`, and as a context manager.

    Attributes:
        path: the directory.
        kind: "bm25", "dense", "sparse" or "hybrid".
    """

    path: Path
    kind: Kind

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        kind: Kind = "bm25",
        encoder: str | os.PathLike[str] | TextEncoder | None = None,
        chunk: int = 2000,
        language: str = "english",
        k1: float = 1.5,
        b: float = 0.75,
        exist_ok: bool = False,
        **encoder_options: Any,
    ) -> Index:
        """Create an empty index.

        Args:
            path: the directory; it must not exist or be empty.
            kind: "bm25", "dense", "sparse", or "hybrid" (BM25 with `encoder`, by reciprocal rank fusion). Default
                "bm25".
            encoder: a bundled name (`minilm`, `splade-tiny`), a checkpoint directory, or a `TextEncoder`. Default: none
                for bm25, `minilm` for dense and hybrid, `splade-tiny` for sparse.
            chunk: most characters of a chunk; 0 keeps documents whole. Chunks are cut at blank lines where possible,
                and further where they exceed the encoder's context. Default 2000.
            language: Snowball stemmer of BM25, or "none". Default "english".
            k1: term-frequency saturation of BM25. Default 1.5.
            b: length normalisation of BM25. Default 0.75.
            exist_ok: open an index of the same settings that is there already (resumes a killed `index`). Default
                False.
            encoder_options: `pooling` ("mean", "cls", "last", "splade"), `query_prompt`, `document_prompt`, `device`,
                `batch_size`.

        Raises:
            IntaglioError: the directory is in use, or an option does not fit the kind.
        """
        path = Path(path)
        if kind not in KINDS:
            raise IntaglioError(f"kind is {kind!r}; accepted: {', '.join(KINDS)}")
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 0 or 0 < chunk < 50:
            raise IntaglioError(f"chunk is {chunk!r}; accepted: 0 (whole documents) or at least 50 characters")
        if not (k1 >= 0 and math.isfinite(k1)) or not 0 <= b <= 1:
            raise IntaglioError(f"k1 is {k1} and b is {b}; accepted: k1 of at least 0, b between 0 and 1")
        settings: dict[str, Any] = {"kind": kind, "chunk": chunk, "bm25": None, "encoder": None}
        loaded: TextEncoder | None = None
        if kind in ("bm25", "hybrid"):
            Analyzer(language)
            settings["bm25"] = {"language": language, "k1": k1, "b": b}
        if kind == "sparse":
            check_installed()
        if kind == "bm25":
            if encoder is not None or encoder_options:
                raise IntaglioError("a bm25 index has no encoder; one of kind dense, sparse or hybrid has")
        else:
            loaded = resolve_encoder(encoder or DEFAULT_ENCODER[kind], encoder_options)
            if kind in ("dense", "sparse") and loaded.kind != kind:
                raise IntaglioError(f"the encoder {loaded.name!r} is {loaded.kind}, but the index is to be {kind}")
            settings["encoder"] = describe_encoder(loaded)
        if not (exist_ok and (path / DATABASE).is_file()):
            Store.create(path, {**settings, "next_chunk": 1})
        index = cls(path, loaded, check_encoder=False)
        for key, value in settings.items():
            known = index._store.settings[key]
            if _space(known) != _space(value):
                index.close()
                raise IntaglioError(
                    f"the index {path} has {key} {describe_setting(known)} instead of {describe_setting(value)};"
                    " name another directory"
                )
        return index

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        encoder: str | os.PathLike[str] | TextEncoder | None = None,
        device: str | None = None,
    ) -> Index:
        """Open an index for searching and writing.

        The encoder is loaded at the first query or `add`, and refused if its fingerprint differs from the index's.

        Args:
            path: the directory.
            encoder: the same encoder under another path, or an object. Default: the recorded name or directory.
            device: device of the encoder. Default: the CPU.

        Raises:
            IntaglioError: no index is there, or it is of another version.
        """
        loaded = None if encoder is None or isinstance(encoder, (str, os.PathLike)) else encoder
        index = cls(Path(path), loaded, device)
        if isinstance(encoder, (str, os.PathLike)):
            index._encoder_name = os.fspath(encoder)
        return index

    def __init__(
        self, path: Path, encoder: TextEncoder | None = None, device: str | None = None, check_encoder: bool = True
    ) -> None:
        self.path = path
        self._store = Store(path)
        self.kind = self._store.settings["kind"]
        self._bm25: dict[str, Any] | None = self._store.settings["bm25"]
        self._chunk: int = self._store.settings["chunk"]
        self._encoder_name: str | None = None
        self._device = device
        self._given, self._loaded = encoder, None if check_encoder else encoder
        self._analyzer_loaded: Analyzer | None = None
        self._snapshot: Snapshot | None = None
        self._lock = threading.RLock()
        if encoder is not None:
            self._encoder()

    def add(
        self,
        documents: str | os.PathLike[str] | Iterable[Document | Mapping[str, Any]],
        *,
        text_field: str = "text",
        id_field: str = "id",
        progress: Callable[[int, int, str], None] | None = None,
    ) -> AddReport:
        """Add documents, or update those whose id is known.

        Commits every few thousand chunks; an `add` that was killed resumes when repeated, since committed documents are
        unchanged.

        Args:
            documents: a folder, a `.jsonl` or `.csv` file, another text file, `user/name[:split]` of the hub, or
                `Document`s or mappings with "text" and optionally "id", "title" and further metadata.
            text_field: the text's name in JSONL, CSV and data sets. Default "text".
            id_field: the id's name there; documents without an id are identified by their content. Default "id".
            progress: called with (done, total, what); total is 0 where it is unknown.

        Returns:
            The counts; `skipped` names files that are not text.

        Raises:
            IntaglioError: nothing to index, a duplicate id, a malformed line, a full disk, another writer. Documents
                committed before stay.
        """
        started, report = time.perf_counter(), AddReport()
        pending: dict[str, Document] = {}
        characters = count = 0
        most = min(BATCH_CHARACTERS, BATCH_CHUNKS * (self._chunk or 2000)) if self._encoder() else BATCH_CHARACTERS
        with self._lock, self._store.writing():
            db = self._store.db
            # In a temporary file: the ids of a source may not fit in memory.
            db.execute("CREATE TEMP TABLE IF NOT EXISTS seen (id TEXT PRIMARY KEY) WITHOUT ROWID")
            db.execute("DELETE FROM seen")
            with self._view() as snapshot:
                damaged = [(row.first, row.last) for row in snapshot.damaged]
            for document in read_documents(documents, text_field=text_field, id_field=id_field, skipped=report.skipped):
                count += 1
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
                    self._flush(pending, report, progress)
                    self._merge_tiers()
                    characters = 0
            if pending:
                self._flush(pending, report, progress)
            if not count and not report.skipped:
                raise IntaglioError("there is no document to index")
            self._merge_tiers()
        report.seconds = time.perf_counter() - started
        return report

    def _overlaps(self, document: int, ranges: Sequence[tuple[int, int]]) -> bool:
        """Return whether a chunk of a document lies in one of these ranges."""
        sql = "SELECT 1 FROM chunks WHERE document = ? AND chunk BETWEEN ? AND ?"
        return any(self._store.db.execute(sql, (document, *ends)).fetchone() for ends in ranges)

    def _flush(self, pending: dict[str, Document], report: AddReport, progress: Progress | None) -> None:
        """Commit documents as one segment."""
        encoder, store, updated = self._encoder(), self._store, 0
        too_long: Callable[[list[str]], list[bool]] | None = None
        if encoder is not None:
            counts, context = encoder.count_tokens, encoder.max_tokens
            too_long = lambda texts: [tokens > context for tokens in counts(texts)]  # noqa: E731
        spans = [chunk_spans(document.text, self._chunk, too_long) for document in pending.values()]
        texts = [d.text[a:b] for d, own in zip(pending.values(), spans, strict=True) for a, b in own]
        first = int(store.db.execute("SELECT value FROM settings WHERE key = 'next_chunk'").fetchone()[0])
        arrays: dict[str, NDArray[Any]] = {"chunks": np.arange(first, first + len(texts))}
        if self._bm25:
            arrays |= Postings.from_texts(texts, self._analyzer()).arrays("bm25")
        if encoder is not None:
            arrays |= _encode(encoder, texts, progress)
        row = store.write_segment(arrays)
        numbers = itertools.count(first)
        with store.transaction() as db:
            for document, own in zip(pending.values(), spans, strict=True):
                old = db.execute("SELECT number FROM documents WHERE id = ?", (document.id,)).fetchone()
                if old:
                    self._remove(old[0])
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

    def _remove(self, document: int) -> None:
        """Delete a document, inside a transaction."""
        db = self._store.db
        db.execute("INSERT INTO dead SELECT chunk FROM chunks WHERE document = ?", (document,))
        db.execute("DELETE FROM chunks WHERE document = ?", (document,))
        db.execute("DELETE FROM documents WHERE number = ?", (document,))

    def delete(self, ids: Iterable[str] | None = None, *, filters: Filters | None = None) -> int:
        """Delete documents by id or by metadata, and return their number.

        Raises:
            IntaglioError: an id is unknown (nothing is deleted then), or another writer is active.
        """
        if ids is None and not filters:
            raise IntaglioError("nothing to delete was named; give ids or a filter")
        with self._lock, self._store.writing():
            db = self._store.db
            numbers = []
            for identity in dict.fromkeys(ids or ()):
                row = db.execute("SELECT number FROM documents WHERE id = ?", (identity,)).fetchone()
                if row is None:
                    name = shorten(str(identity))
                    raise IntaglioError(f"no document of {self.path} has the id {name!r}; nothing was deleted")
                numbers.append(row[0])
            if filters:
                where, parameters = conditions.to_sql(filters)
                chosen = {row[0] for row in db.execute(f"SELECT number FROM documents WHERE {where}", parameters)}
                numbers = sorted(chosen) if ids is None else [number for number in numbers if number in chosen]
            if numbers:
                with self._store.transaction():
                    for number in numbers:
                        self._remove(number)
        return len(numbers)

    def search(
        self,
        query: str,
        k: int = 10,
        *,
        filters: Filters | None = None,
        explain: bool = False,
        mode: Kind | None = None,
    ) -> list[Hit]:
        """Return the best documents for a query; exact for every kind.

        Args:
            query: the words.
            k: most hits. Default 10.
            filters: conditions on metadata; see `Filters`.
            explain: fill in `Hit.terms` and `Hit.parts`. Default False.
            mode: for a hybrid index, use only this retriever. Default: the index's kind.

        Returns:
            At most k hits in descending order of score; equal scores in the order of addition.

        Raises:
            IntaglioError: an empty query, a query beyond the encoder's context, an encoder that changed, a bad filter.
        """
        return self.search_many([query], k, filters=filters, explain=explain, mode=mode)[0]

    def search_many(
        self,
        queries: Sequence[str],
        k: int = 10,
        *,
        filters: Filters | None = None,
        explain: bool = False,
        mode: Kind | None = None,
    ) -> list[list[Hit]]:
        """Search for several queries; as `search`, encoding them together."""
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise IntaglioError(f"k is {k!r}; an integer of at least 1 is accepted")
        for query in queries:
            if not isinstance(query, str) or not query.strip():
                raise IntaglioError("the query is empty; give at least one word")
        names = self._retrievers(mode)
        with self._lock, sentences(self.path):
            encoded = {name: self._encode_queries(name, queries) for name in names}
            with self._view() as snapshot:
                allowed = self._allowed(snapshot, filters) if filters else None
                depth = k if len(names) == 1 else max(FUSION_DEPTH, 4 * k)
                ranked = {name: self._rank(snapshot, name, encoded[name], depth, allowed) for name in names}
                return [
                    self._hits(
                        snapshot, query, k, {name: ranked[name][i] for name in names},
                        {name: encoded[name][i] for name in names}, explain,
                    )
                    for i, query in enumerate(queries)
                ]  # fmt: skip

    def _retrievers(self, mode: Kind | None) -> list[str]:
        """Return the retrievers to search: bm25, dense, sparse."""
        own = ["bm25"] if self._bm25 else []
        if self._store.settings["encoder"]:
            own.append(self._store.settings["encoder"]["kind"])
        if mode is None or mode == self.kind:
            return own
        if mode not in own:
            raise IntaglioError(f"mode is {mode!r}; the index {self.path} has: {', '.join(own)}")
        return [mode]

    def _encode_queries(self, name: str, queries: Sequence[str]) -> Any:
        """Return the term weights by key of each query, or the vectors [B, D]."""
        if name == "bm25":
            keys = [[term_key(term) for term in self._analyzer().terms(query)] for query in queries]
            return [{key: float(own.count(key)) for key in dict.fromkeys(own)} for own in keys]
        encoder = self._encoder()
        assert encoder is not None
        for query, count in zip(queries, encoder.count_tokens(queries, query=True), strict=True):
            if count > encoder.max_tokens:
                raise IntaglioError(
                    f"the query {shorten(query)!r} has {count} tokens; the encoder {encoder.name} reads"
                    f" {encoder.max_tokens}"
                )
        vectors = encoder.encode_queries(queries)
        return list(vectors.rows()) if isinstance(vectors, SparseVectors) else np.asarray(vectors, np.float32)

    def _rank(
        self, snapshot: Snapshot, name: str, queries: Any, depth: int, allowed: list[NDArray[np.uint8]] | None
    ) -> list[list[tuple[int, int, float]]]:
        """Return (document, position of its best chunk, score) of the best documents for each query."""

        def search(batch: Any, k: int) -> list[tuple[Any, Any]]:
            if name == "dense":
                vectors = [segment.arrays["dense.vectors"] for segment in snapshot.segments]
                return dense.search(vectors, allowed or snapshot.alive, batch, k)
            return [snapshot.lexical(name).search(terms, k, allowed) for terms in batch]

        result, rows = [], max(int(snapshot.bases[-1]), 1)
        for i, (scores, positions) in enumerate(search(queries, min(depth, rows))):
            k = min(depth, rows)
            while True:
                best: dict[int, tuple[int, int, float]] = {}
                for score, position in zip(scores.tolist(), positions.tolist(), strict=True):
                    sql = "SELECT document FROM chunks WHERE chunk = ?"
                    (document,) = self._store.db.execute(sql, (snapshot.chunk(position),)).fetchone()
                    best.setdefault(document, (document, position, score))
                if len(best) >= depth or len(scores) < k or k == rows:
                    break
                k = min(4 * k, rows)  # several chunks were of the same documents
                ((scores, positions),) = search(queries[i : i + 1], k)
            result.append(list(best.values())[:depth])
        return result

    def _hits(
        self,
        snapshot: Snapshot,
        query: str,
        k: int,
        ranked: Mapping[str, list[tuple[int, int, float]]],
        encoded: Mapping[str, Any],
        explain: bool,
    ) -> list[Hit]:
        """Fuse rankings and describe the best documents."""
        if len(ranked) == 1:
            (only,) = ranked.values()
            best = [(document, score) for document, _, score in only[:k]]
        else:
            best = fusion.reciprocal_rank({name: [row[0] for row in own] for name, own in ranked.items()}, k)
        places = {
            name: {document: (rank, position, score) for rank, (document, position, score) in enumerate(own, 1)}
            for name, own in ranked.items()
        }
        words, hits = self._query_words(query, encoded), []
        for rank, (document, score) in enumerate(best, 1):
            own = {name: place[document] for name, place in places.items() if document in place}
            position = min(own.values())[1]  # of the retriever that ranks it highest
            identity, title, metadata, content, start, stop = self._store.db.execute(
                "SELECT id, title, metadata, text, start, stop FROM chunks JOIN documents ON document = number"
                " WHERE chunk = ?",
                (snapshot.chunk(position),),
            ).fetchone()
            text = zlib.decompress(content).decode()[start:stop]
            spans = self._spans(text, words)
            terms = self._terms(snapshot, position, encoded, words) if explain else {}
            parts = {name: {"rank": float(r), "score": s} for name, (r, _, s) in own.items()} if explain else {}
            hits.append(Hit(identity, score, rank, title, text, start, json.loads(metadata), spans, terms, parts))
        return hits

    def _query_words(self, query: str, encoded: Mapping[str, Any]) -> dict[str, dict[int, str]]:
        """Return the words of the query's terms by key, for each lexical retriever."""
        result = {}
        if "bm25" in encoded:
            result["bm25"] = {term_key(term): term for term in self._analyzer().terms(query)}
        if "sparse" in encoded:
            encoder = self._encoder()
            assert encoder is not None
            result["sparse"] = {term: encoder.term(term) for term in encoded["sparse"]}
        return result

    def _spans(self, text: str, words: Mapping[str, Mapping[int, str]]) -> tuple[tuple[int, int], ...]:
        """Return where a text's words are terms of the query."""
        spans = set(self._analyzer().spans(text, set(words["bm25"].values()))) if "bm25" in words else set()
        if "sparse" in words:
            known = set(words["sparse"].values())
            spans |= {match.span() for match in re.finditer(r"\w+", text) if match[0].lower() in known}
        return tuple(sorted(spans))

    def _terms(
        self, snapshot: Snapshot, position: int, encoded: Mapping[str, Any], words: Mapping[str, Mapping[int, str]]
    ) -> dict[str, float]:
        """Return what each matching term adds to the score of a row."""
        weights: dict[str, float] = {}
        for name, own in words.items():
            for key, weight in snapshot.lexical(name).explain(encoded[name], *snapshot.locate(position)).items():
                weights[own[key]] = weights.get(own[key], 0.0) + weight
        return dict(sorted(weights.items(), key=lambda pair: -pair[1]))

    def _allowed(self, snapshot: Snapshot, filters: Filters) -> list[NDArray[np.uint8]]:
        """Return the mask of the rows that pass a filter, for each segment."""
        where, parameters = conditions.to_sql(filters)
        key = json.dumps([where, parameters])
        if key not in snapshot.masks:
            sql = f"SELECT chunk FROM documents JOIN chunks ON document = number WHERE {where} ORDER BY chunk"
            chunks = np.fromiter((row[0] for row in self._store.db.execute(sql, parameters)), np.int64)
            masks = [member(segment.arrays["chunks"], chunks).astype(np.uint8) for segment in snapshot.segments]
            snapshot.masks = {key: masks}
        return snapshot.masks[key]

    @contextlib.contextmanager
    def _view(self) -> Iterator[Snapshot]:
        """Give the block one consistent view of database and segments."""
        missing = -1
        while True:
            with self._store.reading():
                generation, previous = self._store.generation(), self._snapshot
                if previous is None or previous.generation != generation:
                    bm25 = BM25(self._bm25["k1"], self._bm25["b"]) if self._bm25 else None
                    try:
                        self._snapshot = Snapshot.read(self._store, bm25, previous, missing == generation)
                    except FileNotFoundError:
                        # Unlinked by a compaction since this view began; if not, the next view is of this generation.
                        missing = generation
                        continue
                    for row, sentence in self._snapshot.damaged.items():
                        if previous is None or row not in previous.damaged:
                            warnings.warn(sentence, stacklevel=4)
                assert self._snapshot is not None
                yield self._snapshot
                return

    @property
    def damaged(self) -> list[str]:
        """A sentence for each corrupt segment; the others stay searchable."""
        with self._lock, sentences(self.path), self._view() as snapshot:
            return list(snapshot.damaged.values())

    def _analyzer(self) -> Analyzer:
        assert self._bm25 is not None
        self._analyzer_loaded = self._analyzer_loaded or Analyzer(self._bm25["language"])
        return self._analyzer_loaded

    def _encoder(self) -> TextEncoder | None:
        """Return the index's encoder; that of another space is refused."""
        recorded = self._store.settings["encoder"]
        if recorded is None:
            if self._given is not None or self._encoder_name is not None:
                raise IntaglioError(f"the index {self.path} is a bm25 index; it has no encoder")
            return None
        if self._loaded is None:
            self._loaded = check_space(self.path, recorded, self._given or self._encoder_name, self._device)
        return self._loaded

    def compact(self, progress: Callable[[int, int, str], None] | None = None) -> dict[str, Any]:
        """Merge segments and drop deleted rows.

        Returns:
            {"segments_before", "segments", "bytes_before", "bytes", "seconds"}.
        """
        started = time.perf_counter()
        with self._lock, self._store.writing():
            before = self._store.segments()
            self._drop_damaged()
            with self._view() as snapshot:
                segments = list(snapshot.segments)
            groups: list[list[Segment]] = []
            for segment in segments:
                last = groups[-1] if groups else []
                size = sum(other.row.bytes for other in last) + segment.row.bytes
                if not last or size > MERGE_BYTES or snapshot.apart(last[-1], segment):
                    groups.append([])
                groups[-1].append(segment)
            for number, group in enumerate(groups):
                if progress:
                    progress(number, len(groups), "merging")
                if len(group) > 1 or group[0].alive is not None:
                    self._merge(group)
            self._store.shrink()
            after = self._store.segments()
        return {
            "segments_before": len(before),
            "segments": len(after),
            "bytes_before": sum(row.bytes for row in before),
            "bytes": sum(row.bytes for row in after),
            "seconds": time.perf_counter() - started,
        }

    def _drop_damaged(self) -> None:
        """Drop corrupt segments without a live chunk."""
        count = "SELECT count(*) FROM dead WHERE chunk BETWEEN ? AND ?"
        with self._view() as snapshot:
            dead = {row: self._store.db.execute(count, (row.first, row.last)).fetchone()[0] for row in snapshot.damaged}
        if empty := [row for row, rows in dead.items() if rows >= row.rows]:
            self._replace(empty, None)

    def _merge_tiers(self) -> None:
        """Merge runs of adjacent segments of the same order of size."""
        while True:
            with self._view() as snapshot:
                segments = list(snapshot.segments)
            run: list[Segment] = []
            for segment in segments:
                fits = run and _tier(run[-1]) == _tier(segment) and not snapshot.apart(run[-1], segment)
                run = [*run, segment] if fits else [segment]
                if len(run) == MERGE_FACTOR:
                    break
            if len(run) < MERGE_FACTOR or sum(segment.row.bytes for segment in run) > MERGE_BYTES:
                return
            self._merge(run)

    def _merge(self, group: Sequence[Segment]) -> None:
        """Replace adjacent segments by one without their deleted rows."""
        alive = [segment.live for segment in group]
        arrays: dict[str, NDArray[Any]] = {
            name: np.concatenate([s.arrays[name][live] for s, live in zip(group, alive, strict=True)])
            for name in ("chunks", "dense.vectors")
            if name in group[0].arrays
        }
        for name in ("bm25", "sparse"):
            if f"{name}.keys" in group[0].arrays:
                arrays |= Postings.merge([getattr(segment, name) for segment in group], alive).arrays(name)
        new = self._store.write_segment(arrays) if len(arrays["chunks"]) else None
        self._replace([segment.row for segment in group], new)

    def _replace(self, rows: Sequence[SegmentRow], new: SegmentRow | None) -> None:
        with self._store.transaction() as db:
            for row in rows:
                db.execute("DELETE FROM segments WHERE number = ?", (row.number,))
                db.execute("DELETE FROM dead WHERE chunk BETWEEN ? AND ?", (row.first, row.last))
            if new is not None:
                self._store.register(new)
        for row in rows:
            self._store.file(row.number).unlink(missing_ok=True)

    def info(self, verify: bool = False) -> dict[str, Any]:
        """Describe the index.

        Args:
            verify: compare every segment with its checksum. Default False.

        Returns:
            {"path", "version", "kind", "documents", "chunks", "deleted", "segments", "bytes": {"text", "database",
            "segments", "total"}, "encoder": {"name", "kind", "dimensions", "pooling", "fingerprint", ...} or None,
            "bm25": {"language", "k1", "b"} or None, "chunk", "damaged": [...]}; `bytes["text"]` is the raw text's UTF-8
            size.
        """
        with self._lock, sentences(self.path), self._view() as snapshot:
            db, damaged = self._store.db, list(snapshot.damaged.values())
            if verify:
                for segment in snapshot.segments:
                    try:
                        self._store.read_segment(segment.row, verify=True)
                    except (CorruptSegmentError, OSError) as error:
                        damaged.append(f"the segment {self._store.file(segment.row.number)} is damaged ({error})")
            documents, text = db.execute("SELECT count(*), coalesce(sum(bytes), 0) FROM documents").fetchone()
            files = [self.path / name for name in (DATABASE, f"{DATABASE}-wal")]
            database = sum(file.stat().st_size for file in files if file.exists())
            rows = self._store.segments()
            held = sum(row.bytes for row in rows)
            return {
                "path": str(self.path),
                "version": self._store.settings["version"],
                "kind": self.kind,
                "documents": documents,
                "chunks": db.execute("SELECT count(*) FROM chunks").fetchone()[0],
                "deleted": db.execute("SELECT count(*) FROM dead").fetchone()[0],
                "segments": len(rows),
                "bytes": {"text": text, "database": database, "segments": held, "total": database + held},
                "encoder": self._store.settings["encoder"],
                "bm25": self._bm25,
                "chunk": self._chunk,
                "damaged": damaged,
            }

    def get(self, id: str) -> Document | None:
        """Return a document by id, with its text and metadata, or None."""
        with self._lock, sentences(self.path):
            row = self._store.db.execute("SELECT title, metadata, text FROM documents WHERE id = ?", (id,)).fetchone()
        return None if row is None else Document(id, zlib.decompress(row[2]).decode(), row[0], json.loads(row[1]))

    def __len__(self) -> int:
        """Return the number of documents."""
        with self._lock, sentences(self.path):
            return int(self._store.db.execute("SELECT count(*) FROM documents").fetchone()[0])

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the database and the segments."""
        self._snapshot = None
        self._store.close()


def _tier(segment: Segment) -> int:
    return int(math.log(segment.row.rows, MERGE_FACTOR))


def _space(value: Any) -> Any:
    """Return what identifies a setting: the fingerprint of an encoder, not its name."""
    return value["fingerprint"] if isinstance(value, dict) and "fingerprint" in value else value


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


__all__ = ["AddReport", "Filters", "Hit", "Index", "Kind"]
