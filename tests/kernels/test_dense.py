"""The direct product of a few rows equals torch's, whatever the threads, and runs in torch's own pool."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("llvmlite")

from intaglio.environment import torch_threads
from intaglio.kernels import dense_llvmlite, openmp
from intaglio.kernels.dense_llvmlite import MOST_ROWS, linear

CLOSE = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.bfloat16: {"rtol": 2e-2, "atol": 5e-2}}


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, MOST_ROWS), st.integers(1, 90), st.integers(1, 300), st.booleans(), st.sampled_from(tuple(CLOSE)),
    st.integers(0, 99),
)  # fmt: skip
def test_the_product_is_that_of_torch(
    rows: int, inputs: int, outputs: int, biased: bool, dtype: torch.dtype, seed: int
) -> None:
    draws = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(*shape, generator=draws).to(dtype) for shape in ((rows, inputs), (outputs, inputs), (outputs,))
    )
    results = []
    for threads in (1, 2):
        with torch_threads(threads):
            results.append(linear(x, weight, bias if biased else None, threads))
    torch.testing.assert_close(
        results[0], torch.nn.functional.linear(x, weight, bias if biased else None), **CLOSE[dtype]
    )
    assert torch.equal(*results)
    if rows:  # to the last bit: a pass over drafts is then the passes that it saves
        assert torch.equal(results[0][:1], linear(x[:1], weight, bias if biased else None, 1))


def test_without_the_interface_of_torchs_pool_there_is_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp, "_start", lambda: None)
    assert openmp.most_threads() == 1
    x, weight = torch.ones(2, 8), torch.ones(400, 8)
    assert torch.equal(dense_llvmlite.linear(x, weight, None, 2), torch.full((2, 400), 8.0))
