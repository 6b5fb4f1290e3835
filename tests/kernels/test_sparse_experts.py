"""Experts: whatever multiplies, the numbers are those of the whole product with scores of zero."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from intaglio.environment import tuning
from intaglio.errors import IntaglioError
from intaglio.kernels import sparse_experts
from tests.tuners import GivenTimes

pytestmark = pytest.mark.xdist_group("numba")  # compiled once


def case(T: int, D: int, E: int, H: int, seed: int = 0, share: float = 0.3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    x, up, down = (torch.randn(*shape, generator=draws) for shape in ((T, D), (E * H, D), (E * H, D)))
    score = torch.rand(T, E, generator=draws) * (torch.rand(T, E, generator=draws) < share)
    return x, up, down, score


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance * float(expected.abs().max()) + 1e-12, rtol=tolerance)


SIZES = st.tuples(st.integers(1, 17), st.integers(1, 40), st.integers(1, 6), st.integers(1, 9))


@settings(max_examples=30, deadline=None)
@given(SIZES, st.integers(0, 99), st.sampled_from([0.0, 0.2, 1.0]))
def test_the_union_gathered_is_the_whole_product(sizes: Any, seed: int, share: float) -> None:
    given_case = case(*sizes, seed, share)
    near(sparse_experts.gathered(*given_case), sparse_experts.masked(*given_case))


@pytest.mark.skipif(find_spec("numba") is None, reason="numba is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numba_gives_the_same(dtype: torch.dtype) -> None:

    from intaglio.kernels import sparse_experts_numba

    torch.manual_seed(0)
    small = ((1, 5, 1, 4), (1, 8, 3, 5), (8, 33, 4, 7), (5, 16, 2, 2))
    for sizes in (*small, (16, 70, 4, 18), (3, 1050, 2, 17), (7, 130, 2, 71)):
        for share in (0.0, 0.3, 1.0):
            x, up, down, score = case(*sizes, share=share)
            rounded = [tensor.to(dtype) for tensor in (x, up, down)]
            found = sparse_experts_numba.apply(*rounded, score)
            assert found.dtype == dtype
            near(
                found.float(),
                sparse_experts.masked(*(t.float() for t in rounded), score),
                1e-5 if dtype.itemsize == 4 else 0.01,
            )
    nan = torch.full((2, 8), float("nan"))
    x, up, down, score = case(2, 8, 2, 4, share=1.0)
    assert sparse_experts_numba.apply(nan, up, down, score).isnan().all()
    assert not sparse_experts_numba.apply(nan, up, down, torch.zeros(2, 2)).any()  # no expert, nothing


@pytest.mark.skipif(find_spec("numba") is None, reason="numba is not installed")
def test_who_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    big = case(4, 512, 8, 64)
    x, up, down, score = big
    with torch.no_grad():
        assert sparse_experts._kernel(x, up, down) == "numba"
        near(sparse_experts.apply(*big), sparse_experts.masked(*big))
        for other in (x[:, :8], up[:, :8].contiguous()), (x.double(), up.double()):
            assert sparse_experts._kernel(other[0], other[1], other[1]) == "torch"
        with torch.autocast("cpu", torch.bfloat16):
            assert sparse_experts._kernel(x, up, down) == "torch"
        monkeypatch.setattr(sparse_experts, "_kernel", lambda *tensors: "torch")
        near(sparse_experts.apply(*big), sparse_experts.masked(*big))
        assert sparse_experts.apply(x[:0], up, down, score[:0]).shape == (0, 512)
    monkeypatch.setattr(sparse_experts, "_kernel", None)  # a gradient asks for no kernel
    x = x.requires_grad_()
    sparse_experts.apply(x, up, down, score).sum().backward()
    assert x.grad is not None


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by the test below, in the interpreter")
def test_triton_gives_the_same() -> None:
    from intaglio.kernels import sparse_experts_triton

    for sizes in ((1, 33, 3, 5), (8, 130, 9, 40), (16, 64, 2, 33)):
        for share in (0.0, 0.3, 1.0):
            given_case = case(*sizes, share=share)
            near(sparse_experts_triton.apply(*given_case), sparse_experts.masked(*given_case), 1e-4)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_kernels_of_the_gpu_in_tritons_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        __file__,
        "-k",
        "triton_gives",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_shapes_that_do_not_fit() -> None:
    x, up, down, score = case(2, 8, 2, 4)
    for given_case in ((x, up, down[:4], score), (x[:, :4], up, down, score)):
        with pytest.raises(IntaglioError, match=r"both are \[F, D\]"):
            sparse_experts.apply(*given_case)
    for wrong in (score[:1], torch.ones(2, 3), torch.ones(2, 0)):
        with pytest.raises(IntaglioError, match="equally many rows an expert"):
            sparse_experts.apply(x, up, down, wrong)


@torch.no_grad()
@pytest.mark.skipif(find_spec("numba") is None, reason="numba is not installed")
@pytest.mark.parametrize("winner", ["dense", "active"])
def test_the_kernel_is_used_where_it_was_measured_to_be_faster(winner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x_TD, up_FD, down_FD = torch.randn(2, 256), torch.randn(512, 256), torch.randn(512, 256)
    score_TE = (torch.arange(8) < 2).float().expand(2, 8)
    calls: list[str] = []
    masked = sparse_experts.masked
    monkeypatch.setattr(sparse_experts, "masked", lambda *all: calls.append("dense") or masked(*all))
    with tuning.using(tuner := GivenTimes(winner)):
        sparse_experts.apply(x_TD, up_FD, down_FD, score_TE)
        calls.clear()
        found = sparse_experts.apply(x_TD, up_FD, down_FD, score_TE)
    assert calls == (["dense"] if winner == "dense" else [])
    torch.testing.assert_close(found, masked(x_TD, up_FD, down_FD, score_TE), rtol=1e-3, atol=1e-2)
    assert list(tuner.used) == ["experts 256x512 of 8 float32 rows 2 threads 1"]
