"""The k-th smallest of many numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.methods.weights import topk
from intaglio.methods.weights.topk import kth_smallest


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


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("kind", ["normal", "half zeros", "rising", "periodic"])
def test_of_many_numbers_a_sample_may_mislead_and_nothing_is_lost(
    kind: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topk, "MANY", 4096)
    monkeypatch.setattr(topk, "SAMPLED", 256)
    flat_N = torch.randn(8192, generator=torch.Generator().manual_seed(0)).abs()
    if kind == "half zeros":
        flat_N[torch.randperm(8192, generator=torch.Generator().manual_seed(1))[:4096]] = 0
    if kind == "rising":
        flat_N = flat_N.sort().values
    if kind == "periodic":  # the sample takes every 32nd
        flat_N[::32] += 100
    k = max(1, int(share * 8192))
    assert float(kth_smallest(flat_N.clone(), k)) == float(flat_N.sort().values[k - 1])
