"""Stages of ranking as protocols: first stage, reranker, aggregator, expander.

    queries -> [expander] -> first stage -> reranker on each candidate's passages -> aggregator -> ranking

`Index` is a first stage. A reranker reads query and passage together; an aggregator makes the score of a document from
those of its passages; an expander adds to a query before the search, or to a document before it is indexed. Stages are
independent: a cascade applies several rerankers, each to the best candidates of the one before.

Dimension letters: N passages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from intaglio.search.results import Filters, Hit

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@runtime_checkable
class FirstStage(Protocol):
    """Retrieval of candidates from all documents: an inverted index, vectors, or both."""

    def search_many(self, queries: Sequence[str], k: int, *, filters: Filters | None = None) -> list[list[Hit]]:
        """Return at most k candidates for each query, in descending order of score.

        Args:
            queries: at least one word each.
            k: most candidates of a query.
            filters: conditions on metadata. Default: none.
        """
        ...


@runtime_checkable
class Reranker(Protocol):
    """Scores of query and passage read together.

    Attributes:
        name: for reports.
        max_tokens: most tokens of query and passage; longer passages are cut into windows before.
    """

    name: str
    max_tokens: int

    def score(self, query: str, passages: Sequence[str]) -> NDArray[np.float32]:
        """Return a score for each passage, float32 [N]; higher is better, comparable within a query alone."""
        ...


@runtime_checkable
class Aggregator(Protocol):
    """The score of a document from the scores of its passages: the first, the maximum, a sum, or a trained function."""

    def aggregate(self, scores: NDArray[np.float32]) -> float:
        """Return the score of a document.

        Args:
            scores: of its passages in the order of the text, float32 [N], N >= 1.
        """
        ...


@runtime_checkable
class Expander(Protocol):
    """Addition of text to one side, by feedback documents or by a model.

    Attributes:
        side: `query`, expanded at search time, or `document`, expanded before indexing.
    """

    side: Literal["query", "document"]

    def expand(self, text: str, feedback: Sequence[Hit] = ()) -> str:
        """Return a text with its additions; the text itself stays its beginning.

        Args:
            text: a query, or a document.
            feedback: the best hits of the query, best first, for expanders that read them. Default: none.
        """
        ...


__all__ = ["Aggregator", "Expander", "FirstStage", "Reranker"]
