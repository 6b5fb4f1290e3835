"""Results and reports of an index, and the types of its options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from intaglio.errors import IntaglioError

Kind = Literal["bm25", "dense", "sparse", "hybrid"]
Filters = Mapping[str, Any] | Sequence[str]
"""`{"field": value}` (equality), or conditions such as `year>=2020`, `type=md`, `title~=mask` (substring)."""
Progress = Callable[[int, int, str], None]


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


def check_queries(queries: Sequence[str], k: int) -> None:
    """Refuse empty queries, and a k below 1."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise IntaglioError(f"k is {k!r}; an integer of at least 1 is accepted")
    for query in queries:
        if not isinstance(query, str) or not query.strip():
            raise IntaglioError("the query is empty; give at least one word")


__all__ = ["AddReport", "Filters", "Hit", "Kind", "Progress", "check_queries"]
