"""The stages of a ranking fit together: a first stage, a reranker of passages, an aggregator, an expander."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from intaglio.search import Index
from intaglio.search.protocols import Aggregator, Expander, FirstStage, Reranker
from intaglio.search.results import Hit
from tests.search.fakes import BagOfWords

DOCUMENTS = {
    "long": "The fox runs. Nothing here. The fox and the fox sleep.",
    "short": "The fox runs.",
    "other": "Sun.",
}


class Counts:
    """Scores a passage by the words of the query in it."""

    name, max_tokens = "counts", 64

    def score(self, query: str, passages: Sequence[str]) -> Any:
        return np.array([sum(text.count(word) for word in query.split()) for text in passages], np.float32)


class MaxP:
    def aggregate(self, scores: Any) -> float:
        return float(scores.max())


class Synonyms:
    side: Literal["query", "document"] = "query"

    def expand(self, text: str, feedback: Sequence[Hit] = ()) -> str:
        return f"{text} fox" if "vixen" in text else text


def test_the_index_is_a_first_stage_and_the_stages_compose(tmp_path: Path) -> None:
    """Tokenized corpus -> FirstStage -> Reranker (scores (q,d) pairs) -> Aggregator -> Expander."""
    reranker, aggregator, expander = Counts(), MaxP(), Synonyms()
    stages: list[tuple[object, type]] = [(reranker, Reranker), (aggregator, Aggregator), (expander, Expander)]
    assert all(isinstance(stage, protocol) for stage, protocol in stages)
    with Index.create(tmp_path / "index", kind="dense", encoder=BagOfWords()) as index:
        index.add({"id": name, "text": text} for name, text in DOCUMENTS.items())
        stage: FirstStage = index
        assert isinstance(stage, FirstStage)
        query = expander.expand("vixen")
        (candidates,) = stage.search_many([query], 10)
        scores = {hit.id: aggregator.aggregate(reranker.score(query, hit.text.split(". "))) for hit in candidates}
    assert scores == {"long": 2.0, "short": 1.0, "other": 0.0}
    assert not isinstance(reranker, FirstStage | Expander)
