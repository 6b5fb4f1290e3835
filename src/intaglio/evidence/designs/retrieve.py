"""Design that measures retrieval of an encoder or index: `Retrieve`.

Settings of an arm: `retriever`, a function `(context, **settings) -> search`, where `search(queries, documents)` takes
`{id: text}` twice and returns `{query id: {document id: score}}`. Test beds give `retrieval(part, base)`.
"""

from __future__ import annotations

from collections.abc import Mapping
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
DEPTH = 10
_IR_NAMES = {MRR.name: "RR@10", NDCG.name: "nDCG@10"}
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
        with peak_memory(torch.device("cpu")) as spent:
            search = own.pop("retriever")(RetrieveContext(self.bed, key), **own)
            data = self.bed.retrieval(key.split, key.base)
            scores: Scores = search(data.queries, data.documents)
        values = {metric.name: per_query(scores, data.relevant, metric) for metric in (MRR, NDCG)}
        return Result(values, Cost(seconds=spent.seconds, peak_bytes=spent.bytes), {"data": data.digest})


def per_query(scores: Scores, relevant: Mapping[str, Mapping[str, int]], metric: Metric) -> dict[str, float]:
    """Return a metric of each query by ir-measures; of equal scores the smaller id comes first."""
    ranked = {query: sorted(of_query, key=lambda d: (-of_query[d], d))[:DEPTH] for query, of_query in scores.items()}
    run = {query: {name: float(-rank) for rank, name in enumerate(names)} for query, names in ranked.items()}
    measure = ir_measures.parse_measure(_IR_NAMES[metric.name])
    values = {value.query_id: float(value.value) for value in ir_measures.iter_calc([measure], relevant, run)}
    return {query: values.get(query, 0.0) for query in scores}
