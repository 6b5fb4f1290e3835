"""The harness before any method: error rates and power over simulated experiments, and exact facts.

Rates are over 500 whole experiments (pilot, number of units, run, interval, verdict), seeded. Intervals have 2.5 % a
side; at that rate more than the 5 % asked for (25 of 500) happens once in a thousand, so the bounds below are the
issue's own, with no slack for chance added.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as reference

from intaglio.errors import IntaglioError
from intaglio.evidence import statistics as s
from intaglio.evidence.experiment import Design

EXPERIMENTS = 500
# (design, pilot runs, pilot units, units, spread of runs, of units, of the rest, delta)
CASES: dict[str, tuple[Design, int, int, int, float, float, float, float]] = {
    "independent": ("independent", 8, 1, 1, 1.0, 0.0, 1.0, 1.4),
    "clustered": ("clustered", 8, 0, 0, 1.0, 0.0, 1.0, 1.2),
    "crossed": ("crossed", 5, 10, 32, 1.0, 0.6, 1.0, 1.2),
    "crossed, noise": ("crossed", 5, 10, 32, 0.1, 0.1, 1.0, 0.3),
}


def noise(rng: np.random.Generator, shape: Any, heavy: bool) -> Any:
    """Unit variance: normal, or t with 5 degrees."""
    return rng.standard_t(5, shape) / math.sqrt(5 / 3) if heavy else rng.standard_normal(shape)


def rows(
    rng: np.random.Generator, design: Design, runs: int, units: int, spread: tuple[float, float, float], heavy: bool
) -> list[Any]:
    """Differences with mean 0."""
    of_runs, of_units, rest = spread
    if design == "clustered":
        sizes = np.maximum(1, np.round(np.exp(rng.normal(1.2, 0.8, runs)))).astype(int)
        return [of_runs * noise(rng, 1, heavy) + rest * noise(rng, size, heavy) for size in sizes]
    table = of_runs * noise(rng, (runs, 1), heavy) + of_units * noise(rng, (1, units), heavy)
    return list(table + rest * noise(rng, (runs, units), heavy))


@cache
def simulated(case: str, heavy: bool) -> tuple[s.Interval, ...]:
    """The intervals of 500 experiments with no effect, each of the size that its own pilot asks for."""
    design, pilot, pilot_units, units, *spread, delta = CASES[case]
    rng = np.random.default_rng([len(case), heavy])
    parts = (spread[0], spread[1], spread[2])
    found = []
    for _ in range(EXPERIMENTS):
        needed = s.runs_needed(design, rows(rng, design, pilot, pilot_units, parts, heavy), delta, units or None)
        found.append(s.interval(design, rows(rng, design, min(needed or 100, 100), units, parts, heavy)))
    return tuple(found)


def share(case: str, heavy: bool, planted: float, verdict: s.Verdict) -> float:
    """Share of the experiments with that verdict when an effect (in deltas) is added to every difference."""
    delta = CASES[case][-1]
    verdicts = [s.verdict(shifted(interval, planted * delta), delta) for interval in simulated(case, heavy)]
    return verdicts.count(verdict) / EXPERIMENTS


def shifted(interval: s.Interval, by: float) -> s.Interval:
    """What the interval is when `by` is added to every difference; see the test of that."""
    return replace(interval, effect=interval.effect + by, low=interval.low + by, high=interval.high + by)


EVERYWHERE = pytest.mark.parametrize(("case", "heavy"), [(case, heavy) for case in CASES for heavy in (False, True)])


@EVERYWHERE
def test_an_effect_of_exactly_delta_is_rarely_decided(case: str, heavy: bool) -> None:
    assert share(case, heavy, 1.0, "holds") <= 0.05
    assert share(case, heavy, 1.0, "fails") <= 0.05


@EVERYWHERE
def test_an_arm_against_itself_does_not_hold(case: str, heavy: bool) -> None:
    assert share(case, heavy, 0.0, "holds") <= 0.01


@EVERYWHERE
def test_twice_delta_is_found(case: str, heavy: bool) -> None:
    assert share(case, heavy, 2.0, "holds") >= 0.8


@EVERYWHERE
def test_a_reversed_effect_never_holds(case: str, heavy: bool) -> None:
    assert share(case, heavy, -1.0, "holds") == 0
    assert share(case, heavy, -2.0, "holds") == 0


@EVERYWHERE
def test_few_runs_are_underpowered_and_not_wrong(case: str, heavy: bool) -> None:
    """Four runs, chosen by nobody: the level holds even where there is no power."""
    design, _, _, units, *spread, delta = CASES[case]
    rng = np.random.default_rng(7)
    wrong = {"holds": 0, "fails": 0}
    for _ in range(EXPERIMENTS):
        parts = (spread[0], spread[1], spread[2])
        found = s.interval(design, rows(rng, design, 8 if design == "clustered" else 4, units, parts, heavy))
        said = s.verdict(shifted(found, delta), delta)
        if said in wrong:
            wrong[said] += 1
    assert max(wrong.values()) <= 0.05 * EXPERIMENTS


# On a grid: a spread is either none or well above rounding, so that nothing hangs on the last bits.
VALUES = st.lists(st.integers(-40, 40).map(lambda k: k / 8), min_size=12, max_size=12)


@given(VALUES, st.floats(-100, 100))
def test_adding_a_constant_moves_the_interval_by_it(values: list[float], by: float) -> None:
    flat = np.array(values)
    clusters = [flat[:1], flat[1:4], flat[4:6], flat[6:]]
    for design, parts in (("independent", flat[:, None]), ("crossed", flat.reshape(4, 3)), ("clustered", clusters)):
        before = s.interval(design, list(parts))  # type: ignore[arg-type]
        after = s.interval(design, [part + by for part in parts])  # type: ignore[arg-type]
        expected = shifted(before, by)
        assert (after.effect, after.low, after.high) == pytest.approx(
            (expected.effect, expected.low, expected.high), abs=1e-6
        )


@given(VALUES)
def test_turning_every_difference_turns_the_interval(values: list[float]) -> None:
    table = np.array(values).reshape(4, 3)
    for found, turned in ((s.crossed(table), s.crossed(-table)), (s.clustered(list(table)), s.clustered(list(-table)))):
        assert (turned.effect, turned.low, turned.high) == pytest.approx((-found.effect, -found.high, -found.low))


@given(VALUES, st.randoms())
def test_the_order_of_runs_and_units_does_not_matter(values: list[float], random: Any) -> None:
    table = np.array(values).reshape(4, 3)
    runs, units = list(range(4)), list(range(3))
    random.shuffle(runs)
    random.shuffle(units)
    a, b = s.crossed(table), s.crossed(table[runs][:, units])
    assert (a.effect, a.low, a.high, a.p) == pytest.approx((b.effect, b.low, b.high, b.p), abs=1e-9)


def test_independent_is_the_paired_t_test() -> None:
    x = np.random.default_rng(0).normal(0.3, 1, 17)
    expected = reference.ttest_1samp(x, 0)
    ends = expected.confidence_interval(0.95)
    found = s.independent(x)
    assert (found.effect, found.p) == pytest.approx((x.mean(), expected.pvalue))
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high))


def test_crossed_by_hand() -> None:
    # Rows differ by 2, columns by 1, nothing else: S_C² = 2, S_D² = 1/2, S_E² = 0; V = 2/2 + (1/2)/2 = 1.25.
    table = np.array([[0.0, 1.0], [2.0, 3.0]])
    found = s.crossed(table)
    degrees = 1.25**2 / (1.0**2 / 1 + 0.25**2 / 1)
    reach = float(reference.t.ppf(0.975, degrees)) * math.sqrt(1.25)
    assert (found.effect, found.low, found.high) == pytest.approx((1.5, 1.5 - reach, 1.5 + reach))
    assert found.half_width == pytest.approx(reach)


def test_crossed_does_not_take_the_units_for_the_only_ones() -> None:
    """All runs agree, units differ: an interval on the runs' means would have no width."""
    units = np.random.default_rng(0).normal(size=12)
    found = s.crossed(np.tile(units, (6, 1)))
    alone = s.independent(units)
    assert (found.low, found.high) == pytest.approx((alone.low, alone.high))


def test_clusters_count_units_not_clusters() -> None:
    clusters = [np.full(9, 1.0), np.zeros(1), np.zeros(1), np.zeros(1)]
    assert s.clustered(clusters).effect == pytest.approx(9 / 12)
    assert s.clustered(clusters) == s.clustered(clusters)
    assert s.clustered(clusters, seed=1) != s.clustered(clusters, seed=2)


def test_clusters_that_are_nearly_all_alike_still_have_a_finite_interval() -> None:
    found = s.clustered([np.ones(2)] + [np.zeros(2)] * 5)
    assert math.isfinite(found.low)
    assert found.low < 0 < found.high


@pytest.mark.parametrize("design", ["independent", "crossed", "clustered"])
def test_equal_differences_have_no_width(design: Design) -> None:
    for value in (0.0, 0.3):
        found = s.interval(design, [np.full(1 if design == "independent" else 3, value)] * 6)
        assert found == s.Interval(value, pytest.approx(value), pytest.approx(value), float(value == 0))  # type: ignore[arg-type]


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(IntaglioError, match="1 runs give no interval; at least 2 are needed"):
        s.interval("independent", [np.array([1.0])])
    with pytest.raises(IntaglioError, match="at least 4"):
        s.interval("clustered", [np.array([1.0])] * 3)


VERDICTS = [
    # low, high, kind, diverged, what
    (0.21, 5.0, "better", 0.0, "holds"),  # decided first, although the half-width exceeds delta
    (-5.0, 0.19, "better", 0.0, "fails"),
    (0.0, 0.5, "better", 0.0, "underpowered"),
    (0.0, 0.39, "better", 0.0, "inconclusive"),
    (0.2, 0.3, "better", 0.0, "inconclusive"),  # touching is not lying above
    (0.1, 0.2, "better", 0.0, "inconclusive"),
    (0.21, 0.3, "better", 0.2, "holds"),
    (0.21, 0.3, "better", 0.21, "fails"),
    (-0.19, 0.1, "as good as", 0.0, "holds"),
    (-0.3, -0.21, "as good as", 0.0, "fails"),
    (-0.3, 0.0, "as good as", 0.0, "inconclusive"),
    (-0.3, 0.2, "as good as", 0.0, "underpowered"),
]


@pytest.mark.parametrize(("low", "high", "kind", "diverged", "what"), VERDICTS)
def test_verdicts(low: float, high: float, kind: Any, diverged: float, what: str) -> None:
    assert s.verdict(s.Interval((low + high) / 2, low, high, 0.5), 0.2, kind, diverged) == what


def test_a_diverged_unit_takes_the_worst_value_of_either_arm() -> None:
    baseline = [np.array([1.0, 9.0]), np.array([3.0, math.nan])]
    method = [np.array([math.inf, 2.0]), np.array([2.0, 4.0])]
    lower = s.pair(baseline, method, "lower")
    assert [list(row) for row in lower.rows] == [[1 - 9, 9 - 2], [3 - 2, 9 - 4]]
    assert (lower.baseline_diverged, lower.method_diverged) == (0.25, 0.25)
    assert (lower.baseline_mean, lower.method_mean) == (22 / 4, 17 / 4)
    higher = s.pair(baseline, method, "higher")
    assert [list(row) for row in higher.rows] == [[1 - 1, 2 - 9], [2 - 3, 4 - 1]]
    nothing = s.pair([np.array([math.nan])], [np.array([math.nan])], "lower")
    assert (list(nothing.rows[0]), nothing.method_diverged) == ([0.0], 1.0)


@pytest.mark.parametrize(("diverged", "what"), [(0, "holds"), (4, "holds"), (5, "fails")])
def test_over_a_fifth_diverged_fails_although_the_rest_is_far_better(diverged: int, what: str) -> None:
    rng = np.random.default_rng(0)
    baseline = rng.normal(10, 0.1, (20, 1))
    method = baseline - rng.normal(10, 0.1, (20, 1))
    method[:diverged] = math.nan
    paired = s.pair(list(baseline), list(method), "lower")
    assert s.verdict(s.interval("independent", paired.rows), 0.5, "better", paired.method_diverged) == what


def test_holm_by_hand() -> None:
    assert s.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert s.holm([0.9, 0.8]) == [1.0, 1.0]
    assert s.holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_between_the_raw_and_bonferroni_and_keeps_the_order(p: list[float]) -> None:
    found = s.holm(p)
    assert all(a <= b <= min(1.0, a * len(p)) + 1e-12 for a, b in zip(p, found, strict=True))
    order = sorted(range(len(p)), key=lambda i: p[i])
    assert [found[i] for i in order] == sorted(found)


def test_the_upper_bound_is_one_of_80_percent() -> None:
    rng = np.random.default_rng(0)
    bounds = [s.upper_variance(float(x.var(ddof=1)), 7) for x in rng.normal(size=(2000, 8))]
    assert np.mean([bound > 1 for bound in bounds]) == pytest.approx(0.8, abs=0.03)  # three standard errors


@given(st.floats(0.2, 4), st.integers(3, 12))
def test_units_needed_is_the_least_number(spread: float, runs: int) -> None:
    pilot = spread * np.linspace(-1, 1, runs)
    n = s.units_needed(pilot, 0.5)
    bound = math.sqrt(pilot.var(ddof=1) * (runs - 1) / reference.chi2.ppf(0.2, runs - 1))

    def half_width(n: int) -> float:
        return float(reference.t.ppf(0.975, n - 1)) * bound / math.sqrt(n)

    assert half_width(n) <= 0.3 + 1e-9
    assert n == 5 or half_width(n - 1) > 0.3 - 1e-9


@given(st.floats(0.2, 4), st.integers(4, 12))
def test_clusters_needed_is_the_least_number(spread: float, runs: int) -> None:
    """Clusters of one unit each: as for units, with half the degrees of freedom."""
    pilot = spread * np.linspace(-1, 1, runs)
    n = s.clusters_needed([np.array([value]) for value in pilot], 0.5)
    bound = math.sqrt(pilot.var(ddof=1) * (runs - 1) / reference.chi2.ppf(0.2, runs - 1))

    def half_width(n: int) -> float:
        return float(reference.t.ppf(0.975, max(1, n / 2 - 1))) * bound / math.sqrt(n)

    assert half_width(n) <= 0.3 + 1e-9
    assert n == 10 or half_width(n - 1) > 0.3 - 1e-9


def test_draws_and_documents_are_two_sides_of_one_question() -> None:
    rng = np.random.default_rng(0)
    pilot = np.stack(rows(rng, "crossed", 6, 10, (1.0, 0.4, 0.5), heavy=False))
    draws = s.draws_needed(pilot, 1.0, units=32)
    assert draws is not None
    assert draws > 4
    documents = s.draws_needed(pilot.T, 1.0, units=draws)
    assert documents is not None
    assert documents <= 32
    more = s.draws_needed(pilot, 1.0, units=64)
    assert more is not None
    assert more <= draws


def test_no_number_of_draws_makes_up_for_too_few_documents() -> None:
    documents = np.tile(np.linspace(-3, 3, 10), (5, 1))
    assert s.draws_needed(documents, 0.5, units=8) is None
    assert s.draws_needed(documents, 0.5, units=5000) == 4


def test_a_pilot_without_spread_asks_for_the_least() -> None:
    assert s.units_needed(np.ones(5), 0.1) == 5
    assert s.clusters_needed([np.ones(3)] * 5, 0.1) == 10
    assert s.draws_needed(np.ones((4, 5)), 0.1, units=8) == 4


@pytest.mark.parametrize("case", CASES)
def test_a_run_as_large_as_is_said_has_the_width_that_is_wanted(case: str) -> None:
    """A run that is too small says how large it should be; runs of that size have about the width."""
    design, _, _, units, *spread, delta = CASES[case]
    rng = np.random.default_rng(3)
    parts = (spread[0], spread[1], spread[2])
    widths = []
    for _ in range(60):
        said = s.larger(design, rows(rng, design, 10, max(1, units // 2), parts, heavy=False), delta / 3)
        assert said is not None
        assert said.runs >= 10
        assert (said.units is None) == (design != "crossed")
        widths.append(s.interval(design, rows(rng, design, said.runs, said.units or 1, parts, False)).half_width)
    # Of very unequal clusters ten seldom have one of the largest.
    assert np.median(widths) == pytest.approx(0.2 * delta, rel=0.4 if design == "clustered" else 0.2)


def test_it_is_said_where_the_width_comes_from() -> None:
    runs = np.tile(np.linspace(-3, 3, 6)[:, None], (1, 8))
    found, turned = s.larger("crossed", list(runs), 0.5), s.larger("crossed", list(runs.T), 0.5)
    assert found is not None
    assert turned is not None
    assert (found.of_runs, found.of_units) == pytest.approx((1, 0))
    assert (turned.of_runs, turned.of_units) == pytest.approx((0, 1))
    wide = s.larger("independent", [np.array([x]) for x in (-1.0, 1.0) * 4], 1e-9)
    assert wide is None
