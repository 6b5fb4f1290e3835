"""Design that measures retrieval of an encoder or index: `Retrieve`.

Settings of an arm: `retriever`, a function `(context, **settings) -> search`, where `search(queries, documents)` takes
`{id: text}` twice and returns `{query id: {document id: score}}`. Test beds give `retrieval(part, base)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ir_measures
import torch

from intaglio.evidence.designs.base import BedDesign, Settings
from intaglio.evidence.engine.claim import Arm, Cost, Metric, Result, RunKey
from intaglio.evidence.testbeds.docstrings import Docstrings
from intaglio.measures.memory import peak_memory

MRR = Metric("MRR@10", "points", "higher", continuous=False)
NDCG = Metric("nDCG@10", "points", "higher", continuous=False)
RANKING_LOSS = Metric("ranking loss", "nats")
QUERY_TERMS = Metric("query terms", "terms", continuous=False)
DOCUMENT_TERMS = Metric("document terms", "terms", continuous=False)
DEPTH = 10
_IR_NAMES = {MRR.name: "RR@10", NDCG.name: "nDCG@10"}
Scores = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class RetrieveContext:
    """Inputs of a function that makes a retriever: test bed and key of the run, and further values that it measures."""

    bed: Any
    key: RunKey
    values: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Retrieve(BedDesign):
    """Train or load a retriever on a unit and measure it per query."""

    bed: Any = field(default_factory=Docstrings)

    def run(self, arm: Arm, key: RunKey, settings: Settings) -> Result:
        """Search a unit's documents with an arm."""
        own = {**settings, **arm.settings}
        with peak_memory(torch.device("cpu")) as spent:
            context = RetrieveContext(self.bed, key)
            search = own.pop("retriever")(context, **own)
            data = self.bed.retrieval(key.split, key.base)
            scores: Scores = search(data.queries, data.documents)
        values: dict[str, Any] = {metric.name: per_query(scores, data.relevant, metric) for metric in (MRR, NDCG)}
        values[RANKING_LOSS.name] = ranking_loss(scores, data.relevant, list(data.documents))
        values |= context.values
        return Result(values, Cost(seconds=spent.seconds, peak_bytes=spent.bytes), {"data": data.digest})


def ranking_loss(scores: Scores, relevant: Mapping[str, Mapping[str, int]], documents: Sequence[str]) -> float:
    """Return the mean of -log softmax of the relevant documents' scores; a document without a score has 0."""
    losses = []
    for query, of_query in scores.items():
        log_probs = torch.tensor([of_query.get(name, 0.0) for name in documents], dtype=torch.float64).log_softmax(0)
        losses += [-float(log_probs[documents.index(name)]) for name in relevant[query]]
    return sum(losses) / len(losses)


def per_query(scores: Scores, relevant: Mapping[str, Mapping[str, int]], metric: Metric) -> dict[str, float]:
    """Return a metric of each query by ir-measures; of equal scores the smaller id comes first."""
    ranked = {query: sorted(of_query, key=lambda d: (-of_query[d], d))[:DEPTH] for query, of_query in scores.items()}
    run = {query: {name: float(-rank) for rank, name in enumerate(names)} for query, names in ranked.items()}
    measure = ir_measures.parse_measure(_IR_NAMES[metric.name])
    values = {value.query_id: float(value.value) for value in ir_measures.iter_calc([measure], relevant, run)}
    return {query: values.get(query, 0.0) for query in scores}
