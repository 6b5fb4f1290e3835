"""Reciprocal rank fusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

CONSTANT = 60
"""Smoothing of the ranks, as published."""


def reciprocal_rank(rankings: Mapping[str, Sequence[int]], k: int) -> list[tuple[int, float]]:
    """Fuse rankings.

        score(d) = Σ_r 1 / (60 + rank_r(d)),  over the rankings that hold d

    Args:
        rankings: items in descending order, by retriever.
        k: most items returned.

    Returns:
        (item, score) in descending order of score; equal scores in ascending order of item.

    Source: Cormack, Clarke and Büttcher, "Reciprocal rank fusion outperforms Condorcet", SIGIR 2009.
    """
    scores: dict[int, float] = {}
    for ranking in rankings.values():
        for rank, item in enumerate(ranking, 1):
            scores[item] = scores.get(item, 0.0) + 1 / (CONSTANT + rank)
    return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))[:k]


__all__ = ["reciprocal_rank"]
