"""Retrieval on a snapshot: encode queries, rank chunks, fuse rankings, describe hits."""

from __future__ import annotations

import json
import re
import sqlite3
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from intaglio.search import ann, dense, fusion
from intaglio.search import filters as conditions
from intaglio.search.encoders import SparseVectors, TextEncoder, check_context
from intaglio.search.lexical import Analyzer, term_key
from intaglio.search.results import Filters, Hit
from intaglio.search.snapshot import Snapshot, member

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Retrieval:
    """Retrieval by the names "bm25", "dense" and "sparse".

    Args:
        db: the index's database.
        analyzer: returns the tokenizer of BM25.
        encoder: returns the encoder; loaded at the first use.
        encoder_before: returns that of the vectors which `index upgrade` replaces.
    """

    db: sqlite3.Connection
    analyzer: Callable[[], Analyzer]
    encoder: Callable[[], TextEncoder | None]
    encoder_before: Callable[[], TextEncoder]

    def encode(self, name: str, queries: Sequence[str], snapshot: Snapshot) -> Any:
        """Return the term weights by key of each query, or the vectors [B, D].

        Where segments of two encoders cannot be compared, vectors of the encoder before follow in each row.
        """
        if name == "bm25":
            keys = [[term_key(term) for term in self.analyzer().terms(query)] for query in queries]
            return [{key: float(own.count(key)) for key in dict.fromkeys(own)} for own in keys]
        encoder = self.encoder()
        assert encoder is not None
        check_context(encoder, queries)
        vectors = encoder.encode_queries(queries)
        if isinstance(vectors, SparseVectors):
            return list(vectors.rows())
        if snapshot.older and not snapshot.mixable:
            before: Any = self.encoder_before().encode_queries(queries)
            vectors = np.concatenate([vectors, before], axis=1)
        return np.asarray(vectors, np.float32)

    def rank(
        self,
        snapshot: Snapshot,
        name: str,
        queries: Any,
        depth: int,
        allowed: list[NDArray[np.uint8]] | None,
        approximate: bool = False,
    ) -> list[list[tuple[int, int, float]]]:
        """Return (document, position of its best chunk, score) of the best documents for each query."""

        def search(batch: Any, k: int) -> list[tuple[Any, Any]]:
            if approximate and name != "bm25":
                segments = [segment.approximate for segment in snapshot.segments]
                return ann.search(segments, allowed or snapshot.alive, batch, k)
            if name == "dense":
                return search_dense(snapshot, batch, k, allowed or snapshot.alive)
            return [snapshot.lexical(name).search(terms, k, allowed) for terms in batch]

        result, rows = [], max(int(snapshot.bases[-1]), 1)
        for i, (scores, positions) in enumerate(search(queries, min(depth, rows))):
            k = min(depth, rows)
            while True:
                best: dict[int, tuple[int, int, float]] = {}
                for score, position in zip(scores.tolist(), positions.tolist(), strict=True):
                    sql = "SELECT document FROM chunks WHERE chunk = ?"
                    (document,) = self.db.execute(sql, (snapshot.chunk(position),)).fetchone()
                    best.setdefault(document, (document, position, score))
                if len(best) >= depth or len(scores) < k or k == rows:
                    break
                k = min(4 * k, rows)  # several chunks were of the same documents
                ((scores, positions),) = search(queries[i : i + 1], k)
            result.append(list(best.values())[:depth])
        return result

    def hits(
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
            identity, title, metadata, content, start, stop = self.db.execute(
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
            result["bm25"] = {term_key(term): term for term in self.analyzer().terms(query)}
        if "sparse" in encoded:
            encoder = self.encoder()
            assert encoder is not None
            result["sparse"] = {term: encoder.term(term) for term in encoded["sparse"]}
        return result

    def _spans(self, text: str, words: Mapping[str, Mapping[int, str]]) -> tuple[tuple[int, int], ...]:
        """Return where a text's words are terms of the query."""
        spans = set(self.analyzer().spans(text, set(words["bm25"].values()))) if "bm25" in words else set()
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

    def allowed(self, snapshot: Snapshot, filters: Filters) -> list[NDArray[np.uint8]]:
        """Return the mask of the rows that pass a filter, for each segment."""
        where, parameters = conditions.to_sql(filters)
        key = json.dumps([where, parameters])
        if key not in snapshot.masks:
            sql = f"SELECT chunk FROM documents JOIN chunks ON document = number WHERE {where} ORDER BY chunk"
            chunks = np.fromiter((row[0] for row in self.db.execute(sql, parameters)), np.int64)
            masks = [member(segment.arrays["chunks"], chunks).astype(np.uint8) for segment in snapshot.segments]
            snapshot.masks = {key: masks}
        return snapshot.masks[key]


def search_dense(
    snapshot: Snapshot, queries_BD: NDArray[np.float32], k: int, masks: Sequence[NDArray[np.uint8] | None]
) -> list[tuple[Any, Any]]:
    """Return the scores and positions of the best rows, while segments may be of several encoders.

    Compatible encoders are compared by the cosine of the dimensions that all have. Others are ranked apart, and the
    rankings interleaved by reciprocal rank.
    """
    segments, older = snapshot.segments, snapshot.older
    vectors = [segment.arrays["dense.vectors"] for segment in segments]
    if not older:
        return dense.search(vectors, masks, queries_BD, k)
    if snapshot.mixable:
        width = min(queries_BD.shape[1], *(own.shape[1] for own in vectors))
        queries_BW = queries_BD[:, :width] / np.linalg.norm(queries_BD[:, :width], axis=1, keepdims=True).clip(1e-12)
        norms = [segment.prefix_norms(width) for segment in segments]
        return dense.search([own[:, :width] for own in vectors], masks, queries_BW, k, norms)
    own_width = queries_BD.shape[1] - older[0].arrays["dense.vectors"].shape[1]
    rankings: list[list[list[int]]] = []
    for queries, current in ((queries_BD[:, :own_width], True), (queries_BD[:, own_width:], False)):
        chosen = [i for i, segment in enumerate(segments) if (segment.space == snapshot.space) == current]
        places = np.concatenate(
            [np.empty(0, np.int64), *(snapshot.bases[i] + np.arange(snapshot.sizes[i]) for i in chosen)]
        )
        queries = np.ascontiguousarray(queries)
        got = dense.search([vectors[i] for i in chosen], [masks[i] for i in chosen], queries, k)
        rankings.append([places[positions].tolist() for _, positions in got])
    merged = []
    for new, old in zip(*rankings, strict=True):
        ranked = fusion.reciprocal_rank({"new": new, "old": old}, k)
        merged.append(
            (np.array([score for _, score in ranked], np.float32), np.array([p for p, _ in ranked], np.int64))
        )
    return merged


__all__ = ["Retrieval", "search_dense"]
