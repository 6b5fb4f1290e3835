"""Retrieval on held-out pairs while an encoder trains: metrics, and sample queries for the report.

Dimension letters: Q queries, N documents, D dimensions of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.data.text_pairs import TextPair
from intaglio.errors import shorten
from intaglio.measures.ranking import hit_ratio, ndcg, reciprocal_rank
from intaglio.trainer.encoder_training import EncoderObjective
from intaglio.trainer.samples import Sample, Samples

DEPTH = 10
SHOWN = 6
"""Queries in the report."""
PART = 256
"""Documents that are encoded at a time: vectors over a vocabulary are large."""


@dataclass(frozen=True)
class RetrievalTask:
    """Queries of held-out pairs, and all of their texts as documents.

    Args:
        pairs: with their negatives, which are documents as well.
    """

    pairs: Sequence[TextPair]

    @cached_property
    def query_pairs(self) -> dict[str, TextPair]:
        """The distinct queries, each with its first pair."""
        pairs: dict[str, TextPair] = {}
        for pair in self.pairs:
            pairs.setdefault(pair.query, pair)
        return pairs

    @cached_property
    def document_pairs(self) -> dict[str, TextPair]:
        """The distinct documents, each with its first pair."""
        pairs: dict[str, TextPair] = {}
        for pair in self.pairs:
            for text in (pair.positive, *pair.negatives):
                pairs.setdefault(text, pair)
        return pairs

    @property
    def queries(self) -> list[str]:
        """The distinct queries."""
        return list(self.query_pairs)

    @property
    def documents(self) -> list[str]:
        """The distinct documents."""
        return list(self.document_pairs)

    @cached_property
    def relevant(self) -> list[list[int]]:
        """The places of the relevant documents of each query."""
        place = {text: number for number, text in enumerate(self.documents)}
        known: dict[str, dict[int, None]] = {}
        for pair in self.pairs:
            known.setdefault(pair.query, {})[place[pair.positive]] = None
        return [list(known[query]) for query in self.queries]


@torch.no_grad()
def search(objective: EncoderObjective, checkpoint: Checkpoint, task: RetrievalTask) -> Tensor:
    """Return the scores of all documents for all queries, float32 [Q, N]."""
    query_QD = objective.encode(checkpoint, task.queries, "query", pairs=list(task.query_pairs.values()))
    texts, pairs = task.documents, list(task.document_pairs.values())
    parts = [slice(start, start + PART) for start in range(0, len(texts), PART)]
    scores = [query_QD @ objective.encode(checkpoint, texts[p], "document", pairs=pairs[p]).T for p in parts]
    return torch.cat(scores, dim=1)


def ranking_quality(scores_QN: Tensor, relevant: Sequence[Sequence[int]]) -> dict[str, float]:
    """Return the means over queries of `nDCG@10` and `MRR@10`; of equal scores the irrelevant documents come first."""
    gains, reciprocals = [], []
    for scores_N, own in zip(scores_QN, relevant, strict=True):
        irrelevant_N = torch.ones(len(scores_N), dtype=torch.bool)
        irrelevant_N[list(own)] = False
        best = scores_N[list(own)].sort(descending=True).values
        places_R = torch.arange(len(best))
        ranks_R = places_R + ((scores_N >= best[:, None]) & irrelevant_N).sum(1)
        gains.append(float(ndcg(ranks_R, DEPTH).sum() / ndcg(places_R, DEPTH).sum()))
        reciprocals.append(float(hit_ratio(ranks_R, DEPTH)[0] * reciprocal_rank(ranks_R)[0]))
    return {f"nDCG@{DEPTH}": sum(gains) / len(gains), f"MRR@{DEPTH}": sum(reciprocals) / len(reciprocals)}


def retrieval_evaluator(
    objective: EncoderObjective, pairs: Sequence[TextPair]
) -> Callable[[Checkpoint], dict[str, float]]:
    """Return a function that searches the documents of held-out pairs, for `train(evaluate=...)` or on its own.

    Args:
        objective: the same object that trains.
        pairs: held out.

    Returns:
        A function of the checkpoint: `nDCG@10`, `MRR@10`, and `error`, 1 - nDCG@10, to stop early by.
    """
    task = RetrievalTask(pairs)

    def evaluate(checkpoint: Checkpoint) -> dict[str, float]:
        quality = ranking_quality(search(objective, checkpoint, task), task.relevant)
        return {**quality, "error": 1 - quality[f"nDCG@{DEPTH}"]}

    return evaluate


def retrieval_samples(objective: EncoderObjective, checkpoint: Checkpoint, pairs: Sequence[TextPair]) -> Samples:
    """Return the first queries of held-out pairs with their best documents, and the metrics in percent."""
    task = RetrievalTask(pairs)
    scores_QN = search(objective, checkpoint, task)
    first = scores_QN.argmax(1).tolist()
    shown = [
        Sample(query, shorten(task.documents[own[0]]), shorten(task.documents[best]))
        for query, own, best in zip(task.queries[:SHOWN], task.relevant, first, strict=False)
    ]
    quality = ranking_quality(scores_QN, task.relevant)
    return Samples(shown, {name: 100 * value for name, value in quality.items()})
