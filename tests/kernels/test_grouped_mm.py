"""Rows with a matrix each."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.kernels.grouped_mm import _grouped_fits, grouped_linear, one_by_one


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_each_row_meets_its_own_matrix(counts: list[int], inputs: int, outputs: int, bias: bool) -> None:
    draws = torch.Generator().manual_seed(sum(counts))
    x = torch.randn(sum(counts), inputs, generator=draws)
    weight = torch.randn(len(counts), outputs, inputs, generator=draws, requires_grad=True)
    b = torch.randn(len(counts), outputs, generator=draws) if bias else None
    of = torch.tensor([e for e, count in enumerate(counts) for _ in range(count)], dtype=torch.int64)
    found = grouped_linear(x, weight, torch.tensor(counts), b)
    expected = torch.einsum("ri,roi->ro", x, weight[of]) + (0 if b is None else b[of])
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    gradient, weight.grad = weight.grad, None
    expected.square().sum().backward()
    torch.testing.assert_close(gradient, weight.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_both_ways_are_one(dtype: torch.dtype) -> None:
    x, weight = torch.randn(11, 8).to(dtype), torch.randn(3, 16, 8).to(dtype)
    counts = torch.tensor([4, 0, 7])
    assert _grouped_fits(x, weight) == (dtype is not torch.float64)
    torch.testing.assert_close(grouped_linear(x, weight, counts), one_by_one(x, weight, counts))


def test_under_autocast_it_is_cast_as_a_linear_layer_is() -> None:
    x, weight, bias = torch.randn(6, 8), torch.randn(2, 8, 8), torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert grouped_linear(x, weight, torch.tensor([2, 4]), bias).dtype is torch.bfloat16
