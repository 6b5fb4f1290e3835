"""Budgets of the clusters, and the efficiency score of a sample.

Dimension letters: K clusters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

ROUNDING = 1e-9
"""Tolerance below a whole number when rounding down."""


def efficiency(degradation: float, tokens: int) -> float:
    """Return IES = J / ln(cost) with cost = tokens ** 2, the cost of attention over a sample of that length."""
    return degradation / max(1.0, 2 * math.log(max(1, tokens)))


def budgets(weights_K: Sequence[float], sizes_K: Sequence[int], total: int, *, redistribute: bool = True) -> list[int]:
    """Return n_k = floor(B w_k / sum of w), at most the size of the cluster, with the remainder distributed if `whole`.

    The remainder goes by the largest fractions first, then in the same proportions to clusters that have samples left.
    Where all weights are 0 (nothing is degraded), all clusters weigh the same.
    """
    weights = [float(weight) if size else 0.0 for weight, size in zip(weights_K, sizes_K, strict=True)]
    if not sum(weights):
        weights = [1.0 if size else 0.0 for size in sizes_K]
    if total <= 0 or not sum(weights):
        return [0] * len(weights)
    shares = [total * weight / sum(weights) for weight in weights]
    given = [min(math.floor(share + ROUNDING), size) for share, size in zip(shares, sizes_K, strict=True)]
    if not redistribute:
        return given
    left = min(total, sum(sizes_K)) - sum(given)
    for k in sorted(range(len(shares)), key=lambda k: (math.floor(shares[k] + ROUNDING) - shares[k], k)):
        if left and weights[k] and given[k] < sizes_K[k] and shares[k] > given[k] + ROUNDING:
            given[k], left = given[k] + 1, left - 1
    if left:  # small clusters are full: redistribute to the others
        remaining = [size - n for size, n in zip(sizes_K, given, strict=True)]
        open_weights = [weight if rest else 0.0 for weight, rest in zip(weights, remaining, strict=True)]
        more = budgets(open_weights, remaining, left)
        given = [n + extra for n, extra in zip(given, more, strict=True)]
    return given
