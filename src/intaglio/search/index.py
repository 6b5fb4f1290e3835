"""The search index: create, open, add, delete, search, compact."""

from __future__ import annotations

import json
import math
import os
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intaglio.errors import IntaglioError
from intaglio.search import ann
from intaglio.search import filters as conditions
from intaglio.search.compaction import Compaction
from intaglio.search.documents import Document, read_documents
from intaglio.search.encoders import TextEncoder, check_space, describe_setting, resolve_encoder
from intaglio.search.index_settings import new_settings, space
from intaglio.search.inspection import describe
from intaglio.search.lexical import BM25, Analyzer
from intaglio.search.milvus import MilvusIndex
from intaglio.search.passage_cache import PassageCache
from intaglio.search.results import AddReport, Filters, Hit, Kind, Progress, check_queries
from intaglio.search.retrieval import Retrieval
from intaglio.search.segment_writer import SegmentWriter
from intaglio.search.snapshot import Snapshots
from intaglio.search.storage import DATABASE, Store, sentences
from intaglio.search.upgrade import Plan, Upgrade

if TYPE_CHECKING:
    from intaglio.search.judgements import Judged

BATCH_CHUNKS, BATCH_CHARACTERS = 4096, 32 << 20
"""Chunks (with an encoder) and characters of a commit of `add`."""
FUSION_DEPTH = 100
"""Fewest documents of each retriever that are fused."""


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
        settings, loaded = new_settings(kind, encoder, chunk, BM25(k1, b), language, encoder_options)
        if not (exist_ok and (path / DATABASE).is_file()):
            Store.create(path, {**settings, "next_chunk": 1})
        index = cls(path, loaded, check_encoder=False)
        for key, value in settings.items():
            known = index._store.settings[key]
            if space(known) != space(value):
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
        self._loaded_before: TextEncoder | None = None
        self._analyzer_loaded: Analyzer | None = None
        bm25 = BM25(self._bm25["k1"], self._bm25["b"]) if self._bm25 else None
        self._snapshots = Snapshots(self._store, bm25)
        self._view = self._snapshots.view
        self._lock = threading.RLock()
        self._retrieval = Retrieval(self._store.db, self._analyzer, self._encoder, self._encoder_before)
        self._compaction = Compaction(self._store, self._view)
        if encoder is not None:
            self._encoder()

    def add(
        self,
        documents: str | os.PathLike[str] | Iterable[Document | Mapping[str, Any]],
        *,
        text_field: str = "text",
        id_field: str = "id",
        progress: Progress | None = None,
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
        encoder = self._encoder()
        most = min(BATCH_CHARACTERS, BATCH_CHUNKS * (self._chunk or 2000)) if encoder else BATCH_CHARACTERS
        analyzer = self._analyzer() if self._bm25 else None
        merge = self._compaction.merge_tiers
        with self._lock, self._store.writing():
            with self._view() as snapshot:
                damaged = [(row.first, row.last) for row in snapshot.damaged]
            # Again, as an upgrade may have begun since.
            writer = SegmentWriter(self._store, analyzer, self._encoder(), self._chunk, merge, snapshot.space)
            source = read_documents(documents, text_field=text_field, id_field=id_field, skipped=report.skipped)
            count = writer.write(source, most, damaged, report, progress)
            if not count and not report.skipped:
                raise IntaglioError("there is no document to index")
        report.seconds = time.perf_counter() - started
        return report

    def delete(self, ids: Iterable[str] | None = None, *, filters: Filters | None = None) -> int:
        """Delete documents by id or by metadata, and return their number.

        Raises:
            IntaglioError: an id is unknown (nothing is deleted then), or another writer is active.
        """
        if ids is None and not filters:
            raise IntaglioError("nothing to delete was named; give ids or a filter")
        with self._lock, self._store.writing():
            numbers = self._store.numbers(ids or ())
            if filters:
                where, parameters = conditions.to_sql(filters)
                chosen = self._store.db.execute(f"SELECT number FROM documents WHERE {where}", parameters).fetchall()
                kept = {number for (number,) in chosen}
                numbers = sorted(kept) if ids is None else [number for number in numbers if number in kept]
            if numbers:
                with self._store.transaction():
                    for number in numbers:
                        self._store.remove(number)
        return len(numbers)

    def search(
        self,
        query: str,
        k: int = 10,
        *,
        filters: Filters | None = None,
        explain: bool = False,
        mode: Kind | None = None,
        approximate: bool = False,
    ) -> list[Hit]:
        """Return the best documents for a query; exact for every kind unless `approximate`.

        Args:
            query: the words.
            k: most hits. Default 10.
            filters: conditions on metadata; see `Filters`.
            explain: fill in `Hit.terms` and `Hit.parts`. Default False.
            mode: for a hybrid index, use only this retriever. Default: the index's kind.
            approximate: search vectors by the indexes that `compact(approximate=True)` builds; segments without one
                are searched exactly. Default False.

        Returns:
            At most k hits in descending order of score; equal scores in the order of addition.

        Raises:
            IntaglioError: an empty query, a query beyond the encoder's context, an encoder that changed, a bad filter.
        """
        return self.search_many([query], k, filters=filters, explain=explain, mode=mode, approximate=approximate)[0]

    def search_many(
        self,
        queries: Sequence[str],
        k: int = 10,
        *,
        filters: Filters | None = None,
        explain: bool = False,
        mode: Kind | None = None,
        approximate: bool = False,
    ) -> list[list[Hit]]:
        """Search for several queries; as `search`, encoding them together."""
        check_queries(queries, k)
        names = self._retrievers(mode)
        if approximate and names == ["bm25"]:
            raise IntaglioError(f"approximate search is of dense or sparse vectors; {self.path} is searched by bm25")
        with self._lock, sentences(self.path), self._view() as snapshot:
            if approximate and snapshot.older:
                raise IntaglioError(
                    f"the index {self.path} is being upgraded; approximate search is possible when that is done"
                )
            encoded = {name: self._retrieval.encode(name, queries, snapshot) for name in names}
            allowed = self._retrieval.allowed(snapshot, filters) if filters else None
            depth = k if len(names) == 1 else max(FUSION_DEPTH, 4 * k)
            ranked = {
                name: self._retrieval.rank(snapshot, name, encoded[name], depth, allowed, approximate) for name in names
            }
            return [
                self._retrieval.hits(
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
        if self._loaded is None or self._loaded.fingerprint != recorded["fingerprint"]:
            self._loaded = check_space(self.path, recorded, self._given or self._encoder_name, self._device)
        return self._loaded

    def _encoder_before(self) -> TextEncoder:
        """Return the encoder of the vectors that an upgrade replaces."""
        recorded = self._store.settings["upgrade"]["from"]
        if self._loaded_before is None or self._loaded_before.fingerprint != recorded["fingerprint"]:
            self._loaded_before = check_space(self.path, recorded, None, self._device)
        return self._loaded_before

    def upgrade(
        self,
        encoder: str | os.PathLike[str] | TextEncoder | None = None,
        *,
        method: str | None = None,
        judged: Judged | None = None,
        queries: Sequence[str] = (),
        rate: float | None = None,
        sample: int = 2000,
        steps: int = 500,
        fields: Mapping[str, Any] | None = None,
        reencode: bool = True,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Upgrade a dense or hybrid index to another encoder, while it stays searchable.

        A head on the new encoder is trained such that its first dimensions can be compared with the vectors that are
        there, so new queries search old documents at once. Documents are then encoded again, a few at a time; what is
        done is kept if this is stopped, and the same call resumes. Others may search, add and delete meanwhile.

        Args:
            encoder: the new encoder; if it was trained by `bt2` from the index's own encoder, it is taken as it is.
                Default: that of an upgrade under way.
            method: `bt2`, `bct`, `bct_distill`, `naive`, `procrustes` (a rotation, without training) or `reembed` (the
                new encoder as it is; until all is encoded, old and new documents are ranked apart). Default: that of an
                upgrade under way, else `bt2`.
            judged: queries with the ids of their documents; half of the queries is trained on, half is reported.
            queries: without `judged`: those of a log, paired with the chunks that the old encoder ranks first.
            rate: most chunks to encode a second. Default: as many as possible.
            sample: chunks of the training and of the report. Default 2000.
            steps: optimizer steps. Default 500.
            fields: of `BT2`, such as `scale` and `extra_dims`.
            reencode: whether to encode documents, or only to begin. Default True.
            seed: of the sample and of the training. Default 0.
            progress: called with (done, total, what).

        Returns:
            {"method", "from", "to", "report", "encoded" (chunks), "left" (chunks), "seconds"}.

        Raises:
            IntaglioError: the index has no dense vectors, the encoder is of another kind or is the index's own, or an
                upgrade by `reembed` is not finished.
        """
        if rate is not None and not 0 < rate < math.inf:
            raise IntaglioError(f"rate is {rate}; a number of chunks a second above 0 is accepted")
        if encoder is not None and not isinstance(encoder, (str, os.PathLike)):
            given: TextEncoder | None = encoder
        else:
            given = None if encoder is None else resolve_encoder(encoder, {"device": self._device})
        work = Upgrade(self._store, self._view, self._compaction, self._lock)
        started = time.perf_counter()
        with self._lock, self._view():
            old = self._encoder()
            settings = self._store.settings
        if old is None:
            raise IntaglioError(f"the index {self.path} is a {self.kind} index; only dense vectors are upgraded")
        if work.begins(given, method):
            assert given is not None
            plan = Plan(method or "bt2", judged, tuple(queries), sample, steps, dict(fields or {}), seed)
            target = work.begin(old, given, plan, progress)
            self._given, self._loaded, self._loaded_before = target, target, old
        elif "upgrade" not in settings:
            raise IntaglioError(f"no upgrade of {self.path} is under way; name the new encoder with --encoder")
        counts = work.encode(self._encoder, rate, progress) if reencode else work.counts()
        recorded = self._store.settings["upgrade"]
        return {
            **{name: recorded[name] for name in ("method", "from", "to", "report")},
            **counts,
            "seconds": time.perf_counter() - started,
        }

    def compact(self, progress: Progress | None = None, *, approximate: bool = False) -> dict[str, Any]:
        """Merge segments and drop deleted rows.

        Args:
            progress: called with (done, total, what).
            approximate: then build approximate indexes of segments of at least 20,000 chunks (dense: usearch; sparse:
                Seismic). Default False.

        Returns:
            {"segments_before", "segments", "approximate", "bytes_before", "bytes", "seconds"}; `approximate` is the
            number of segments with an approximate index.
        """
        if approximate:
            if self._store.settings["encoder"] is None:
                raise IntaglioError(f"approximate indexes are of dense or sparse vectors; {self.path} is {self.kind}")
            ann.check_installed(self._store.settings["encoder"]["kind"])
        started = time.perf_counter()
        with self._lock, self._store.writing():
            before = self._store.segments()
            self._compaction.merge_all(progress)
            if approximate:
                self._compaction.build_approximate(progress)
                self._snapshots.drop()  # opened again with them
            after = self._store.segments()
        return {
            "segments_before": len(before),
            "segments": len(after),
            "approximate": sum(self._store.ann_file(row.number).exists() for row in after),
            "bytes_before": sum(row.bytes for row in before),
            "bytes": sum(row.bytes for row in after),
            "seconds": time.perf_counter() - started,
        }

    def info(self, verify: bool = False) -> dict[str, Any]:
        """Describe the index.

        Args:
            verify: compare every segment with its checksum. Default False.

        Returns:
            {"path", "version", "kind", "documents", "chunks", "deleted", "segments", "approximate", "bytes": {"text",
            "database", "segments", "total"}, "vectors": {encoder: {"segments", "chunks"}}, "upgrade": {...} or None,
            "encoder": {"name", "kind", "dimensions", "pooling", "fingerprint", ...}
            or None, "bm25": {"language", "k1", "b"} or None, "chunk", "damaged": [...]}; `approximate` is the number
            of segments with an approximate index, `bytes["text"]` the raw text's UTF-8 size.
        """
        with self._lock, sentences(self.path), self._view() as snapshot:
            return describe(self._store, snapshot, verify)

    def get(self, id: str) -> Document | None:
        """Return a document by id, with its text and metadata, or None."""
        with self._lock, sentences(self.path):
            row = self._store.db.execute("SELECT title, metadata, text FROM documents WHERE id = ?", (id,)).fetchone()
        return None if row is None else Document(id, zlib.decompress(row[2]).decode(), row[0], json.loads(row[1]))

    def passage_cache(self, space: str) -> PassageCache:
        """Return the arrays kept beside the index's passages for a space; see `PassageCache`."""
        return PassageCache(self._store, space)

    def passages(self) -> Iterator[Hit]:
        """Yield every passage as a hit of rank and score 0, in the order of addition; one document is in memory."""
        number = -1
        while True:
            with self._lock, sentences(self.path):
                db = self._store.db
                sql = "SELECT number, id, title, metadata, text FROM documents WHERE number > ? ORDER BY number LIMIT 1"
                row = db.execute(sql, (number,)).fetchone()
                if row is None:
                    return
                number, id_, title, metadata, content = row
                sql = "SELECT start, stop FROM chunks WHERE document = ? ORDER BY chunk"
                spans = db.execute(sql, (number,)).fetchall()
            text = zlib.decompress(content).decode()
            for start, stop in spans:
                yield Hit(id_, 0.0, 0, title, text[start:stop], start, json.loads(metadata))

    def __contains__(self, id: str) -> bool:
        """Return whether a document is in the index."""
        with self._lock, sentences(self.path):
            return self._store.db.execute("SELECT 1 FROM documents WHERE id = ?", (id,)).fetchone() is not None

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
        self._snapshots.drop()
        self._store.close()


def open_index(
    place: str | os.PathLike[str],
    *,
    encoder: str | os.PathLike[str] | TextEncoder | None = None,
    device: str | None = None,
) -> Index | MilvusIndex:
    """Open the index of a directory or of a `milvus://` address; see `Index.open` and `MilvusIndex`."""
    if isinstance(place, str) and "://" in place:
        given = os.fspath(encoder) if isinstance(encoder, os.PathLike) else encoder
        return MilvusIndex(place, given, device=device)
    return Index.open(place, encoder=encoder, device=device)


__all__ = ["Index", "open_index"]
