"""The commands of an index on a Milvus server, for corpora beyond one machine (dense and learned-sparse)."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from intaglio.errors import IntaglioError, first_line, shorten
from intaglio.search import filters as conditions
from intaglio.search.documents import Document, chunk_spans, read_documents
from intaglio.search.encoders import (
    DEFAULT_ENCODER,
    SparseVectors,
    TextEncoder,
    check_context,
    check_space,
    describe_encoder,
    resolve_encoder,
)
from intaglio.search.results import AddReport, Filters, Hit, Kind, Progress, check_queries

BATCH = 256
"""Documents sent at a time."""
_FIELDS = ["document", "title", "text", "start", "metadata"]


class MilvusIndex:
    """An index of dense or learned-sparse vectors in a collection of Milvus.

    Adds and deletes are those of the server: an update deletes the old chunks, then inserts the new ones. The encoder's
    fingerprint is recorded in the collection's properties, and other encoders are refused as by `Index`.

    Args:
        url: `milvus://host:port/collection`, or `milvus:///path/file.db/collection` for a local file of milvus-lite.
        encoder: a name, directory or object. Default: the recorded one; `minilm` for a new collection.
        kind: "dense" or "sparse", for a new collection. Default: what the encoder is.
        chunk: most characters of a chunk, for a new collection. Default 2000.
        create: create the collection if it is missing. Default False.
        device: device of the encoder. Default: the CPU.
        encoder_options: as for `Index.create`, for a new collection.

    Raises:
        IntaglioError: pymilvus is missing, the server cannot be reached, no such collection, or another encoder.
    """

    def __init__(
        self,
        url: str,
        encoder: str | TextEncoder | None = None,
        *,
        kind: str | None = None,
        chunk: int = 2000,
        create: bool = False,
        device: str | None = None,
        **encoder_options: Any,
    ) -> None:
        try:
            from pymilvus import MilvusClient
        except ImportError:
            raise IntaglioError(f"the store {url} needs pymilvus: pip install 'intaglio[milvus]'") from None
        parts = urlsplit(url)
        folder, _, self._collection = parts.path.rpartition("/")
        if parts.scheme != "milvus" or not self._collection or not (parts.netloc or folder):
            raise IntaglioError(f"the store {url!r} is none; accepted: milvus://host:port/name, milvus:///file.db/name")
        self.path, self._chunk = url, chunk
        with self._sentences():
            self._client = MilvusClient(f"http://{parts.netloc}" if parts.netloc else folder)
            exists = self._client.has_collection(self._collection)
        if not exists:
            if not create:
                raise IntaglioError(f"{url} does not exist: `intaglio index DOCS --store {url}` creates it")
            if kind not in (None, "dense", "sparse"):
                raise IntaglioError(f"kind is {kind!r}; a Milvus store accepts: dense, sparse")
            if encoder is None or isinstance(encoder, str):
                encoder_options["device"] = device
            self._encoder = resolve_encoder(encoder or DEFAULT_ENCODER[kind or "dense"], encoder_options)
            if kind not in (None, self._encoder.kind):
                raise IntaglioError(f"the encoder {self._encoder.name!r} is {self._encoder.kind}, not {kind}")
            self._create()
        else:
            with self._sentences():
                properties = self._client.describe_collection(self._collection).get("properties", {})
            if "intaglio" not in properties:
                raise IntaglioError(f"{url} is no collection of intaglio; name another")
            settings = json.loads(properties["intaglio"])
            known = {**settings["encoder"], "chunk": settings["chunk"]}
            for name, value in {"chunk": chunk, "kind": kind, **encoder_options}.items() if create else ():
                if value is not None and known.get(name, value) != value:
                    raise IntaglioError(f"{url} has {name} {known[name]} instead of {value}; name another collection")
            self._encoder = check_space(url, settings["encoder"], encoder, device)
            self._chunk = settings["chunk"]
        self.kind = self._encoder.kind
        with self._sentences():
            self._client.load_collection(self._collection)

    def _create(self) -> None:
        from pymilvus import DataType

        sparse = self._encoder.kind == "sparse"
        settings = json.dumps({"encoder": describe_encoder(self._encoder), "chunk": self._chunk})
        with self._sentences():
            schema = self._client.create_schema(auto_id=True)
            schema.add_field("chunk", DataType.INT64, is_primary=True)
            for name in ("document", "title", "text", "digest"):
                schema.add_field(name, DataType.VARCHAR, max_length=65_535)
            schema.add_field("start", DataType.INT64)
            schema.add_field("part", DataType.INT64)  # number of the chunk in its document
            schema.add_field("metadata", DataType.JSON)
            if sparse:
                schema.add_field("vector", DataType.SPARSE_FLOAT_VECTOR)
            else:
                schema.add_field("vector", DataType.FLOAT_VECTOR, dim=self._encoder.dimensions)
            indexes = self._client.prepare_index_params()
            kind = "SPARSE_INVERTED_INDEX" if sparse else "FLAT"  # both exact
            indexes.add_index("vector", index_type=kind, metric_type="IP")
            self._client.create_collection(
                self._collection,
                schema=schema,
                index_params=indexes,
                consistency_level="Strong",
                properties={"intaglio": settings},
            )

    @contextlib.contextmanager
    def _sentences(self) -> Iterator[None]:
        from pymilvus.exceptions import MilvusException

        try:
            yield
        except (MilvusException, ValueError, OSError) as error:
            if isinstance(error, IntaglioError):
                raise
            raise IntaglioError(f"the store {self.path} cannot be used: {first_line(error)}") from error

    def add(
        self,
        documents: Any,
        *,
        text_field: str = "text",
        id_field: str = "id",
        progress: Progress | None = None,
    ) -> AddReport:
        """Add or update documents; see `Index.add`."""
        started, report = time.perf_counter(), AddReport()
        batch: dict[str, Document] = {}
        seen: dict[str, bytes] = {}
        source = read_documents(documents, text_field=text_field, id_field=id_field, skipped=report.skipped)
        for count, document in enumerate(source, 1):
            if progress:
                progress(count, 0, "encoding")
            if not document.text.strip():
                report.skipped.append(f"the document {shorten(document.id)!r} is empty")
                continue
            if seen.setdefault(document.id, document.digest) != document.digest:
                raise IntaglioError(f"the id {shorten(document.id)!r} is that of two documents; ids must be unique")
            batch[document.id] = document
            if len(batch) == BATCH:
                self._send(batch, report)
                batch = {}
        if batch:
            self._send(batch, report)
        report.seconds = time.perf_counter() - started
        return report

    def _send(self, batch: Mapping[str, Document], report: AddReport) -> None:
        known = self._known(batch)
        changed = [d for d in batch.values() if known.get(d.id) != d.digest.hex()]
        report.unchanged += len(batch) - len(changed)
        if not changed:
            return
        context, counts = self._encoder.max_tokens, self._encoder.count_tokens
        pieces = [
            (document, part, start, stop)
            for document in changed
            for part, (start, stop) in enumerate(
                chunk_spans(
                    document.text, self._chunk or 16_000, lambda texts: [tokens > context for tokens in counts(texts)]
                )
            )
        ]
        vectors = self._encoder.encode_documents([document.text[start:stop] for document, _, start, stop in pieces])
        rows = [
            {
                "document": document.id,
                "title": document.title,
                "text": document.text[start:stop],
                "digest": document.digest.hex(),
                "start": start,
                "part": part,
                "metadata": json.loads(document.metadata_json),
                "vector": vector,
            }
            for (document, part, start, stop), vector in zip(pieces, _rows(vectors), strict=True)
        ]
        updated = [document.id for document in changed if document.id in known]
        with self._sentences():
            if updated:
                self._client.delete(self._collection, filter=f"document in {json.dumps(updated)}")
            self._client.insert(self._collection, rows)
        report.added += len(changed) - len(updated)
        report.updated += len(updated)
        report.chunks += len(rows)

    def _known(self, names: Iterable[str]) -> dict[str, str]:
        """Return the digest of each document that is in the collection."""
        expression = f"document in {json.dumps(list(names))}"
        with self._sentences():
            rows = self._client.query(
                self._collection, filter=expression, output_fields=["document", "digest"], limit=16_384
            )
        return {row["document"]: row["digest"] for row in rows}

    def _count(self, expression: str) -> int:
        """Return the number of rows that meet an expression."""
        with self._sentences():
            (row,) = self._client.query(self._collection, filter=expression, output_fields=["count(*)"])
        return int(row["count(*)"])

    def delete(self, ids: Iterable[str] | None = None, *, filters: Filters | None = None) -> int:
        """Delete documents by id or by metadata, and return their number; see `Index.delete`."""
        if ids is None and not filters:
            raise IntaglioError("nothing to delete was named; give ids or a filter")
        clauses = [_expression(filters)] if filters else []
        if ids is not None:
            names = list(dict.fromkeys(ids))
            known = self._known(names)
            if unknown := [name for name in names if name not in known]:
                name = shorten(unknown[0])
                raise IntaglioError(f"no document of {self.path} has the id {name!r}; nothing was deleted")
            clauses.append(f"document in {json.dumps(names)}")
        expression = " and ".join(clauses)
        count = self._count(f"{expression} and part == 0")
        with self._sentences():
            self._client.delete(self._collection, filter=expression)
        return count

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
        """Return the best documents for a query; see `Index.search`. `explain` fills in `Hit.parts` only."""
        check_queries([query], k)
        if mode not in (None, self.kind):
            raise IntaglioError(f"mode is {mode!r}; the store {self.path} has: {self.kind}")
        if approximate:
            raise IntaglioError(f"the store {self.path} has an exact index; approximate search is of a directory")
        check_context(self._encoder, [query])
        (vector,) = _rows(self._encoder.encode_queries([query]))
        with self._sentences():
            (rows,) = self._client.search(
                self._collection,
                [vector],
                anns_field="vector",
                limit=min(8 * k, 16_384),  # several chunks may be of the same document
                filter=_expression(filters) if filters else "",
                output_fields=_FIELDS,
                search_params={"metric_type": "IP"},
            )
        hits: dict[str, Hit] = {}
        for row in rows:
            entity = row["entity"]
            hit = Hit(
                entity["document"], row["distance"], len(hits) + 1, entity["title"], entity["text"], entity["start"],
                entity["metadata"],
                parts={self.kind: {"rank": float(len(hits) + 1), "score": row["distance"]}} if explain else {},
            )  # fmt: skip
            hits.setdefault(hit.id, hit)
        return list(hits.values())[:k]

    def info(self, verify: bool = False) -> dict[str, Any]:
        """Describe the collection; see `Index.info`.

        Args:
            verify: ignored; the server guards its files.

        Returns:
            {"path", "kind", "documents", "chunks", "encoder", "chunk", "bytes": {"text", "total"}, "damaged": []}; the
            bytes are unknown, hence None.
        """
        return {
            "path": self.path,
            "kind": self.kind,
            "documents": len(self),
            "chunks": self._count("part >= 0"),
            "encoder": describe_encoder(self._encoder),
            "chunk": self._chunk,
            "bytes": {"text": None, "total": None},
            "damaged": self.damaged,
        }

    @property
    def damaged(self) -> list[str]:
        """Nothing: the server guards its files."""
        return []

    def __len__(self) -> int:
        """Return the number of documents."""
        return self._count("part == 0")

    def __contains__(self, id: str) -> bool:
        """Return whether a document is in the collection."""
        return bool(self._known([id]))

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def __enter__(self) -> MilvusIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _rows(vectors: Any) -> list[Any]:
    """Return vectors as Milvus takes them."""
    if isinstance(vectors, SparseVectors):
        return list(vectors.rows())
    return [row.tolist() for row in np.asarray(vectors, np.float32)]


def _expression(filters: Mapping[str, Any] | Sequence[str]) -> str:
    """Return metadata conditions in Milvus's language."""
    clauses = []
    for name, operator, value in conditions.parse(filters):
        field = "document" if name == "id" else name if name == "title" else f"metadata[{json.dumps(name)}]"
        with contextlib.suppress(TypeError, ValueError):
            value = json.loads(value) if isinstance(value, str) else value
        sign = {"=": "==", "~=": "like"}.get(operator, operator)
        clauses.append(f"{field} {sign} {json.dumps(f'%{value}%' if operator == '~=' else value)}")
    return " and ".join(clauses)


__all__ = ["MilvusIndex"]
