"""Paired differences, their intervals, the verdicts that follow, and when a run stops.

Everything works on differences turned so that larger means "the method is better". The leading dimensions of every
array are a batch, so that tests can simulate thousands of claims at once:

- nested: `x_N`, one difference a unit (inner units belong to their unit and are averaged); paired t.
- crossed: `x_ND`, N units by D inner units that all of them share; both are random. Two-way analysis of variance with
  Satterthwaite's degrees of freedom.

By simulation of the whole path (tests), an effect of exactly delta is called *holds* in at most 2.5 % of claims, also
with heavy symmetric tails. A long tail to the bad side breaks that: 10 % where differences are skewed as much as an
exponential distribution.

scipy is needed: `pip install 'intaglio[evidence]'`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from intaglio.errors import IntaglioError
from intaglio.evidence.engine.claim import Claim, Kind, Metric

try:
    from scipy import special
except ImportError:
    raise IntaglioError("intervals need scipy, which is not installed; run pip install 'intaglio[evidence]'") from None

Array = NDArray[np.float64]
Verdict = Literal["holds", "smaller", "no effect", "worse", "undecided", "untestable here"]
Values = Mapping[str, float | None]
MAX_DIVERGED = 0.2
RESOLUTION = 0.25
"""Least standard deviation of a difference, in deltas: five equal differences are no proof that there is no spread."""
HEADROOM = 2.0
"""Deltas that ceiling and baseline must be apart, as far as three units can tell."""
WIDEST = 2.0
"""Deltas that the projected half-width at the last look may have."""
FUTILITY_Z = 1.28


def t_quantile(degrees: Array | float, upper_tail: float) -> Array:
    """Return the t value that leaves `upper_tail` above it."""
    return np.asarray(special.stdtrit(degrees, 1 - upper_tail))


@dataclass(frozen=True)
class Differences:
    """Paired differences `x` ([N] nested, [N, D] crossed; larger = better), and the shares of diverged values."""

    x: Array
    baseline_diverged: float = 0.0
    method_diverged: float = 0.0


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def pair(baseline: Sequence[Values], method: Sequence[Values], metric: Metric, crossed: bool) -> Differences:
    """Pair two arms, given as `{inner unit: value}` of each unit.

    A diverged value of the method takes the worst finite value of either arm; where the baseline diverged, the
    difference is 0, so that it cannot win for the method. Members of a cluster (`cluster/member`) are averaged first.
    """
    values = [value for arm in (baseline, method) for unit in arm for value in unit.values() if _finite(value)]
    sign = 1.0 if metric.better == "higher" else -1.0
    worst = sign * min((sign * float(value) for value in values if value is not None), default=0.0)

    def difference(b: float | None, m: float | None) -> float:
        if b is None or not math.isfinite(b):
            return 0.0
        change = sign * ((m if m is not None and math.isfinite(m) else worst) - b)
        return change / max(abs(b), 1e-12) if metric.relative else change

    rows = [
        average_clusters({name: difference(of_b[name], of_m[name]) for name in of_b})
        for of_b, of_m in zip(baseline, method, strict=True)
    ]
    if crossed and any(row.keys() != rows[0].keys() for row in rows):
        raise RuntimeError(f"the units are crossed, but do not have the same inner units of {metric.name}")
    table = [list(row.values()) for row in rows]
    return Differences(np.array(table) if crossed else np.array([np.mean(row) for row in table]),
                       diverged_share(baseline), diverged_share(method))  # fmt: skip


def average_clusters(values: Mapping[str, float]) -> dict[str, float]:
    """Return the mean of each cluster, in the order of their names; a name without `/` is a cluster of one."""
    clusters: dict[str, list[float]] = {}
    for name in sorted(values):
        clusters.setdefault(name.partition("/")[0], []).append(values[name])
    return {name: sum(members) / len(members) for name, members in clusters.items()}


def diverged_share(units: Sequence[Values]) -> float:
    """Return the share of values that are None or not finite."""
    values = [value for unit in units for value in unit.values()]
    return sum(not _finite(value) for value in values) / max(1, len(values))


@dataclass(frozen=True)
class Spread:
    """Mean difference, and its variance by what was sampled: the n units, the d inner units, both together.

    `rest` is counted in `units` and in `inner`; `inner`, `rest` and `d` are 0 for nested. `floor` is the least variance
    of one difference.
    """

    effect: Array
    n: int
    units: Array
    inner: Array
    rest: Array
    d: int
    floor: float

    @property
    def unit_sd(self) -> Array:
        """Standard deviation of a unit's difference."""
        return np.sqrt(np.maximum(self.units * self.n, self.floor))

    def half_width(self, alpha: float, n: int | None = None) -> Array:
        """Return half the width of the 1 - alpha interval, or its projection to n units over the same inner units."""
        units, inner, rest = self.units, self.inner, self.rest
        count = self.n
        if n is not None and n != self.n:
            units, inner, rest, count = units * self.n / n, inner - rest + rest * self.n / n, rest * self.n / n, n
        floor = self.floor / count
        if not self.d:
            return t_quantile(count - 1.0, alpha / 2) * np.sqrt(np.maximum(units, floor))
        # Never below what the units alone or the inner units alone show.
        variance = np.maximum.reduce([units + inner - rest, units, inner, np.full_like(units, floor)])
        squares = (units / variance) ** 2 / (count - 1) + (inner / variance) ** 2 / (self.d - 1)
        squares = squares + (rest / variance) ** 2 / ((count - 1) * (self.d - 1))
        return t_quantile(np.clip(1 / np.maximum(squares, 1e-9), 1.0, 1e9), alpha / 2) * np.sqrt(variance)


def spread(x: Array, delta: float, crossed: bool) -> Spread:
    """Return mean and variance parts of differences.

    Crossed: with S_N² the variance of the unit means, S_D² of the inner units' means and S_E² of the rest, the variance
    of the grand mean is S_N²/N + S_D²/D - S_E²/(N D).

    `x` is [..., N] or, crossed, [..., N, D], with at least 2 units. A quarter of `delta` is the least standard
    deviation that is believed.
    """
    floor = (RESOLUTION * delta) ** 2
    if not crossed:
        n = x.shape[-1]
        return Spread(x.mean(-1), n, x.var(-1, ddof=1) / n, np.zeros(x.shape[:-1]), np.zeros(x.shape[:-1]), 0, floor)
    n, d = x.shape[-2:]
    units, inner, effect = x.mean(-1), x.mean(-2), x.mean((-2, -1))
    rest = ((x - units[..., None] - inner[..., None, :] + effect[..., None, None]) ** 2).sum((-2, -1))
    return Spread(
        effect, n, units.var(-1, ddof=1) / n, inner.var(-1, ddof=1) / d, rest / ((n - 1) * (d - 1) * n * d), d, floor
    )


def verdicts(low: Array | float, high: Array | float, delta: float, kind: Kind = "better") -> NDArray[np.str_]:
    """Return the verdict of each interval; exactly one applies.

    `better`: *holds* if low > delta, *smaller* if 0 < low and high < delta, *worse* if high < 0, *no effect* if the
    interval contains 0 and lies within (-delta, delta), else *undecided*.
    `as good as`: *holds* if low > -delta, *worse* if high < -delta, else *undecided*.
    """
    low, high = np.asarray(low), np.asarray(high)
    if kind == "as good as":
        return np.select([low > -delta, high < -delta], ["holds", "worse"], "undecided")
    conditions = [low > delta, (low > 0) & (high < delta), high < 0, (low > -delta) & (high < delta)]
    return np.select(conditions, ["holds", "smaller", "worse", "no effect"], "undecided")


def best(values: Sequence[Array], metric: Metric) -> int:
    """Return the first index with the best mean; a diverged value counts as the worst."""
    sign = 1.0 if metric.better == "lower" else -1.0
    finite = np.concatenate([v[np.isfinite(v)] for v in values])
    worst = float((sign * finite).max()) if len(finite) else 0.0
    # A choice that always diverged comes last even where all finite values are equal.
    means = [(not np.isfinite(v).any(), float(np.where(np.isfinite(v), sign * v, worst).mean())) for v in values]
    return min(range(len(means)), key=means.__getitem__)


def prediction_interval(x_N: Array, delta: float, alpha: float = 0.01) -> tuple[float, float]:
    """Return the interval in which one further unit's difference falls: mean ± t_(N-1) s sqrt(1 + 1/N)."""
    seen = spread(x_N, delta, crossed=False)
    reach = float(t_quantile(seen.n - 1.0, alpha / 2) * seen.unit_sd) * math.sqrt(1 + 1 / seen.n)
    return float(seen.effect) - reach, float(seen.effect) + reach


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
