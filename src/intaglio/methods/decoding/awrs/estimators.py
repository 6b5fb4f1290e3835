"""Adaptive weighted rejection sampling of one token: a token and an unbiased estimate of the accepted probability.

With p the next-token distribution after pruning, Z0 the mass before normalisation and A the accepted tokens, each
estimator returns (x, w) with E[w 1{x = v}] = Z0 p(v) 1[v in A] for every token v, and x ~ p(. | A) given a success.
Tokens are visited in the order of draws without replacement, so no token is checked twice.

Dimension letters: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np

Accept = Callable[[int], bool]
Draw = tuple[int, float]
"""A token, and the estimate w of the accepted share (0: the particle dies; the token was rejected)."""

TOLERANCE = 1e-5
"""Remaining mass below which the recursive estimator gives up, as in the authors' code."""
GEOMETRIC_FROM = 2 / 3
"""Largest probability from which the geometric estimator needs fewer checks than the recursive estimator."""


class Draws(Protocol):
    """Draws from the tokens that were not removed."""

    def sample(self) -> int | None:
        """Draw a token in proportion to its probability; None if none is left."""

    def remove(self, token: int) -> None:
        """Exclude a token from later draws."""

    def probability(self, token: int) -> float:
        """Return p of a token, removed or not."""

    def failures(self, success: float) -> int:
        """Draw the number of failures before the first success of independent trials."""


class WeightedDraws:
    """Draws by inversion of the cumulative sum, which is rebuilt once a draw hits a removed token.

    This has the law of visiting tokens by decreasing Gumbel-perturbed log-probability, without perturbing the whole
    vocabulary at every step.

    Args:
        probs_V: nonnegative, sum 1; left unchanged.
        rng: source of the draws.
    """

    def __init__(self, probs_V: np.ndarray, rng: np.random.Generator) -> None:
        self._probs_V = probs_V
        self._rng = rng
        self._removed: list[int] = []
        self._pending: set[int] = set()
        self._below_V = probs_V.cumsum()

    def sample(self) -> int | None:
        """Draw a token; None if no probability is left."""
        while self._below_V[-1] > 0:
            level = self._rng.random() * self._below_V[-1]
            token = int(np.searchsorted(self._below_V, level, side="right"))
            if token < len(self._below_V) and token not in self._pending:
                return token
            left_V = self._probs_V.copy()
            left_V[self._removed] = 0
            self._below_V = left_V.cumsum()
            self._pending.clear()
        return None

    def remove(self, token: int) -> None:
        """Exclude a token."""
        self._removed.append(token)
        self._pending.add(token)

    def probability(self, token: int) -> float:
        """Return p of a token."""
        return float(self._probs_V[token])

    def failures(self, success: float) -> int:
        """Draw from the geometric distribution, counted from 0."""
        return int(self._rng.geometric(success)) - 1


def two_loop(draws: Draws, accept: Accept) -> Draw:
    """Return a token and w = (1 - R1) / (n1 + n2 + 1): the paper's estimator.

    The first loop has n1 rejects of mass R1, then x. The second loop draws anew from the tokens not rejected, x
    included, until it accepts, after n2 rejects. (The authors' later code drops this estimator.)
    """
    rejects, mass = 0, 0.0
    token = draws.sample()
    last = token
    while token is not None and not accept(token):
        rejects += 1
        mass += draws.probability(token)
        draws.remove(token)
        last, token = token, draws.sample()
    if token is None:
        return _failure(last)
    while (again := draws.sample()) is not None and not accept(again):
        rejects += 1
        draws.remove(again)
    return token, (1 - mass) / (rejects + 1)


def recursive(draws: Draws, accept: Accept, max_rejects: float = math.inf) -> Draw:
    """Return a token and w by E f = p(x) f(x) + (1 - p(x)) E[f | not x].

    After each reject, w is multiplied by 1 - q for its share q of the remaining mass. At the first accepted token, the
    next token in the same order is tested: w stays if it is accepted, and is multiplied by q if not.
    """
    share, mass, rejects = 1.0, 0.0, 0
    token = draws.sample()
    if token is None:
        return _failure(None)
    while True:
        draws.remove(token)
        following = draws.sample()
        q = 1.0 if following is None else min(1.0, draws.probability(token) / (1 - mass))
        if accept(token):
            if rejects == max_rejects - 1 or following is None or accept(following):
                return token, share
            return token, share * q
        if following is None or rejects == max_rejects - 1:
            return _failure(token)
        rejects += 1
        mass += draws.probability(token)
        if mass >= 1 - TOLERANCE:
            return _failure(token)
        share *= 1 - q
        token = following


def geometric(draws: Draws, accept: Accept, max_accepts: int = 2, max_rejects: float = math.inf) -> Draw:
    """Return a token and w = min(max_accepts - 1, a) / (a + r - 1) after a accepts and r rejects with replacement.

    Runs with replacement are simulated: before each visited token, the rejects among the already rejected mass R are
    a geometric draw with success probability 1 - R. This is the Rao-Blackwellised negative-binomial estimator.
    """
    result = first_rejected = None
    accepts, mass, rejects = 0, 0.0, 0.0
    while accepts < max_accepts and rejects < max_rejects and (token := draws.sample()) is not None:
        if mass >= 1:  # rounded: what is left has no probability
            return _failure(first_rejected)
        if mass > 0:
            rejects += draws.failures(1 - mass)
        if rejects >= max_rejects:
            break
        if accept(token):
            accepts += 1
            result = token if result is None else result
        else:
            first_rejected = token if first_rejected is None else first_rejected
            rejects += 1
            mass += draws.probability(token)
            draws.remove(token)
    if result is None:
        return _failure(first_rejected)
    return result, min(max_accepts - 1, accepts) / (accepts + min(rejects, max_rejects) - 1)


def first_accepted(draws: Draws, accept: Accept, max_rejects: float = math.inf) -> Draw:
    """Return the first accepted token with w = 1: locally constrained decoding, x ~ p(. | A), no weight."""
    rejects, last = 0, None
    while rejects < max_rejects and (token := draws.sample()) is not None:
        if accept(token):
            return token, 1.0
        draws.remove(token)
        rejects, last = rejects + 1, token
    return _failure(last)


def _failure(rejected: int | None) -> Draw:
    """Return a rejected token (-1 where no token was drawn) with weight 0."""
    return -1 if rejected is None else rejected, 0.0
