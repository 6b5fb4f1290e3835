"""Design that makes a new encoder compatible with an old one and searches old and new documents: `Compatible`.

Settings of an arm: `method`, a `BT2`, whose fields they are otherwise, with `steps`, `learning_rate` and `batch_size`
of the head's training; or `reembed`: the new encoder as it is, which cannot search old documents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from intaglio.evidence.designs.base import BedDesign, Configured, Settings
from intaglio.evidence.designs.retrieve import MRR, per_query, ranking_loss
from intaglio.evidence.engine.claim import Arm, Cost, Metric, Result, RunKey
from intaglio.evidence.testbeds.encoder_versions import EncoderVersions
from intaglio.measures.memory import peak_memory
from intaglio.methods.retrieval.bt2 import CachedPairs

BOTH = Metric("mean of new/old and new/new MRR@10", "points", "higher", continuous=False)
NEW_OLD = Metric("new/old MRR@10", "points", "higher", continuous=False)
NEW_NEW = Metric("new/new MRR@10", "points", "higher", continuous=False)
OLD_OLD = Metric("old/old MRR@10", "points", "higher", continuous=False)
LOSS = Metric("ranking loss among old documents", "nats")
DIMENSIONS = Metric("dimensions", "numbers", continuous=False)


@dataclass(frozen=True)
class Compatible(BedDesign):
    """Train a head on cached vectors and measure its queries per query; a unit is a training of the old encoder."""

    bed: EncoderVersions = field(default_factory=EncoderVersions)
    MINIATURE: ClassVar[Mapping[str, Any]] = {}

    def run(self, arm: Arm, key: RunKey, settings: Settings) -> Result:
        """Make the new encoder compatible by an arm and search."""
        own, bed, seed = Configured(arm, settings), self.bed, key.seed
        data = bed.retrieval(key.split, key.base)
        texts = list(data.queries.values()), list(data.documents.values())
        old_QM, old_NM = (bed.old_vectors(seed, t, side) for t, side in zip(texts, ("query", "document"), strict=True))
        new_QH, new_NH = (bed.new_vectors(t) for t in texts)
        pairs = CachedPairs(*bed.cached_pairs(seed))
        with peak_memory(torch.device("cpu")) as spent:
            if own.pop("reembed", False):
                query_QD, document_ND, cross_QM = new_QH, new_NH, torch.zeros_like(old_QM)
            else:
                options = own.pop_all(("steps", "learning_rate", "batch_size"))
                method = own.fill(own.pop("method"))
                own.check()
                head = method.fit_head(pairs, seed=seed % 2**31, **options)
                with torch.no_grad():
                    query_QD, document_ND = head(new_QH).vectors, head(new_NH).vectors
                    cross_QM = head.old_block(query_QD)

        def scores(queries: Tensor, documents: Tensor) -> dict[str, dict[str, float]]:
            rows = (queries @ documents.T).tolist()
            return {
                name: dict(zip(data.documents, row, strict=True)) for name, row in zip(data.queries, rows, strict=True)
            }

        cross = scores(cross_QM, old_NM)
        new_old, new_new = (per_query(s, data.relevant, MRR) for s in (cross, scores(query_QD, document_ND)))
        values: dict[str, Any] = {
            BOTH.name: {name: (new_old[name] + new_new[name]) / 2 for name in new_old},
            NEW_OLD.name: new_old,
            NEW_NEW.name: new_new,
            OLD_OLD.name: per_query(scores(old_QM, old_NM), data.relevant, MRR),
            LOSS.name: ranking_loss(cross, data.relevant, list(data.documents)),
            DIMENSIONS.name: float(query_QD.shape[1]),
        }
        return Result(values, Cost(seconds=spent.seconds, peak_bytes=spent.bytes), {"data": data.digest})
