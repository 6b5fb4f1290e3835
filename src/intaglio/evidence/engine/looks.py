"""Decisions during a run: what the probe refuses, and when the looks stop.

Arrays may hold a batch of claims in their leading dimensions: tests simulate the whole path with the code that runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from intaglio.evidence.engine.claim import Claim
from intaglio.evidence.engine.statistics import MAX_DIVERGED, Array, Differences, spread, t_quantile, verdicts

HEADROOM = 2.0
"""Deltas that ceiling and baseline must be apart, as far as three units can tell."""
WIDEST = 2.0
"""Deltas that the projected half-width at the last look may have."""
FUTILITY_Z = 1.28


@dataclass(frozen=True)
class Look:
    """One look: interval at `1 - alpha`, verdict, and whether it stops: decided, futile, or the last."""

    units: int
    alpha: float
    effect: Array
    low: Array
    high: Array
    verdict: NDArray[np.str_]
    stop: NDArray[np.bool_]
    futile: NDArray[np.bool_]


def look(differences: Differences, claim: Claim, number: int) -> Look:
    """Judge a claim by its first `claim.looks[number]` units.

    Over 20 % diverged values in the baseline's arm: undecided, whatever the interval; else over 20 % in the method's
    arm: worse. Futility: the projected last interval contains the margin wherever the effect drifts to within
    1.28 sd sqrt(1/n - 1/n_last).
    """
    n, last, alpha = claim.looks[number], claim.looks[-1], claim.alphas[number]
    seen = spread(differences.x, claim.delta, claim.crossed)
    reach = seen.half_width(alpha)
    verdict = verdicts(seen.effect - reach, seen.effect + reach, claim.delta, claim.kind)
    if differences.baseline_diverged > MAX_DIVERGED:
        verdict = np.full_like(verdict, "undecided")
    elif differences.method_diverged > MAX_DIVERGED:
        verdict = np.full(verdict.shape, "worse")
    margin = claim.delta if claim.kind == "better" else -claim.delta
    drift = FUTILITY_Z * seen.unit_sd * math.sqrt(1 / n - 1 / last)
    final = seen.half_width(claim.alphas[-1], last)
    undecided = verdict == "undecided"
    futile = undecided & (n < last) & (np.abs(seen.effect - margin) + drift <= final)
    stop = ~undecided | futile | np.array(n == last)
    return Look(n, alpha, seen.effect, seen.effect - reach, seen.effect + reach, verdict, stop, futile)


@dataclass(frozen=True)
class Probe:
    """Judgement of three pilot units, which never looks at the effect.

    `headroom` is the 80 % upper bound of ceiling minus baseline (None: not judged), `flat` whether it is below 2 delta;
    `half_width` is projected at the last look, `wide` whether it is above 2 delta.
    """

    headroom: Array | None
    half_width: Array
    flat: NDArray[np.bool_]
    wide: NDArray[np.bool_]


def probe(differences: Array, headroom: Array | None, claim: Claim) -> Probe:
    """Judge a claim by pilot differences of method and baseline, and of ceiling and baseline (`headroom`)."""
    width = spread(differences, claim.delta, claim.crossed).half_width(claim.alphas[-1], claim.looks[-1])
    wide = width > WIDEST * claim.delta
    if headroom is None:
        return Probe(None, width, np.zeros_like(wide), wide)
    room = headroom.mean(-1) if claim.crossed else headroom
    seen = spread(room, claim.delta, crossed=False)
    upper = seen.effect + t_quantile(seen.n - 1.0, 0.2) * seen.unit_sd / math.sqrt(seen.n)
    return Probe(upper, width, upper < HEADROOM * claim.delta, wide)
