"""Ternary products from two bits a weight: the same numbers as dense integers give, whichever code multiplies."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from intaglio import IntaglioError
from intaglio.environment import tuning
from intaglio.kernels import _utils, ternary
from intaglio.kernels.ternary import linear, matmul, pack, packed_width, quantize, unpack
from tests.tuners import GivenTimes

WAYS = ["torch", "numba", "triton"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What multiplies, on this machine's CPU: Triton by its interpreter."""
    name: str = request.param
    if name != "torch" and find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    if name == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("run with TRITON_INTERPRET=1 by the slow test below")
    monkeypatch.setattr(ternary, "_kernel", lambda x: name)
    return name


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def draw(seed: int, rows: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Integers of eight bits and ternary weights."""
    draws = torch.Generator().manual_seed(seed)
    x_BI = torch.randint(-128, 128, (rows, inputs), generator=draws).to(torch.int8)
    return x_BI, torch.randint(-1, 2, (outputs, inputs), generator=draws).to(torch.int8)


def exact(x_BI: Tensor, weight_OI: Tensor) -> Tensor:
    return (x_BI.double() @ weight_OI.double().T).to(torch.int32)


sizes = st.tuples(st.integers(0, 18), st.integers(1, 40), st.integers(1, 700), st.integers(0, 2**31))


@given(sizes)
def test_packing_loses_nothing(size: tuple[int, int, int, int]) -> None:
    _, outputs, inputs, seed = size
    _, weight_OI = draw(seed, 1, outputs, inputs)
    packed_OJ = pack(weight_OI)
    assert packed_OJ.shape == (outputs, packed_width(inputs))
    assert 4 * packed_OJ.shape[1] - 64 < inputs <= 4 * packed_OJ.shape[1]
    assert torch.equal(unpack(packed_OJ, inputs), weight_OI)
    assert torch.equal(unpack(packed_OJ, inputs, torch.float32), weight_OI.float())


def test_the_layout_is_what_is_written() -> None:
    _, weight_OI = draw(0, 1, 3, 128)
    packed_OJ = pack(weight_OI)
    for o, j in ((0, 0), (1, 7), (2, 31)):
        assert int(packed_OJ[o, j]) == sum((int(weight_OI[o, 32 * k + j]) + 1) * 4**k for k in range(4))
    # Two bits a weight, and nothing else.
    assert packed_OJ.nbytes * 4 == weight_OI.numel()


def test_a_row_is_filled_up_with_weights_of_zero() -> None:
    packed_OJ = pack(torch.ones(2, 65, dtype=torch.int8))
    assert packed_OJ.shape == (2, 32)
    assert torch.equal(unpack(packed_OJ, 128)[:, 65:], torch.zeros(2, 63, dtype=torch.int8))


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 7, 8, 16, 17])
def test_batches_of_any_size(way: str, rows: int) -> None:
    x_BI, weight_OI = draw(rows, rows, 37, 200)
    y_BO = matmul(x_BI, pack(weight_OI))
    assert (y_BO.dtype, y_BO.shape) == (torch.int32, (rows, 37))
    assert torch.equal(y_BO, exact(x_BI, weight_OI))


@pytest.mark.parametrize("name", ["torch", "numba"])
@given(size=sizes)
def test_integers_are_exact_for_any_shape(name: str, size: tuple[int, int, int, int]) -> None:
    if name != "torch" and find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ternary, "_kernel", lambda x: name)
        rows, outputs, inputs, seed = size
        x_BI, weight_OI = draw(seed, rows, outputs, inputs)
        assert torch.equal(matmul(x_BI, pack(weight_OI)), exact(x_BI, weight_OI))


@pytest.mark.parametrize("inputs", [63, 64, 65, 576, 4096])
@pytest.mark.parametrize("value", [-128, 127])
def test_the_largest_sums_do_not_overflow(way: str, inputs: int, value: int) -> None:
    weight_OI = torch.ones(3, inputs, dtype=torch.int8)
    weight_OI[1], weight_OI[2] = -1, 0
    x_BI = torch.full((5, inputs), value, dtype=torch.int8)
    expected = torch.tensor([value * inputs, -value * inputs, 0], dtype=torch.int32).expand(5, 3)
    assert torch.equal(matmul(x_BI, pack(weight_OI)), expected)
    assert torch.equal(matmul(x_BI[:1], pack(weight_OI)), expected[:1])


def test_a_width_that_float32_has_too_few_bits_for(way: str) -> None:
    if way == "triton":
        return  # adds integers, and its interpreter takes half a minute
    inputs = (1 << 17) + 65
    x_BI, weight_OI = torch.full((2, inputs), 127, dtype=torch.int8), torch.ones(2, inputs, dtype=torch.int8)
    assert torch.equal(matmul(x_BI, pack(weight_OI)), torch.full((2, 2), 127 * inputs, dtype=torch.int32))


def test_rows_of_zeros_give_zeros(way: str) -> None:
    _, weight_OI = draw(3, 1, 9, 100)
    for bits in (8, None):
        assert torch.equal(linear(torch.zeros(2, 100), pack(weight_OI), 2.0, bits=bits), torch.zeros(2, 9))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("bits", "peak"), [(8, None), (8, 127), (4, None), (2, 1)])
def test_linear_is_the_quantized_layer_to_the_last_bit(way: str, rows: int, bits: int, peak: int | None) -> None:
    _, weight_OI = draw(1, 1, 33, 577)
    draws = torch.Generator().manual_seed(2)
    x_BI, bias_O = 3 * torch.randn(rows, 577, generator=draws), torch.randn(33, generator=draws)
    scale_O = torch.rand(33, generator=draws) + 0.5
    q_BI, token_scale_B1 = quantize(x_BI, bits, peak)
    for scale in (torch.tensor(1.7), torch.tensor([1.7]), scale_O):
        expected = F.linear(q_BI.float(), weight_OI.float()) / (scale * token_scale_B1)
        assert torch.equal(linear(x_BI, pack(weight_OI), scale, bits=bits, peak=peak), expected)
        assert torch.equal(linear(x_BI, pack(weight_OI), scale, bias_O, bits=bits, peak=peak), expected + bias_O)
    assert torch.equal(
        linear(x_BI, pack(weight_OI), 1.7, bits=bits, peak=peak),
        linear(x_BI, pack(weight_OI), torch.tensor(1.7), bits=bits, peak=peak),
    )


def test_the_worked_example_of_the_card() -> None:
    q_BI, scale_B1 = quantize(torch.tensor([[0.3, -1.2, 0.6], [1.2, 0.0, 0.0]]))
    assert q_BI.tolist() == [[32, -128, 64], [127, 0, 0]]
    assert torch.allclose(q_BI / scale_B1, torch.tensor([[0.3, -1.2, 0.6], [1.2 * 127 / 128, 0.0, 0.0]]))
    assert quantize(torch.tensor([[1.2]]), peak=127)[0].item() == 127
    # Halves go to the even integer; a row below eps is scaled as if eps were its largest.
    assert quantize(torch.tensor([[-128.0, 0.5, 1.5, 2.5]]))[0].tolist() == [[-128, 0, 2, 2]]
    assert quantize(torch.tensor([[1e-6]]), eps=1e-5)[1].item() == pytest.approx(128e5)


@given(st.integers(0, 2**31), st.integers(1, 4), st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e30]))
def test_halves_and_clamps_are_torchs(seed: int, rows: int, size: float) -> None:
    if find_spec("numba") is None:
        pytest.skip("numba is not installed")
    draws = torch.Generator().manual_seed(seed)
    # Quarters of a step of the integers, so that many lie halfway.
    x_BI = torch.randint(-512, 513, (rows, 65), generator=draws) / 4 * size
    _, weight_OI = draw(seed, 1, 5, 65)
    q_BI, scale_B1 = quantize(x_BI)
    expected = F.linear(q_BI.float(), weight_OI.float()) / (torch.tensor(1.3) * scale_B1)
    assert torch.equal(linear(x_BI, pack(weight_OI), 1.3), expected)


@pytest.mark.parametrize("rows", [1, 3])
def test_floating_activations(way: str, rows: int) -> None:
    _, weight_OI = draw(4, 1, 21, 333)
    draws = torch.Generator().manual_seed(5)
    x_BI, bias_O = torch.randn(rows, 333, generator=draws), torch.randn(21, generator=draws)
    expected = x_BI.double() @ weight_OI.double().T / torch.tensor(1.7).double() + bias_O
    # What float32 sums differ by from exact ones.
    close = {"atol": 1e-4 if way != "numba" else 3e-6, "rtol": 1e-6}
    assert torch.allclose(linear(x_BI, pack(weight_OI), 1.7, bias_O, bits=None).double(), expected, **close)
    # Of any magnitude, down to numbers below float32's normal ones.
    for size in (1e-42, 1e-20, 1e20, 1e35):
        found = linear(x_BI * size, pack(weight_OI), 1.0, bits=None).double()
        expected = (x_BI * size).double() @ weight_OI.double().T
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-43


def test_floating_activations_keep_what_is_small_beside_the_largest() -> None:
    if find_spec("numba") is None:
        pytest.skip("numba is not installed")
    x_BI = torch.tensor([[1000.0, 1.0, -0.5, 0.001]])
    weight_OI = torch.tensor([[0, 1, 1, 1]], dtype=torch.int8)
    assert linear(x_BI, pack(weight_OI), 1.0, bits=None).item() == pytest.approx(0.501, rel=1e-6)


@pytest.mark.parametrize("bits", [8, None])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row(way: str, bits: int | None, value: float) -> None:
    _, weight_OI = draw(6, 1, 6, 70)
    weight_OI[:, 5] = 1
    x_BI = torch.ones(2, 70)
    x_BI[0, 5] = value
    found = linear(x_BI, pack(weight_OI), 1.0, bits=bits)
    assert not found[0].isfinite().any()
    assert torch.allclose(found[1], weight_OI.sum(1).float() * (1 if bits is None else 127 / 128))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_shapes_and_dtypes_of_activations(way: str, dtype: torch.dtype) -> None:
    _, weight_OI = draw(7, 1, 5, 66)
    x = torch.randn(2, 3, 66, generator=torch.Generator().manual_seed(8)).to(dtype)
    found = linear(x, pack(weight_OI), 1.0)
    assert (found.shape, found.dtype) == ((2, 3, 5), dtype)
    rows = linear(x.reshape(6, 66).float(), pack(weight_OI), 1.0)
    assert torch.equal(found, rows.to(dtype).view(2, 3, 5))
    assert torch.equal(linear(x[0, 0], pack(weight_OI), 1.0), found[0, 0])
    strided = x.transpose(0, 1)
    assert torch.equal(linear(strided, pack(weight_OI), 1.0), found.transpose(0, 1))


def test_threads_give_the_same_numbers(threads: None) -> None:
    if find_spec("numba") is None:
        pytest.skip("numba is not installed")
    x_BI, weight_OI = draw(9, 6, 1003, 577)
    packed_OJ, floats_BI = pack(weight_OI), x_BI.float() / 100
    found = []
    for count in (1, 2, 64):
        torch.set_num_threads(count)
        whole = matmul(x_BI, packed_OJ)
        assert torch.equal(whole, exact(x_BI, weight_OI))
        found.append(torch.stack([linear(floats_BI, packed_OJ, 1.3, bits=bits) for bits in (8, None)]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    # And from several threads of Python's at once.
    with ThreadPoolExecutor(3) as pool:
        for each in pool.map(lambda _: matmul(x_BI, packed_OJ), range(12)):
            assert torch.equal(each, exact(x_BI, weight_OI))


def test_more_activations_than_the_cache_holds() -> None:
    x_BI, weight_OI = draw(10, 1100, 5, 512)
    assert torch.equal(matmul(x_BI, pack(weight_OI)), exact(x_BI, weight_OI))


@pytest.mark.parametrize(("kind", "size"), [("vnni", 64), ("avx2", 32), ("any", 32), ("any", 64)])
def test_every_instruction_set_multiplies_alike(kind: str, size: int) -> None:
    if find_spec("numba") is None:
        pytest.skip("numba is not installed")
    import numpy as np
    from numba import njit

    from intaglio.kernels.ternary_simd import instructions, tile

    here = instructions()[0]
    if kind not in {"vnni": {"vnni", "avx2", "any"}, "avx2": {"avx2", "any"}, "any": {"any"}}[here]:
        pytest.skip(f"this processor has no {kind}")
    multiply = tile(2, kind, size)

    @njit
    def run(packed, x, sums):
        J = packed.shape[1]
        first = packed.ctypes.data
        # Rows that do not follow each other, one of them twice.
        multiply(first, 2, 5, 5, 1 << 11, J, x.ctypes.data, sums.ctypes.data, sums.strides[0])

    x_BI, weight_OI = draw(11, 2, 6, 2 * 4 * 64 + 3 * 64)
    x_BI[0], weight_OI[0] = -128, 1
    sums = np.zeros((2, 6), np.int32)
    run(pack(weight_OI).numpy(), x_BI.numpy(), sums)
    found = torch.from_numpy(sums) - x_BI.sum(1, keepdim=True, dtype=torch.int32)
    assert torch.equal(found[:, [0, 2, 5]], exact(x_BI, weight_OI)[:, [0, 2, 5]])
    assert not sums[:, [1, 3, 4]].any()  # nothing is written beside


def test_without_numba_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_utils, "find_spec", lambda name: None)
    _utils.works.cache_clear()
    with pytest.warns(UserWarning, match="slowly, as numba is not installed") as warned:  # once
        assert ternary._kernel(torch.zeros(1)) == ternary._kernel(torch.zeros(1)) == "torch"
    assert len(warned) == 1
    monkeypatch.undo()
    # One that is there and cannot be imported is told of, once.
    monkeypatch.setattr(_utils, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "intaglio.kernels.ternary_numba", None)
    _utils.works.cache_clear()
    x_BI, weight_OI = draw(13, 2, 3, 64)
    with pytest.warns(UserWarning, match=r"^ternary products run in plain torch, slowly, as numba fails"):
        assert torch.equal(matmul(x_BI, pack(weight_OI)), exact(x_BI, weight_OI))
    assert torch.equal(matmul(x_BI, pack(weight_OI)), exact(x_BI, weight_OI))
    monkeypatch.undo()
    _utils.works.cache_clear()
    assert ternary._kernel(torch.zeros(1)) == ("numba" if find_spec("numba") else "torch")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiler_leaves_the_product_whole(way: str) -> None:
    x_BI, weight_OI = draw(14, 3, 9, 100)
    packed_OJ, scale, floats_BI = pack(weight_OI), torch.tensor(1.3), x_BI.float() / 100

    def layer(x: Tensor, whole: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = linear(torch.sin(x), packed_OJ, scale)
        return y + 1, linear(x, packed_OJ, 1.3, y[0], bits=None), matmul(whole, packed_OJ)

    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for found, expected in zip(compiled(floats_BI, x_BI), layer(floats_BI, x_BI), strict=True):
        assert torch.equal(found, expected)


def test_nothing_is_loaded_before_a_product() -> None:
    code = (
        "import sys, intaglio.kernels.ternary\nassert not {'numba', 'llvmlite', 'triton'} & set(sys.modules), 'loaded'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


REFUSED = [
    (lambda: pack(torch.zeros(4, dtype=torch.int8)), r"^weight: 4 of int8 cannot be packed: a matrix of int8"),
    (lambda: pack(torch.zeros(0, 4, dtype=torch.int8)), r"^weight: 0x4 of int8 cannot be packed"),
    (lambda: pack(torch.zeros(2, 4)), r"^weight: 2x4 of float32 cannot be packed"),
    (lambda: pack(torch.full((2, 4), 2, dtype=torch.int8)), r"^weight: values from 2 to 2 cannot be packed in two"),
    (lambda: unpack(torch.zeros(2, 16, dtype=torch.uint8), 65), r"^packed: rows of 16 bytes hold 1 to 64 weights"),
    (lambda: unpack(torch.zeros(2, 15, dtype=torch.uint8), 60), r"^packed: rows of 15 bytes hold no weights, not 60"),
    (lambda: unpack(torch.zeros(2, 16), 60), r"^packed: 2x16 of float32 is not what `pack` makes"),
    (lambda: unpack(torch.full((1, 16), 255, dtype=torch.uint8), 60), r"^packed: a byte holds two set bits"),
    (lambda: matmul(torch.zeros(2, 4), SMALL), r"^x: 2x4 of float32 cannot be multiplied: a matrix of int8 can"),
    (lambda: matmul(torch.zeros(2, 70, dtype=torch.int8), SMALL), r"^packed: rows of 16 bytes hold 1 to 64 weights"),
    (lambda: linear(torch.zeros(2, 4, dtype=torch.int8), SMALL, 1.0), r"^x: 2x4 of int8 cannot be multiplied: fl"),
    (lambda: linear(torch.zeros(()), SMALL, 1.0), r"^x: a scalar of float32 cannot be multiplied"),
    (lambda: linear(torch.zeros(2, 4), SMALL, torch.ones(3)), r"^weight_scale: 3 of float32 on cpu does not fit: 1 or"),
    (lambda: linear(torch.zeros(2, 4), SMALL, 1.0, torch.ones(3)), r"^bias: 3 of float32 on cpu does not fit: 2"),
    (lambda: linear(torch.zeros(2, 4), SMALL, 1.0, bits=9), r"^bits: 9 is not possible for activations: 2 to 8 are"),
    (lambda: linear(torch.zeros(2, 4), SMALL, 1.0, peak=100), r"^peak: 100 is not possible for 8 bits: 128 and"),
    (lambda: linear(torch.zeros(2, 4, requires_grad=True), SMALL, 1.0), r"^x: packed weights pass no gradient on"),
    (lambda: linear(torch.zeros(2, 4, device="meta"), SMALL, 1.0), r"^x: it is on meta, the packed weights on cpu"),
]  # fmt: skip
SMALL = pack(torch.zeros(2, 4, dtype=torch.int8))


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
    assert "skipped" not in done.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 2, 16, 33])
def test_on_a_gpu(rows: int) -> None:
    x_BI, weight_OI = draw(12, rows, 130, 577)
    packed_OJ = pack(weight_OI).cuda()
    assert torch.equal(matmul(x_BI.cuda(), packed_OJ).cpu(), exact(x_BI, weight_OI))
    floats_BI = x_BI.float() / 100
    assert torch.equal(linear(floats_BI.cuda(), packed_OJ, 1.3).cpu(), linear(floats_BI, pack(weight_OI), 1.3))


@pytest.mark.skipif(find_spec("numba") is None, reason="numba is not installed")
@pytest.mark.parametrize("winner", ["1", "2"])
def test_the_threads_are_the_measured_ones(winner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from intaglio.kernels import ternary_numba

    x_BI, weight_OI = torch.randn(2, 64), torch.randint(-1, 2, (30, 64), dtype=torch.int8)
    expected = ternary.linear(x_BI, pack(weight_OI), 2.0)
    given: list[int | None] = []
    call = ternary_numba._call
    monkeypatch.setattr(ternary_numba, "_call", lambda *all: given.append(all[-1]) or call(*all))
    torch.set_num_threads(2)
    with tuning.using(tuner := GivenTimes(winner)):
        for _ in range(2):
            assert torch.equal(ternary.linear(x_BI, pack(weight_OI), 2.0), expected)
    assert given[-2:] == [int(winner)] * 2
    assert list(tuner.used) == ["ternary 64x30 rows 2 threads 2"]
