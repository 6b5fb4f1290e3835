"""Paired comparison of arms: effect, 95 % interval, verdict, and how many units a pilot asks for.

Everything here works on paired differences that are already turned so that larger means "the method is better".

Three designs, each with the interval that holds its level. Checked by simulation (4,000 experiments a cell, normal and
t with 5 degrees, 3 to 14 runs; 2.5 % wanted on each side):

- `independent`: paired t.
- `crossed` (C runs by D units): the variance of the grand mean from the two-way analysis of variance, with
  Satterthwaite's degrees of freedom: 1.6 to 3.5 % a side where a factor matters, less where neither does. A t interval
  on the means of the factor with fewer levels missed up to 45 % a side, because it takes the other factor's units for
  the only ones there are; the bootstrap over both factors missed 11 % a side with four runs.
- `clustered`: a studentised bootstrap over clusters: at most 4 % a side from 8 clusters on, also with very unequal
  sizes. The percentile bootstrap missed up to 13 % a side, the t interval with the cluster-robust variance up to 8 %.

Dimension letters: N differences, C runs, D units of a run, G clusters, B bootstrap samples.

scipy is needed: `pip install 'intaglio[evidence]'`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from intaglio.errors import IntaglioError
from intaglio.evidence.experiment import BOUND, FEWEST_RUNS, LEAST_RUNS, LEVEL, MOST_DIVERGED, TARGET, Design, Kind

try:
    from scipy import special
except ImportError:
    raise IntaglioError(
        "evidence is reckoned with scipy, which is not installed; run pip install 'intaglio[evidence]'"
    ) from None

Array = NDArray[np.float64]
Verdict = Literal["holds", "fails", "underpowered", "inconclusive"]
BOOTSTRAPS = 1999
SEED = 20_231_013
"""Of every bootstrap: the interval is a function of the values alone."""
MOST_UNITS = 10_000_000


@dataclass(frozen=True)
class Interval:
    """An effect with its 95 % interval.

    Args:
        effect: mean paired difference, larger = the method is better.
        low: end of the interval.
        high: the other end.
        p: two-sided p-value of "the effect is 0".
    """

    effect: float
    low: float
    high: float
    p: float

    @property
    def half_width(self) -> float:
        """Half the length of the interval."""
        return (self.high - self.low) / 2


def t_quantile(degrees: float) -> float:
    """The t value that a 95 % interval reaches out by.

    Args:
        degrees: of freedom, above 0; need not be whole.
    """
    return float(special.stdtrit(degrees, (1 + LEVEL) / 2))


def _t_interval(effect: float, variance: float, degrees: float) -> Interval:
    if variance <= 0:  # every difference is the same
        return Interval(effect, effect, effect, 1.0 if effect == 0 else 0.0)
    error = math.sqrt(variance)
    reach = t_quantile(degrees) * error
    p = 2 * float(special.stdtr(degrees, -abs(effect) / error))
    return Interval(effect, effect - reach, effect + reach, p)


def independent(differences_N: Array) -> Interval:
    """Paired t: mean ± t_(N-1) s / √N.

    Args:
        differences_N: one for each unit, at least 2.
    """
    n = len(differences_N)
    return _t_interval(float(differences_N.mean()), float(differences_N.var(ddof=1)) / n, n - 1)


@dataclass(frozen=True)
class _Parts:
    """What the variance of a crossed mean is made of.

    Args:
        runs: variance of the mean that the runs' means show.
        units: the same of the units' means.
        rest: what both of them count, so that it is counted twice.
    """

    runs: float
    units: float
    rest: float

    def total(self, c: int, d: int) -> tuple[float, float]:
        """The variance and its degrees of freedom (Satterthwaite), never below what one factor shows alone."""
        variance = max(self.runs + self.units - self.rest, self.runs, self.units)
        if variance <= 0:
            return 0.0, 1.0
        # Shares of the variance: squares of tiny variances would be 0.
        runs, units, rest = (part / variance for part in (self.runs, self.units, self.rest))
        return variance, max(1.0, 1 / (runs**2 / (c - 1) + units**2 / (d - 1) + rest**2 / ((c - 1) * (d - 1))))


def _parts(x_CD: Array) -> _Parts:
    c, d = x_CD.shape
    rest_CD = x_CD - x_CD.mean(1, keepdims=True) - x_CD.mean(0) + x_CD.mean()
    return _Parts(
        runs=float(x_CD.mean(1).var(ddof=1)) / c,
        units=float(x_CD.mean(0).var(ddof=1)) / d,
        rest=float((rest_CD**2).sum()) / ((c - 1) * (d - 1) * c * d),
    )


def crossed(differences_CD: Array) -> Interval:
    """Interval for the mean of x_cd = m + a_c + b_d + e_cd, all of a, b and e random.

    With S_C² the variance of the run means, S_D² of the unit means and S_E² of the rest,
    V = S_C²/C + S_D²/D - S_E²/(CD), at least each of the first two, and m ± t_f √V with Satterthwaite's
    f = V² / ((S_C²/C)²/(C-1) + (S_D²/D)²/(D-1) + (S_E²/CD)²/((C-1)(D-1))).

    Args:
        differences_CD: runs by units, at least 2 by 2.
    """
    return _t_interval(float(differences_CD.mean()), *_parts(differences_CD).total(*differences_CD.shape))


def clustered(clusters: Sequence[Array], seed: int = SEED) -> Interval:
    """Studentised bootstrap over clusters, for the mean over all units (each counts the same).

    Mean m = Σ s_g / Σ n_g, variance V = G/(G-1) Σ (s_g - n_g m)² / (Σ n_g)². Clusters are drawn with replacement;
    m ± q √V with q the 95 % quantile of |m* - m| / √V*. A sample without variance (one cluster only) counts as
    infinitely far.

    Args:
        clusters: the differences of each cluster, at least 4 of them.
        seed: of the bootstrap.
    """
    sizes_G = np.array([len(cluster) for cluster in clusters], dtype=float)
    # Taken from the mean before they are summed, so that adding a constant to all units moves the interval by it.
    centre = float(np.concatenate(list(clusters)).mean())
    sums_G = np.array([float((cluster - centre).sum()) for cluster in clusters])
    mean, variance = _ratio(sizes_G, sums_G)
    effect = centre + mean
    if variance <= 1e-24 * max(1.0, centre**2):
        return Interval(effect, effect, effect, 1.0 if effect == 0 else 0.0)
    means_B, variances_B = _resampled(sizes_G, sums_G, seed)
    # Below that, what is left of a sample's variance may be rounding.
    flat_B = variances_B <= 1e-6 * variance
    t_B = np.where(flat_B, np.inf, np.abs(means_B - mean) / np.sqrt(np.where(flat_B, 1.0, variances_B)))
    error = math.sqrt(variance)
    quantile = float(np.quantile(t_B, LEVEL, method="higher"))
    # Where most clusters are alike, many samples have no variance: then as far as t with one degree of freedom reaches.
    reach = error * (quantile if math.isfinite(quantile) else t_quantile(1))
    p = (1 + int((t_B >= abs(effect) / error).sum())) / (1 + BOOTSTRAPS)
    return Interval(effect, effect - reach, effect + reach, p)


def _ratio(sizes_G: Array, sums_G: Array) -> tuple[float, float]:
    """Mean over units and its cluster-robust variance."""
    total, g = float(sizes_G.sum()), len(sizes_G)
    mean = float(sums_G.sum()) / total
    return mean, g / (g - 1) * float(((sums_G - sizes_G * mean) ** 2).sum()) / total**2


def _resampled(sizes_G: Array, sums_G: Array, seed: int) -> tuple[Array, Array]:
    """`_ratio` of each bootstrap sample, from how often each cluster was drawn."""
    g = len(sizes_G)
    draw_BG = np.random.default_rng(seed).integers(g, size=(BOOTSTRAPS, g))
    draw_BG += g * np.arange(BOOTSTRAPS)[:, None]
    count_BG = np.bincount(draw_BG.ravel(), minlength=BOOTSTRAPS * g).reshape(BOOTSTRAPS, g).astype(float)
    moments_5G = np.stack([sizes_G, sums_G, sums_G**2, sums_G * sizes_G, sizes_G**2])
    # Not a BLAS product: its last bits may depend on the number of threads.
    n_B, s_B, ss_B, sn_B, nn_B = np.einsum("bg,kg->kb", count_BG, moments_5G)
    mean_B = s_B / n_B
    return mean_B, g / (g - 1) * (ss_B - 2 * mean_B * sn_B + mean_B**2 * nn_B) / n_B**2


def interval(design: Design, rows: Sequence[Array]) -> Interval:
    """The interval of a design.

    Args:
        design: how the rows hang together.
        rows: the differences of each run, in the order of the runs: one each (independent), any number (clustered), or
            equally many in one order of units (crossed).

    Raises:
        IntaglioError: there are too few runs for an interval.
    """
    if len(rows) < FEWEST_RUNS[design]:
        raise IntaglioError(f"{len(rows)} runs give no interval; at least {FEWEST_RUNS[design]} are needed")
    if design == "clustered":
        return clustered(rows)
    table_CD = np.stack([np.asarray(row, dtype=float) for row in rows])
    return crossed(table_CD) if design == "crossed" else independent(table_CD[:, 0])


def verdict(found: Interval, delta: float, kind: Kind = "better", diverged: float = 0.0) -> Verdict:
    """What an interval says about a claim.

    Over 20 % diverged units in the method's arm: fails. Else *holds* if the interval lies above delta and *fails* if it
    lies below; these are decided first. Of the rest, *underpowered* if the half-width exceeds delta, else
    *inconclusive*. "As good as" has the same with -delta in the place of delta.

    Args:
        found: the interval.
        delta: the least effect that matters, above 0.
        kind: of the claim.
        diverged: share of diverged units in the method's arm.
    """
    margin = delta if kind == "better" else -delta
    if diverged > MOST_DIVERGED:
        return "fails"
    if found.low > margin:
        return "holds"
    if found.high < margin:
        return "fails"
    return "underpowered" if found.half_width > delta else "inconclusive"


@dataclass(frozen=True)
class Paired:
    """Differences of two arms with the diverged units filled in.

    Args:
        rows: the differences of each run, larger = the method is better.
        baseline_diverged: share of the baseline's units.
        method_diverged: share of the method's units.
        baseline_mean: over units, diverged ones filled in.
        method_mean: the same.
    """

    rows: tuple[Array, ...]
    baseline_diverged: float
    method_diverged: float
    baseline_mean: float
    method_mean: float


def pair(baseline: Sequence[Array], method: Sequence[Array], direction: Literal["lower", "higher"]) -> Paired:
    """Pair two arms; a diverged unit takes the worst finite value that any unit of either arm has.

    Where no value is finite at all, every difference is 0 (and the share of diverged units decides).

    Args:
        baseline: values of each run; a diverged unit is NaN or infinite.
        method: the same, in the same order of runs and units.
        direction: which way of the metric is better.
    """
    flat_b, flat_m = np.concatenate(list(baseline)), np.concatenate(list(method))
    both = np.concatenate([flat_b, flat_m])
    finite = both[np.isfinite(both)]
    worst = 0.0 if not len(finite) else float(finite.max() if direction == "lower" else finite.min())

    def filled(values: Array) -> Array:
        return np.where(np.isfinite(values), values, worst)

    sign = 1.0 if direction == "higher" else -1.0
    return Paired(
        rows=tuple(sign * (filled(m) - filled(b)) for b, m in zip(baseline, method, strict=True)),
        baseline_diverged=float((~np.isfinite(flat_b)).mean()),
        method_diverged=float((~np.isfinite(flat_m)).mean()),
        baseline_mean=float(filled(flat_b).mean()),
        method_mean=float(filled(flat_m).mean()),
    )


def best(values: Mapping[str, Array], direction: Literal["lower", "higher"]) -> str:
    """The choice with the best mean; of equal ones the first. A diverged value counts as the worst of all.

    Args:
        values: of each choice, tried on the same data; a diverged one is NaN or infinite.
        direction: which way of the metric is better.
    """
    finite = np.concatenate([flat[np.isfinite(flat)] for flat in values.values()])
    sign = 1.0 if direction == "lower" else -1.0
    worst = float((sign * finite).max()) if len(finite) else 0.0
    means = {
        choice: float(np.where(np.isfinite(flat), sign * flat, worst).mean()) + 0.0 for choice, flat in values.items()
    }
    # One that never finished anything is no choice, even where nothing else was worse.
    some = {choice for choice, flat in values.items() if np.isfinite(flat).any()} or set(means)
    return min((choice for choice in means if choice in some), key=lambda choice: means[choice])


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: the k-th smallest of m times (m - k + 1), made monotone, at most 1.

    Args:
        p: the raw ones.
    """
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, p[index] * (len(p) - rank)))
        adjusted[index] = highest
    return adjusted


def upper_variance(variance: float, degrees: int) -> float:
    """The upper 80 % bound of a variance: s² f / χ²_(0.2; f).

    Args:
        variance: s², as a pilot shows it.
        degrees: f, at least 1.
    """
    return variance * degrees / float(special.chdtri(degrees, BOUND))  # chdtri counts from the upper tail


def _least(half_width: Callable[[int], float], fewest: int, delta: float) -> int | None:
    """The least n from `fewest` on with a half-width of at most 0.6 delta; None if there is none."""
    target = TARGET * delta
    if half_width(fewest) <= target:
        return fewest
    low, high = fewest, fewest * 2
    while half_width(high) > target:
        low, high = high, high * 2
        if high > MOST_UNITS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if half_width(middle) <= target else (middle, high)
    return high


@dataclass(frozen=True)
class Larger:
    """What would make an interval narrow enough, if the spreads are as a run saw them.

    Args:
        runs: that many.
        units: (crossed) over that many units each; None for other designs.
        of_runs: (crossed) share of the squared width that comes from which runs there were; None for other designs.
        of_units: (crossed) the same for the units. What is left of 1 is neither's alone.
    """

    runs: int
    units: int | None = None
    of_runs: float | None = None
    of_units: float | None = None


def larger(design: Design, rows: Sequence[Array], delta: float) -> Larger | None:
    """How large a run would have a half-width of 0.6 delta, by a finished run's spreads as they stand.

    Of the crossed design both factors grow alike, from as many as there were. Not smaller than the run was.

    Args:
        design: how the rows hang together.
        rows: the differences of each run, as `interval` takes them.
        delta: the least effect that matters.

    Returns:
        None where it would take more than ten million runs.
    """
    if design == "clustered":
        sizes_G = np.array([len(cluster) for cluster in rows], dtype=float)
        _, variance = _ratio(sizes_G, np.array([float(cluster.sum()) for cluster in rows]))
        found = _least(_cluster_width(sizes_G, variance * len(rows)), len(rows), delta)
        return None if found is None else Larger(found)
    table_CD = np.stack([np.asarray(row, dtype=float) for row in rows])
    c, d = table_CD.shape
    if design == "independent":
        spread = float(table_CD[:, 0].var(ddof=1))
        found = _least(lambda n: t_quantile(n - 1) * math.sqrt(spread / n), c, delta)
        return None if found is None else Larger(found)
    seen = _parts(table_CD)
    of_runs, of_units = (max(0.0, part - seen.rest) for part in (seen.runs, seen.units))

    def half_width(n: int) -> float:
        many = max(2, round(d * n / c))
        both = seen.rest * c * d / (n * many)
        variance, degrees = _Parts(of_runs * c / n + both, of_units * d / many + both, both).total(n, many)
        return t_quantile(degrees) * math.sqrt(variance)

    found = _least(half_width, c, delta)
    whole = (of_runs + of_units + seen.rest) or 1.0
    return None if found is None else Larger(found, max(2, round(d * found / c)), of_runs / whole, of_units / whole)


def units_needed(differences_N: Array, delta: float) -> int:
    """Units of an independent run, so that the half-width of its interval is expected to be at most 0.6 delta.

    The least n with t_(n-1) s⁺ / √n <= 0.6 delta, s⁺ the upper 80 % bound of the pilot's standard deviation; at
    least 5.

    Args:
        differences_N: the pilot's, at least 2.
        delta: the least effect that matters.
    """
    variance = upper_variance(float(differences_N.var(ddof=1)), len(differences_N) - 1)
    found = _least(lambda n: t_quantile(n - 1) * math.sqrt(variance / n), LEAST_RUNS["independent"], delta)
    return MOST_UNITS if found is None else found


def clusters_needed(clusters: Sequence[Array], delta: float) -> int:
    """Clusters of a clustered run; see `units_needed`.

    The pilot's cluster totals about its mean, over the mean size, play the part of the differences. Unequal clusters
    count for fewer, (Σ n)² / Σ n², and the studentised bootstrap reaches out about as far as t does with half of that
    (in the simulations: 15 to 30 clusters, sizes 1 to 8 and log-normal).

    Args:
        clusters: the pilot's, at least 4.
        delta: the least effect that matters.
    """
    sizes_G = np.array([len(cluster) for cluster in clusters], dtype=float)
    sums_G = np.array([float(cluster.sum()) for cluster in clusters])
    _, variance = _ratio(sizes_G, sums_G)
    g = len(sizes_G)
    one = upper_variance(variance * g, g - 1)
    found = _least(_cluster_width(sizes_G, one), LEAST_RUNS["clustered"], delta)
    return MOST_UNITS if found is None else found


def _cluster_width(sizes_G: Array, one: float) -> Callable[[int], float]:
    """The half-width that n clusters of such sizes are expected to have, from the variance of one."""
    effective = float(sizes_G.sum() ** 2 / (sizes_G**2).sum()) / len(sizes_G)
    return lambda n: t_quantile(max(1.0, effective * n / 2 - 1)) * math.sqrt(one / n)


def draws_needed(differences_CD: Array, delta: float, units: int) -> int | None:
    """Runs of a crossed run over a given number of units; see `units_needed`. For the reverse, transpose the pilot.

    The pilot's variances of run means and of unit means are taken at their upper 80 % bounds, and so is the rest; what
    the rest gives to the means is taken off before they are carried over to the new numbers.

    Args:
        differences_CD: the pilot's, at least 2 by 2.
        delta: the least effect that matters.
        units: that each run will have.

    Returns:
        The least number, at least 4; None if none suffices, because the units are too few.
    """
    c, d = differences_CD.shape
    seen = _parts(differences_CD)
    rest = seen.rest * c * d
    of_runs = max(0.0, upper_variance(seen.runs * c, c - 1) - rest / d)
    of_units = max(0.0, upper_variance(seen.units * d, d - 1) - rest / c)
    rest = upper_variance(rest, (c - 1) * (d - 1))

    def half_width(n: int) -> float:
        both = rest / (n * units)
        variance, degrees = _Parts(of_runs / n + both, of_units / units + both, both).total(n, units)
        return t_quantile(degrees) * math.sqrt(variance)

    return _least(half_width, LEAST_RUNS["crossed"], delta)


def runs_needed(design: Design, rows: Sequence[Array], delta: float, units: int | None = None) -> int | None:
    """Runs that a pilot asks for.

    Args:
        design: how the rows hang together.
        rows: the pilot's differences, as `interval` takes them.
        delta: the least effect that matters.
        units: (crossed) units that each run will have.

    Returns:
        The least number; None where no number suffices.
    """
    if design == "clustered":
        return clusters_needed(rows, delta)
    table_CD = np.stack([np.asarray(row, dtype=float) for row in rows])
    if design == "independent":
        return units_needed(table_CD[:, 0], delta)
    assert units is not None
    return draws_needed(table_CD, delta, units)
