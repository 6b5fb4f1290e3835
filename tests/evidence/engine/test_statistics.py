"""Error rates of the whole path by simulation, and what the verdicts mean."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from intaglio.evidence.engine.claim import Claim, Metric
from intaglio.evidence.engine.statistics import (
    Array,
    Differences,
    average_clusters,
    best,
    look,
    pair,
    prediction_interval,
    probe,
    spread,
    verdicts,
)

from .toy import LOSS, toy_claim

CLAIMS = 2_000
Sampler = Callable[[np.random.Generator, int], Array]


def normal(rng: np.random.Generator, n: int) -> Array:
    return rng.standard_normal((CLAIMS, n))


def heavy(rng: np.random.Generator, n: int) -> Array:
    """t with three degrees of freedom, scaled to a standard deviation of 1."""
    return rng.standard_t(3, (CLAIMS, n)) / math.sqrt(3)


def clustered(rng: np.random.Generator, n: int) -> Array:
    """Means of clusters of 1 to 8 members; half of the variance of a member lies between clusters."""
    sizes = rng.integers(1, 9, (CLAIMS, n))
    return (rng.standard_normal((CLAIMS, n)) + rng.standard_normal((CLAIMS, n)) / np.sqrt(sizes)) / math.sqrt(2)


def crossed(rng: np.random.Generator, n: int) -> Array:
    """Units by 12 documents: documents differ by 1.5, their interaction with units by 1."""
    documents = 1.5 * rng.standard_normal((CLAIMS, 1, 12))
    return rng.standard_normal((CLAIMS, n, 1)) + documents + rng.standard_normal((CLAIMS, n, 12))


def whole_path(x: Array, claim: Claim) -> NDArray[np.str_]:
    """Return the verdict of each claim of a batch: probe on the first three units, then looks at the others."""
    seen = probe(x[:, :3], None, claim)
    verdict: NDArray[np.str_] = np.full(len(x), "untestable here", dtype="U20")
    running = ~(seen.wide | seen.flat)
    for number, units in enumerate(claim.looks):
        result = look(Differences(x[:, 3 : 3 + units]), claim, number)
        verdict = np.where(running & result.stop, result.verdict, verdict)
        running &= ~result.stop
    assert not running.any()
    return verdict


def simulate(
    sampler: Sampler, effect: float, sd: float, looks: tuple[int, ...], kind: str = "better"
) -> NDArray[np.str_]:
    rng = np.random.default_rng([len(sampler.__name__), len(looks), int(10 * sd), int(10 * effect) + 10])
    claim = toy_claim(
        delta=1.0, looks=looks, kind=kind, crossed=sampler is crossed, unit_names=("training seed", "document")
    )
    return whole_path(effect + sd * sampler(rng, 3 + looks[-1]), claim)


CELLS = [
    (sampler, sd, looks)
    for sampler in (normal, heavy, clustered, crossed)
    for sd in (0.25, 1.0, 3.0)
    for looks in ((5, 10, 20, 40), (5, 10), (5,))
]


@pytest.mark.parametrize(("sampler", "sd", "looks"), CELLS)
def test_an_effect_of_exactly_delta_is_seldom_called_holds(sampler: Sampler, sd: float, looks: tuple[int, ...]) -> None:
    assert (simulate(sampler, 1.0, sd, looks) == "holds").mean() <= 0.025


@pytest.mark.parametrize(("sampler", "sd", "looks"), CELLS)
def test_an_arm_against_itself_hardly_ever_holds(sampler: Sampler, sd: float, looks: tuple[int, ...]) -> None:
    assert (simulate(sampler, 0.0, sd, looks) == "holds").mean() <= 0.01


@pytest.mark.parametrize("sampler", [normal, heavy, clustered])
@pytest.mark.parametrize("sd", [0.5, 1.0, 1.5])
def test_twice_delta_is_found(sampler: Sampler, sd: float) -> None:
    assert (simulate(sampler, 2.0, sd, (5, 10, 20, 40)) == "holds").mean() >= 0.9


@pytest.mark.parametrize("sampler", [normal, heavy])
def test_as_good_as_seldom_holds_for_a_method_worse_by_delta(sampler: Sampler) -> None:
    assert (simulate(sampler, -1.0, 1.0, (5, 10, 20, 40), "as good as") == "holds").mean() <= 0.025


def test_a_crossed_interval_covers_although_few_documents_differ_much() -> None:
    rng = np.random.default_rng(0)
    x = crossed(rng, 5)
    seen = spread(x, 0.01, crossed=True)
    reach = seen.half_width(0.05)
    assert (np.abs(seen.effect) > reach).mean() <= 0.06
    naive = spread(x.mean(-1), 0.01, crossed=False)
    assert (np.abs(naive.effect) > naive.half_width(0.05)).mean() > 0.06


@given(
    st.lists(st.floats(-5, 5), min_size=2, max_size=2), st.floats(0.01, 3), st.sampled_from(["better", "as good as"])
)
def test_exactly_one_verdict_applies_to_any_interval(ends: list[float], delta: float, kind: str) -> None:
    low, high = sorted(ends)
    rules = {
        "holds": low > (delta if kind == "better" else -delta),
        "worse": high < (0 if kind == "better" else -delta),
        "smaller": kind == "better" and low > 0 and high < delta,
        "no effect": kind == "better" and -delta < low <= 0 <= high < delta,
    }
    true = [name for name, applies in rules.items() if applies]
    assert [str(verdicts(low, high, delta, kind))] == (true or ["undecided"])  # type: ignore[arg-type]


@pytest.mark.parametrize("is_crossed", [False, True])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.125])
def test_equal_differences_give_no_interval_of_zero_width(value: float, is_crossed: bool) -> None:
    seen = spread(np.full((5, 4) if is_crossed else 5, value), 0.1, is_crossed)
    assert float(seen.half_width(0.005)) > 0.01
    assert prediction_interval(np.full(5, value), 0.1)[0] < value


def test_futility_stops_only_what_more_units_would_leave_open() -> None:
    rng = np.random.default_rng(0)
    claim = toy_claim(delta=1.0)
    hopeless, open_still = 1.0 + 3 * rng.standard_normal((500, 5)), 2.0 + rng.standard_normal((500, 5))
    assert look(Differences(hopeless), claim, 0).futile.mean() < 0.5
    at_20 = look(Differences(1.0 + 3 * rng.standard_normal((500, 20))), claim, 2)
    assert at_20.futile.mean() > 0.5
    assert look(Differences(open_still), claim, 0).futile.mean() < 0.02


def test_the_probe_stops_without_headroom_and_with_a_hopeless_spread_whatever_the_effect() -> None:
    claim = toy_claim(delta=1.0)
    quiet = np.array([0.1, 0.0, -0.1])
    assert probe(quiet, np.array([0.5, 0.6, 0.4]), claim).flat
    assert not probe(quiet, np.array([5.0, 6.0, 4.0]), claim).flat
    wide = probe(np.array([-20.0, 0.0, 20.0]), None, claim)
    assert wide.wide
    assert not wide.flat
    assert wide.headroom is None
    assert np.array_equal(
        probe(quiet + 100, None, claim).half_width.round(9), probe(quiet, None, claim).half_width.round(9)
    )


def units(*values: float | None) -> list[dict[str, float | None]]:
    return [{"": value} for value in values]


def test_a_diverged_method_takes_the_worst_value_and_over_a_fifth_of_them_is_worse() -> None:
    base, method = units(1.0, 1.1, 1.2, 1.3, 1.0), units(0.5, 0.5, None, 0.5, math.inf)
    differences = pair(base, method, LOSS, crossed=False)
    assert differences.x[2] == pytest.approx(1.2 - 1.3)
    assert differences.method_diverged == pytest.approx(0.4)
    assert look(differences, toy_claim(), 0).verdict == "worse"


@given(st.integers(1, 5), st.floats(-3, 3))
def test_a_diverged_baseline_cannot_win_for_the_method(diverged: int, level: float) -> None:
    base = units(*[None] * diverged, *[level + 0.01 * i for i in range(5 - diverged)])
    method = units(*[level + 0.01 * i for i in range(5)])
    result = look(pair(base, method, LOSS, crossed=False), toy_claim(), 0)
    assert result.verdict != "holds"
    assert diverged == 1 or result.verdict == "undecided"


def test_a_claim_whose_every_value_diverged_is_undecided() -> None:
    differences = pair(units(*[None] * 5), units(*[None] * 5), LOSS, crossed=False)
    assert look(differences, toy_claim(), 0).verdict == "undecided"


def test_differences_are_turned_so_that_larger_is_better_and_relative_ones_are_shares() -> None:
    score = Metric("score", "points", better="higher")
    share = Metric("error", "", relative=True)
    assert pair(units(1.0), units(3.0), LOSS, False).x.tolist() == [-2.0]
    assert pair(units(1.0), units(3.0), score, False).x.tolist() == [2.0]
    assert pair(units(4.0), units(3.0), share, False).x.tolist() == [0.25]


def test_clusters_count_once_whatever_their_size() -> None:
    base = [{"a/1": 0.0, "a/2": 0.0, "b/1": 0.0}]
    method = [{"a/1": -1.0, "a/2": -3.0, "b/1": -8.0}]
    assert average_clusters({"a/1": 1.0, "a/2": 3.0, "b/1": 8.0}) == {"a": 2.0, "b": 8.0}
    assert pair(base, method, LOSS, crossed=False).x.tolist() == [5.0]
    assert pair(base, method, LOSS, crossed=True).x.tolist() == [[2.0, 8.0]]


def test_the_best_choice_is_never_one_that_diverged() -> None:
    choices = [np.array([np.nan, np.nan]), np.array([1.0, 1.0]), np.array([0.2, np.inf])]
    assert best(choices, LOSS) == 2
    assert best([np.array([np.nan]), np.array([np.nan])], LOSS) == 0
    assert best([np.array([np.nan]), np.array([5.0])], LOSS) == 1
    assert best([np.array([1.0]), np.array([3.0])], Metric("score", "points", better="higher")) == 1
