"""The product from some columns: what it computes, on every way there is, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from intaglio.errors import IntaglioError
from intaglio.kernels import _utils, gather

pytestmark = pytest.mark.xdist_group("numba")  # compiled once

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WAYS = ["torch", *(["numba"] if find_spec("numba") else []), *(["triton"] if INTERPRETED else [])]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    fast = "" if request.param == "torch" else request.param

    def chosen(x_BI: Tensor, dtype: torch.dtype) -> str:
        few = 1 if fast == "triton" else gather.MOST_ROWS
        return fast if 0 < len(x_BI) <= few and dtype in (torch.float32, torch.bfloat16) else ""

    monkeypatch.setattr(gather, "kernel", chosen)
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(x: Tensor, weight: Tensor, limit: Any, scale: Any = None, down: Any = None, up: Any = None) -> Tensor:
    """By the definition, in float64."""
    score = x.abs() * (1 if scale is None else scale)
    keep = ~(score <= (limit[:, None] if isinstance(limit, Tensor) else limit))
    x, y = x.double(), torch.where(keep, x, 0).double() @ weight.double()
    return y if down is None else y + torch.where(keep, 0, x) @ down.double().T @ up.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inputs", "outputs", "rank"), [(1, 37, 21, 0), (1, 130, 64, 5), (3, 19, 70, 2)])
def test_it_is_what_the_definition_says(
    way: str, dtype: torch.dtype, rows: int, inputs: int, outputs: int, rank: int
) -> None:
    x, weight, scale, bias = (
        drawn(0, rows, inputs),
        drawn(1, inputs, outputs),
        drawn(2, inputs).abs(),
        drawn(3, outputs),
    )
    down, up = (drawn(4, rank, inputs), drawn(5, rank, outputs)) if rank else (None, None)
    weight, x = weight.to(dtype), x.to(dtype)
    down, up = (None if part is None else part.to(dtype) for part in (down, up))
    for limit in (0.4, -1.0, float("inf"), drawn(6, rows).abs()):
        for scaled in (scale, None):
            found = gather.linear(x, weight, limit, scaled, down, up, bias)
            assert (found.shape, found.dtype) == ((rows, outputs), dtype)
            expected = exact(x.float(), weight, limit, scaled, down, up) + bias
            close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.2}
            torch.testing.assert_close(found.double(), expected, **close)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 40), st.integers(0, 99), st.floats(-0.5, 3))
def test_every_way_gives_the_same(rows: int, inputs: int, outputs: int, seed: int, limit: float) -> None:
    x, weight = drawn(seed, rows, inputs), drawn(seed + 1, inputs, outputs)
    torch.testing.assert_close(gather.linear(x, weight, limit), exact(x, weight, limit).float(), rtol=1e-4, atol=1e-4)


def test_a_score_at_the_threshold_is_left_out_and_what_is_no_number_is_kept(way: str) -> None:
    weight = torch.eye(3)
    assert gather.linear(torch.tensor([[1.0, 2.0, -2.5]]), weight, 2.0).tolist() == [[0.0, 0.0, -2.5]]
    found = gather.linear(torch.tensor([[float("nan"), 1.0, 1.0]]), torch.ones(3, 2), 5.0)
    assert bool(found.isnan().all())


def test_shapes_of_activations(way: str) -> None:
    x, weight = drawn(1, 2, 2, 9), drawn(2, 9, 5)
    rows = gather.linear(x.reshape(4, 9), weight, 0.3)
    torch.testing.assert_close(gather.linear(x, weight, 0.3).reshape(4, 5), rows, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gather.linear(x[0, 0], weight, 0.3), rows[0], rtol=1e-5, atol=1e-5)
    assert gather.linear(x[:0], weight, 0.3).shape == (0, 2, 5)


def test_threads_give_the_same_numbers(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("numba") is None:
        pytest.skip("numba is not installed")
    from intaglio.kernels import gather_numba

    monkeypatch.setattr(gather_numba, "_WORTH", 1)
    x, weight, down, up = drawn(1, 2, 65), drawn(2, 65, 50), drawn(3, 3, 65), drawn(4, 3, 50)
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(gather.linear(x, weight, 0.5, None, down, up))
    assert torch.equal(*found)


@pytest.mark.skipif(find_spec("numba") is None, reason="numba is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_row_gets_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    from intaglio.kernels import gather_numba

    x, weight, down, up = drawn(1, 3, 90), drawn(2, 90, 1100), drawn(3, 3, 90), drawn(4, 3, 1100)
    weight, down, up = (part.to(dtype) for part in (weight, down, up))
    scale, bias = drawn(5, 90).abs(), drawn(6, 1100)
    together = gather_numba.linear(x, weight, 0.4, scale, down, up, bias)
    alone = torch.cat([gather_numba.linear(x[b : b + 1], weight, 0.4, scale, down, up, bias) for b in range(3)])
    assert torch.equal(together, alone)  # to the last bit: a pass over drafts is then the passes that it saves


def test_without_numba_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_utils, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "intaglio.kernels.gather_numba", None)
    _utils.works.cache_clear()
    x, weight = drawn(1, 1, 8), drawn(2, 8, 3)
    with pytest.warns(UserWarning, match=r"^no columns are gathered, and zeros are multiplied, as numba fails"):
        found = gather.linear(x, weight, 0.5)
    torch.testing.assert_close(found, exact(x, weight, 0.5).float())
    monkeypatch.undo()
    _utils.works.cache_clear()


def test_a_compiler_sees_plain_torch() -> None:
    x, weight = drawn(1, 1, 8), drawn(2, 8, 3)
    compiled = torch.compile(lambda x: gather.linear(torch.sin(x), weight, 0.5), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), gather.linear(torch.sin(x), weight, 0.5))


def test_nothing_is_loaded_before_a_product() -> None:
    code = (
        "import sys, intaglio.kernels.gather\nassert not {'numba', 'llvmlite', 'triton'} & set(sys.modules), 'loaded'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


X, WEIGHT = torch.zeros(1, 4), torch.zeros(4, 3)
REFUSED = [
    (lambda: gather.linear(torch.zeros(()), WEIGHT, 0.0), r"^x: a scalar of float32 cannot be multiplied"),
    (lambda: gather.linear(torch.zeros(1, 4, dtype=torch.int8), WEIGHT, 0.0), r"^x: 1x4 of int8 cannot be"),
    (lambda: gather.linear(X.clone().requires_grad_(), WEIGHT, 0.0), r"^x: gathered columns pass no gradient on"),
    (lambda: gather.linear(X, torch.zeros(3, 3), 0.0), r"^weight: 3x3 of float32 does not fit 4 inputs"),
    (lambda: gather.linear(X, torch.zeros(3, 4).T, 0.0), r"^weight: 4x3 of float32 does not fit 4 inputs: a contig"),
    (lambda: gather.linear(X, WEIGHT, 0.0, torch.zeros(3)), r"^scale: 3 of float32 does not fit: 4 of float32 on cpu"),
    (lambda: gather.linear(X, WEIGHT, torch.zeros(2)), r"^threshold: 2 of float32 does not fit: 1 of float32"),
    (lambda: gather.linear(X, WEIGHT, 0.0, None, torch.zeros(2, 4)), r"^down and up: one of the two is given"),
    (
        lambda: gather.linear(X, WEIGHT, 0.0, None, torch.zeros(2, 4), torch.zeros(1, 3)),
        r"^up: 1x3 of float32 does not fit: 2x3 of float32",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "sentence"), REFUSED)
def test_refusals_are_one_sentence(call: Callable[[], Tensor], sentence: str) -> None:
    with pytest.raises(IntaglioError, match=sentence) as refused:
        call()
    assert "\n" not in str(refused.value)
    assert str(refused.value).endswith(".")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_kernels_of_the_gpu_in_tritons_interpreter() -> None:
    # In a process of its own: Triton asks for its interpreter when it is imported, and by now it may have been.
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", __file__, "-k", "triton"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([*command, "-m", "not slow"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    x, weight, down, up = (
        part.to(dtype) for part in (drawn(1, 1, 700), drawn(2, 700, 300), drawn(3, 9, 700), drawn(4, 9, 300))
    )
    found = gather.linear(x.cuda(), weight.cuda(), 0.7, None, down.cuda(), up.cuda())
    expected = exact(x.float(), weight, 0.7, None, down, up)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=0.05, atol=0.5)


@pytest.mark.skipif(find_spec("numba") is None, reason="numba is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("count", [1, 2])
def test_a_shared_call_gives_what_a_call_for_each_gives(threads: None, dtype: torch.dtype, count: int) -> None:
    torch.set_num_threads(count)
    x, scale = drawn(1, 2, 90), drawn(5, 90).abs()
    parts = [
        (drawn(width, 90, width).to(dtype), limit, scaled, bias)
        for width, limit, scaled, bias in (
            (70, 0.4, scale, None),
            (21, 0.2, None, drawn(6, 21)),
            (1100, -1.0, None, None),
        )
    ]
    found = gather.shared_input(parts)(x, count)
    for (weight, limit, scaled, bias), y in zip(parts, found, strict=True):
        assert torch.equal(y, gather.rows(x, weight, limit, scaled, None, None, bias))
