"""Design that measures retrieval of an encoder or index: `Retrieve`.

Settings of an arm: `retriever`, a function `(context, **settings) -> search`, where `search(queries, documents)` takes
`{id: text}` twice and returns `{query id: {document id: score}}`. Test beds give `retrieval(part, base)`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from intaglio.evidence.designs.base import BedDesign, Settings, usage
from intaglio.evidence.engine.claim import Arm, Cost, Metric, Result, RunKey
from intaglio.evidence.testbeds.docstrings import Docstrings

MRR = Metric("MRR@10", "points", "higher", continuous=False)
NDCG = Metric("nDCG@10", "points", "higher", continuous=False)
DEPTH = 10
Scores = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class RetrieveContext:
    """Inputs of a function that makes a retriever: the test bed and the key of the run."""

    bed: Any
    key: RunKey


@dataclass(frozen=True)
class Retrieve(BedDesign):
    """Train or load a retriever on a unit and measure it per query."""

    bed: Any = field(default_factory=Docstrings)

    def run(self, arm: Arm, key: RunKey, settings: Settings) -> Result:
        """Search a unit's documents with an arm."""
        own = {**settings, **arm.settings}
        with usage(torch.device("cpu")) as spent:
            search = own.pop("retriever")(RetrieveContext(self.bed, key), **own)
            data = self.bed.retrieval(key.split, key.base)
            scores: Scores = search(data.queries, data.documents)
        values = {
            MRR.name: {query: reciprocal_rank(scores[query], data.relevant[query]) for query in data.queries},
            NDCG.name: {query: ndcg(scores[query], data.relevant[query]) for query in data.queries},
        }
        return Result(values, Cost(seconds=spent.seconds, peak_bytes=spent.peak_bytes), {"data": data.digest})


def _ranked(scores: Mapping[str, float]) -> list[str]:
    return sorted(scores, key=lambda document: (-scores[document], document))[:DEPTH]


def reciprocal_rank(scores: Mapping[str, float], relevant: Mapping[str, int]) -> float:
    """Return 1 over the rank of the first relevant document, 0 below the tenth."""
    ranks = (rank for rank, document in enumerate(_ranked(scores), 1) if relevant.get(document))
    return 1 / next(ranks, math.inf)


def ndcg(scores: Mapping[str, float], relevant: Mapping[str, int]) -> float:
    """Return the normalised discounted cumulative gain of the first ten documents."""

    def gain(grades: list[int]) -> float:
        return sum((2**grade - 1) / math.log2(rank + 1) for rank, grade in enumerate(grades, 1))

    best = gain(sorted(relevant.values(), reverse=True)[:DEPTH])
    return gain([relevant.get(document, 0) for document in _ranked(scores)]) / best if best else 0.0
