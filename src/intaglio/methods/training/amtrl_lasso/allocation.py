"""Relevance of source tasks to a target, and the number of samples to draw from each.

Dimension letters: K representation, T source tasks (heads), S sources, C target heads.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np

from intaglio.errors import IntaglioError

Strategy = Literal["l1", "l2", "uniform"]
"""Rule of the allocation: the Lasso, the least-norm solution of 2022, or equal shares."""
CostShape = Literal["linear", "saltus", "hyperbolic"]
PENALTIES = 30
"""Penalties of the path at whose end a Lasso is solved."""


def least_norm(W_KT: np.ndarray, w_K: np.ndarray) -> np.ndarray:
    """Return `nu^2 = pinv(W) w`, the least-squares solution of `W nu = w` with the least Euclidean norm, [T]."""
    solution: np.ndarray = np.linalg.lstsq(W_KT, w_K, rcond=None)[0]
    return solution


def basis_pursuit(W_KT: np.ndarray, w_K: np.ndarray) -> np.ndarray:
    """Return `nu^1 = argmin ||nu||_1 s.t. W nu = w`, [T].

    Raises:
        IntaglioError: no nu solves the equation.
    """
    from scipy.optimize import linprog

    result = linprog(np.ones(2 * W_KT.shape[1]), A_eq=np.hstack([W_KT, -W_KT]), b_eq=w_K, method="highs")
    if not result.success:
        raise IntaglioError("the target is no combination of the sources, so that basis pursuit has no solution")
    positive, negative = np.split(result.x, 2)
    return np.asarray(positive - negative)


def lasso(W_KT: np.ndarray, w_K: np.ndarray, penalty: float) -> np.ndarray:
    """Return `argmin_nu 0.5 ||W nu - w||_2^2 + penalty ||nu||_1`, [T]; zeros from `max |W^T w|` on."""
    if penalty >= largest_penalty(W_KT, w_K):
        return np.zeros(W_KT.shape[1])
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import lasso_path

    # Least-angle steps fail where heads repeat, so coordinates descend, along a path of falling penalties.
    # scikit-learn divides the squared error by the number of equations.
    penalties = np.geomspace(largest_penalty(W_KT, w_K), penalty, PENALTIES)
    with warnings.catch_warnings():
        # Heads that are nearly combinations of each other end above this tolerance, far below what moves a sample.
        warnings.simplefilter("ignore", ConvergenceWarning)
        path = lasso_path(W_KT, w_K, alphas=penalties / len(w_K), tol=1e-11, max_iter=100_000)[1]
    return np.asarray(path[:, -1])


def largest_penalty(W_KT: np.ndarray, w_K: np.ndarray) -> float:
    """Return `max |W^T w|`, the least penalty under which the Lasso is zero."""
    return float(np.abs(W_KT.T @ w_K).max(initial=0.0))


def allocate(
    weights_S: np.ndarray, total: int, least: int | Sequence[int] = 0, most: Sequence[int] | None = None
) -> np.ndarray:
    """Return how many samples to draw from each source: `max(least, c weight)` with c such that they add up to `total`.

    Fractions are rounded by largest remainder. Sources that have no more leave their share to the others. Where all
    weights (of sources that have more) are zero, the rest is divided equally.

    Args:
        weights_S: at least 0; proportional to the samples.
        total: N, samples of all sources.
        least: of each source. Default 0.
        most: of each source. Default: any number.

    Returns:
        int64 [S], their sum exactly `total`.

    Raises:
        IntaglioError: `total` lies below the sum of `least` or above that of `most`.
    """
    weights = np.asarray(weights_S, dtype=np.float64)
    low = np.broadcast_to(np.asarray(least, dtype=np.float64), weights.shape).copy()
    high = np.full(weights.shape, float(total)) if most is None else np.asarray(most, dtype=np.float64)
    low = np.minimum(low, high)
    if not low.sum() <= total <= high.sum():
        raise IntaglioError(
            f"samples is {total}; the sources take at least {low.sum():.0f} and have at most {high.sum():.0f}"
        )
    if weights.max(initial=0.0) > 0:
        weights = weights / weights.max()  # of any scale
    if np.where(weights > 0, high, low).sum() < total:
        low, weights = np.where(weights > 0, high, low), np.ones(weights.shape)
    small, large = 0.0, 1.0
    while np.clip(large * weights, low, high).sum() < total:
        large *= 2
    for _ in range(100):
        middle = (small + large) / 2
        small, large = (middle, large) if np.clip(middle * weights, low, high).sum() < total else (small, middle)
    exact = np.clip(large * weights, low, high)
    counts = np.floor(exact + 1e-9)
    order = np.argsort(-(exact - counts), kind="stable")
    order = order[counts[order] < high[order]]
    counts[order[: round(float(total - counts.sum()))]] += 1
    return counts.astype(np.int64)


def excess_risk(nu_S: np.ndarray, counts_S: np.ndarray) -> float:
    """Return `sum_t nu(t)^2 / n_t`, to which the bound on the target's excess risk is proportional."""
    needed = nu_S != 0
    return float((nu_S[needed] ** 2 / counts_S[needed]).sum())


def sampling_cost(counts_S: np.ndarray, shape: CostShape = "linear", fixed: float = 0.0) -> float:
    """Return the cost of samples: n, `fixed + n` for each source that is used at all, or `n / (1 + n / fixed)`.

    Args:
        counts_S: samples n of each source.
        shape: `linear` (default), `saltus`, a price of activation, or `hyperbolic`, which tends to `fixed`.
        fixed: price of activation, or the limit; above 0 under `hyperbolic`. Default 0.
    """
    n = np.asarray(counts_S, dtype=np.float64)
    if shape == "hyperbolic":
        return float((n / (1 + n / fixed)).sum())
    return float((n + (fixed if shape == "saltus" else 0.0) * (n > 0)).sum())
