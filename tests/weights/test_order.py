"""The k-th smallest of many numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.weights.order import kth_smallest


@given(values=st.lists(st.integers(-5, 5), min_size=1, max_size=40), data=st.data())
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_the_one_that_sorting_would_put_there(dtype: torch.dtype, values: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    flat_N = torch.tensor(values, dtype=dtype)
    found = kth_smallest(flat_N.clone(), k)
    assert found.shape == ()
    assert found.dtype == dtype
    assert float(found) == sorted(values)[k - 1]
    assert float(kth_smallest(flat_N.clone(), (len(values) + 1) // 2)) == float(flat_N.float().median())
