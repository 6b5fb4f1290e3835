"""How much to prune: exact counts, stable under ties, refused when it makes no sense."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from intaglio.errors import IntaglioError
from intaglio.methods.weights.sparsity_target import (
    SparsityTarget,
    lowest_k_mask,
    lowest_of_groups,
    parse_pattern,
    prune_mask,
    pruned_count,
)

scores = st.integers(1, 6).flatmap(
    lambda rows: st.integers(1, 24).flatmap(
        lambda inputs: st.lists(
            st.lists(st.integers(0, 4), min_size=inputs, max_size=inputs), min_size=rows, max_size=rows
        )
    )
)


def by_stable_sort(score_RI: torch.Tensor, count: int) -> torch.Tensor:
    mask = torch.zeros_like(score_RI, dtype=torch.bool)
    for row in range(score_RI.shape[0]):
        order = sorted(range(score_RI.shape[1]), key=lambda i: (score_RI[row, i].item(), i))
        mask[row, order[:count]] = True
    return mask


@given(scores, st.data())
def test_lowest_is_a_stable_sort(values: list[list[int]], data: st.DataObject) -> None:
    score_RI = torch.tensor(values, dtype=torch.float32)
    count = data.draw(st.integers(0, score_RI.shape[1]))
    assert torch.equal(lowest_k_mask(score_RI, count), by_stable_sort(score_RI, count))


@given(st.integers(0, 1000), st.integers(0, 64))
def test_lowest_is_one_sort_however_few_are_wanted(seed: int, count: int) -> None:
    score_RI = torch.randint(0, 5, (3, 64), generator=torch.Generator().manual_seed(seed)).float()
    score_RI[:, ::5] = float("inf")
    expected = torch.zeros_like(score_RI, dtype=torch.bool)
    expected.scatter_(1, score_RI.sort(dim=1, stable=True).indices[:, :count], True)
    assert torch.equal(lowest_k_mask(score_RI, count), expected)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(2, 8), st.data())
def test_groups_keep_exactly_n_of_m_stably(rows: int, groups: int, of: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, of - 1))
    values = data.draw(st.lists(st.integers(0, 3), min_size=rows * groups * of, max_size=rows * groups * of))
    score_RI = torch.tensor(values, dtype=torch.float32).view(rows, groups * of)
    mask = lowest_of_groups(score_RI, keep, of)
    expected = by_stable_sort(score_RI.view(-1, of), of - keep).view(rows, groups * of)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, expected)


@given(st.integers(1, 5000), st.integers(0, 99))
def test_count_is_the_exact_floor(size: int, percent: int) -> None:
    assert pruned_count(size, percent / 100) == math.floor(size * Fraction(percent, 100))


def test_layer_and_row_counts() -> None:
    score_RI = torch.randn(7, 33, generator=torch.Generator().manual_seed(0))
    assert int(prune_mask(score_RI, 0.7, per="layer").sum()) == math.floor(7 * 33 * 0.7)
    assert prune_mask(score_RI, 0.7).sum(1).tolist() == [23] * 7
    assert not prune_mask(score_RI, 0.0).any()


def test_nan_scores_are_refused() -> None:
    score_RI = torch.ones(2, 4)
    score_RI[1, 2] = float("nan")
    with pytest.raises(IntaglioError, match="NaN"):
        prune_mask(score_RI, 0.5)


@pytest.mark.parametrize("pattern", ["3:2", "4:4", "0:4", "2-4", "2:4:8", "", "a:b", "2:", "-1:4"])
def test_patterns_that_make_no_sense(pattern: str) -> None:
    with pytest.raises(ValueError, match="accepted: N:M"):
        parse_pattern(pattern)


@pytest.mark.parametrize("given_", [{}, {"sparsity": 0.5, "pattern": "2:4"}, {"sparsity": 1.0}, {"sparsity": -0.1}])
def test_exactly_one_amount_in_range(given_: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SparsityTarget(**given_)


def test_width_that_the_pattern_does_not_fit() -> None:
    with pytest.raises(IntaglioError, match=r"2:3 does not fit a\.b: its 64 inputs are not a multiple of 3"):
        SparsityTarget(pattern="2:3").check([("a.b", 8, 64)])
