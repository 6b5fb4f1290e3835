"""Ranking measures for one relevant item: hit ratio, NDCG, reciprocal rank; sampled candidates.

    HR@k = [r < k]      NDCG@k = [r < k] / log2(r + 2)      RR = 1 / (r + 1)      r: rank, from 0

Dimension letters: B lists, V items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from intaglio.errors import IntaglioError

RankingProtocol = Literal["full", "popular", "uniform"]
"""Candidates of a ranking: all items, or the target among negatives drawn by popularity or uniformly."""
NEGATIVES = 100
"""Negatives of the sampled protocols, as in BERT4Rec's paper."""


def rank_of(scores_BV: Tensor, target_B: Tensor, candidates_BV: Tensor) -> Tensor:
    """Return the rank of each target among the candidates, int64 [B], from 0; ties count against the target."""
    own_B1 = scores_BV.gather(1, target_B[:, None])
    ahead_BV = (scores_BV >= own_B1) & candidates_BV
    ahead_BV.scatter_(1, target_B[:, None], False)
    return ahead_BV.sum(1)


def draw_candidates(weights_V: Tensor, seen: Sequence[int], target: int, count: int, rng: torch.Generator) -> Tensor:
    """Return the candidates of a sampled protocol, bool [V]: the target and `count` unseen items.

    Negatives are drawn without replacement, each with a probability proportional to its weight among those left; if
    fewer are unseen, all of them are candidates.
    """
    free_V = weights_V.double().clone()
    free_V[list(seen)] = 0
    free_V[target] = 0
    candidates_V = torch.zeros(len(free_V), dtype=torch.bool)
    count = min(count, int((free_V > 0).sum()))
    if count:
        candidates_V[torch.multinomial(free_V, count, replacement=False, generator=rng)] = True
    candidates_V[target] = True
    return candidates_V


def hit_ratio(ranks_B: Tensor, k: int) -> Tensor:
    """Return whether each rank is among the first k, float64 [B]."""
    return (ranks_B < k).double()


def ndcg(ranks_B: Tensor, k: int) -> Tensor:
    """Return the normalised discounted cumulative gain at k of each rank, float64 [B]."""
    return hit_ratio(ranks_B, k) / torch.log2(ranks_B.double() + 2)


def reciprocal_rank(ranks_B: Tensor) -> Tensor:
    """Return 1 / (rank + 1), float64 [B]."""
    return 1 / (ranks_B.double() + 1)


def ranking_metrics(ranks_B: Tensor, k: int = 10) -> dict[str, float]:
    """Return the mean measures over lists: `HR@k`, `NDCG@k`, `MRR`."""
    if not len(ranks_B):
        raise IntaglioError("there is nothing to rank; at least one target is needed")
    return {
        f"HR@{k}": float(hit_ratio(ranks_B, k).mean()),
        f"NDCG@{k}": float(ndcg(ranks_B, k).mean()),
        "MRR": float(reciprocal_rank(ranks_B).mean()),
    }
