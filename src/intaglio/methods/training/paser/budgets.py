"""How many samples each cluster may give, and which of them come first.

Dimension letters: K clusters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

ROUNDING = 1e-9
"""A share that is short of a whole number by less is that number."""


def efficiency(degradation: float, tokens: int) -> float:
    """IES = J / ln(cost) with cost = tokens ** 2, what attention over a sample of that length takes.

    Args:
        degradation: J.
        tokens: of prompt and answer. A cost of at most e counts as e, where the logarithm would reach 0.
    """
    return degradation / max(1.0, 2 * math.log(max(1, tokens)))


def budgets(weights_K: Sequence[float], sizes_K: Sequence[int], total: int, *, whole: bool = True) -> list[int]:
    """n_k = floor(B w_k / sum of w), at most the size of the cluster, and what that leaves over given out.

    What is left goes by the largest remainders first, then in the same proportions to clusters that have samples left.
    Where all weights are 0 (nothing is degraded), all clusters weigh the same.

    Args:
        weights_K: w, at least 0: how degraded each cluster is.
        sizes_K: samples of each.
        total: B.
        whole: False drops what rounding leaves and what small clusters cannot fill, as the authors' code does.
            Default True: the budgets sum to B, or to all samples if there are fewer.
    """
    weights = [float(weight) if size else 0.0 for weight, size in zip(weights_K, sizes_K, strict=True)]
    if not sum(weights):
        weights = [1.0 if size else 0.0 for size in sizes_K]
    if total <= 0 or not sum(weights):
        return [0] * len(weights)
    shares = [total * weight / sum(weights) for weight in weights]
    given = [min(math.floor(share + ROUNDING), size) for share, size in zip(shares, sizes_K, strict=True)]
    if not whole:
        return given
    left = min(total, sum(sizes_K)) - sum(given)
    for k in sorted(range(len(shares)), key=lambda k: (math.floor(shares[k] + ROUNDING) - shares[k], k)):
        if left and weights[k] and given[k] < sizes_K[k] and shares[k] > given[k] + ROUNDING:
            given[k], left = given[k] + 1, left - 1
    if left:  # small clusters are full: the others share what is left
        room = [size - n for size, n in zip(sizes_K, given, strict=True)]
        open_K = [weight if rest else 0.0 for weight, rest in zip(weights, room, strict=True)]
        more = budgets(open_K, room, left)
        given = [n + extra for n, extra in zip(given, more, strict=True)]
    return given
