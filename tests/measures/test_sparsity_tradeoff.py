"""Paired tests, tolerated sparsity, equal operations and the scaling law, on data whose answer is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from intaglio.errors import IntaglioError
from intaglio.measures.sparsity_tradeoff import (
    Interval,
    ScalingLaw,
    StudyCell,
    decode_flops,
    equal_flops,
    fit_scaling_law,
    paired_bootstrap,
    prefill_flops,
    tolerated_sparsity,
)


def point(**changes: Any) -> StudyCell:
    fields: dict[str, Any] = {
        "model": "m",
        "parameters": 1000,
        "task": "t",
        "condition": "after",
        "length": 100,
        "method": "quest",
        "phase": "decode",
        "target": 0.5,
        "sparsity": 0.5,
        "scores": (1.0, 0.0),
        "flops": 1e6,
        "difference": Interval(0, -0.1, 0.1),
    }
    return StudyCell(**fields | changes)


def test_the_bootstrap_is_paired() -> None:
    noise = np.random.default_rng(0).random(50)
    close = paired_bootstrap(list(noise), list(noise - 0.1))
    assert close.mean == pytest.approx(-0.1)
    assert close.low == pytest.approx(-0.1)
    assert close.high == pytest.approx(-0.1)
    assert close.worse
    same = paired_bootstrap([0.0, 1.0] * 20, [1.0, 0.0] * 20)
    assert same.low < 0 < same.high
    assert not same.worse
    assert paired_bootstrap([0, 1], [1, 1], seed=1) == paired_bootstrap([0, 1], [1, 1], seed=1)
    for scores in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(IntaglioError, match="equally many"):
            paired_bootstrap(*scores)


def test_the_interval_covers_95_percent_of_a_normal_mean() -> None:
    differences = np.random.default_rng(1).normal(size=400)
    interval = paired_bootstrap([0.0] * 400, list(differences))
    half = 1.96 * differences.std() / 20
    assert interval.high - interval.mean == pytest.approx(half, rel=0.15)
    assert interval.mean - interval.low == pytest.approx(half, rel=0.15)


def test_operations_are_the_cards_formula() -> None:
    """prefill = 2 N n + L H 4 d (1-s) n(n+1)/2 + overhead 2 a n d H; decode = 2 N + 4 L H d (1-s) n."""
    assert prefill_flops(1000, 3, 32, 10, 0.0) == 2 * 1000 * 10 + 3 * 32 * 4 * 55
    assert prefill_flops(1000, 3, 32, 10, 0.5) == 2 * 1000 * 10 + 3 * 32 * 4 * 27.5
    assert prefill_flops(1000, 3, 32, 10, 1.0, 4) == 2 * 1000 * 10 + 3 * 2 * 4 * 10 * 32
    assert decode_flops(1000, 3, 32, 10, 0.0) == 2 * 1000 + 4 * 3 * 32 * 10
    assert decode_flops(1000, 3, 32, 10, 0.75, 2) == 2 * 1000 + 3 * 32 * 10 + 3 * 32 * 4


def test_tolerated_sparsity_ends_at_the_first_loss() -> None:
    worse, fine = Interval(-0.5, -0.6, -0.4), Interval(-0.1, -0.2, 0.0)
    points = [point(sparsity=s, difference=d) for s, d in ((0.5, fine), (0.95, fine), (0.8, fine), (0.9, worse))]
    points += [point(method="snapkv", sparsity=0.5, difference=worse), point(method="dense", difference=None)]
    assert tolerated_sparsity(points) == {
        ("m", "t", "after", "100", "quest"): 0.8,
        ("m", "t", "after", "100", "snapkv"): 0.0,
    }


def test_nothing_is_tolerated_where_dense_attention_has_no_right_answer() -> None:
    cell = point(difference=Interval(0.0, 0.0, 0.0), sparsity=0.9)
    key = (cell.model, cell.task, cell.condition, str(cell.length), cell.method)
    for scores, expected in (((0.0, 0.0), None), ((0.0, 1.0), 0.9)):
        dense = point(difference=None, method="dense", scores=scores)
        assert tolerated_sparsity([dense, cell]) == {key: expected}


def test_bins_of_equal_operations() -> None:
    points = [
        point(model="small", flops=1.0e6, scores=(0.0,)),
        point(model="large", flops=1.1e6, scores=(1.0,), sparsity=0.9),
        point(model="large", flops=9.9e6, scores=(0.5,)),
    ]
    rows = equal_flops(points, bins_per_decade=2)
    assert [(row["points"], row["best"]["model"], row["best"]["accuracy"]) for row in rows] == [
        (2, "large", 1.0),
        (1, "large", 0.5),
    ]
    assert rows[0]["best"]["sparsity"] == 0.9
    assert 1e6 < rows[0]["flops"] < 10**6.5 < rows[1]["flops"] < 1e7


def lawful(lengths: tuple[int, ...], parameters: tuple[int, ...], sparsities: tuple[float, ...]) -> list[StudyCell]:
    law = ScalingLaw({"intercept": -1.5, "parameters": 0.2, "length": -0.3, "compression": -0.4}, 1.0, "", None, 0)
    return [
        point(parameters=n, length=length, target=s, sparsity=s, scores=(law.predict(n, length, s),))
        for n in parameters
        for length in lengths
        for s in sparsities
    ]


def test_the_law_is_recovered_and_extrapolates() -> None:
    """Log-linear, fitted by least squares and validated on held-out longest length or highest sparsity."""
    law = fit_scaling_law(lawful((100, 200, 400), (1000, 5000), (0.0, 0.5, 0.9)), floor=1e-9)
    assert law is not None
    assert law.coefficients == pytest.approx(
        {"intercept": -1.5, "parameters": 0.2, "length": -0.3, "compression": -0.4}
    )
    assert (law.held_out, law.points) == ("length 400", 12)
    assert law.r2 == pytest.approx(1)
    assert law.held_out_r2 == pytest.approx(1)
    assert law.predict(1000, 100, 0.5) == pytest.approx(math.exp(-1.5) * 1000**0.2 * 100**-0.3 * 2**-0.4)
    short = fit_scaling_law(lawful((100,), (1000,), (0.0, 0.5, 0.8, 0.9)), floor=1e-9)
    assert short is not None
    assert (short.held_out, set(short.coefficients)) == ("sparsity 90%", {"intercept", "compression"})
    assert short.coefficients["compression"] == pytest.approx(-0.4)


def test_no_law_of_too_few_points_and_no_logarithm_of_zero() -> None:
    assert fit_scaling_law([]) is None
    assert fit_scaling_law(lawful((100,), (1000,), (0.0, 0.5)), floor=1e-9) is None
    points = [point(target=s, sparsity=s, scores=(0.0,) * 4) for s in (0.0, 0.5, 0.8, 0.9)]
    law = fit_scaling_law(points)
    assert law is not None
    assert law.coefficients["intercept"] == pytest.approx(math.log(0.125))
