"""Design that trains a recommender and ranks held-out items: `Recommend`.

Settings of an arm are those of `Pretrain` (`model` names the family), or `popularity` alone: items ranked by their
number of interactions, without training.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from intaglio.evidence.designs.base import Measure, Measured, Settings, Values
from intaglio.evidence.designs.training import Pretrain, data_digest
from intaglio.evidence.engine.claim import Arm, Metric, Result, RunKey
from intaglio.evidence.testbeds.movielens import MovieLens
from intaglio.measures.ranking import ndcg, ranking_metrics
from intaglio.methods.objectives.next_item import NextItemModel, Popularity, ranks

NDCG = Metric("NDCG@10", "share", "higher", continuous=False)
HIT_RATIO = Metric("HR@10", "share", "higher", continuous=False)
ITEM_LOSS = Metric("loss of the next item", "nats")


def next_items(measured: Measured) -> Values:
    """Return NDCG@10 and HR@10 of the questions by full ranking, seen items removed, and the softmax loss."""
    bed, key = measured.bed, measured.key
    questions = bed.questions(key.split, key.base)
    predictor = NextItemModel.from_checkpoint(measured.checkpoint)
    scores_BV = predictor.scores([question.history for question in questions])
    loss = F.cross_entropy(scores_BV, torch.tensor([question.target for question in questions]))
    return {**_ranked(predictor, questions), ITEM_LOSS.name: float(loss)}


def _ranked(predictor: Any, questions: Any) -> dict[str, float]:
    found = ranks(predictor, questions)
    return {NDCG.name: float(ndcg(found, 10).mean()), HIT_RATIO.name: ranking_metrics(found)["HR@10"]}


@dataclass(frozen=True)
class Recommend(Pretrain):
    """Train a recommender on every user's sequence without its last two items, and rank the questions' targets."""

    bed: Any = field(default_factory=MovieLens)
    measures: tuple[Measure, ...] = (next_items,)

    def run(self, arm: Arm, key: RunKey, settings: Settings) -> Result:
        """Train an arm on a unit, or take the popular items, and rank."""
        if not arm.settings.get("popularity"):
            return super().run(arm, key, settings)
        counts, questions = self.bed.load().counts, self.bed.questions(key.split, key.base)
        shares_V = (torch.tensor(counts[1:]).double() + 1).log().log_softmax(0)  # each item is counted once more
        loss = -shares_V[[question.target - 1 for question in questions]].mean()
        values = {**_ranked(Popularity(counts), questions), ITEM_LOSS.name: float(loss)}
        return Result(values, parity={"data": data_digest(self._data(key.seed, 0))})

    def _data(self, seed: int, steps: int) -> Any:
        return [{"input_ids": list(ids)} for ids in self.bed.training().values()]
