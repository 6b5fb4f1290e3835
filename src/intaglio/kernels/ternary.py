"""Ternary weights in two bits each, and the matrix product (inference of BitNet b1.58; arXiv 2402.17764).

    packed_OJ = pack(weight_OI)                         # -1, 0, 1 in int8 -> four weights per byte
    y_BO = linear(x_BI, packed_OJ, weight_scale)        # activations to int8 per token, product, rescaling

Layout. A row of I weights becomes J bytes, J = 16 ceil(I / 64): the width is padded to 4J with zeros. Byte j of a row
holds the weights of the columns j, J + j, 2J + j and 3J + j, each as weight + 1, from the lowest two bits up:

    packed[o, j] = sum_k (weight[o, kJ + j] + 1) 4^k

So a run of bytes, shifted by 2k and masked, is a run of weights that aligns with a run of activations, without
shuffling. With the codes 0, 1, 2 instead of -1, 0, 1 a product of unsigned and signed bytes gives sum_i (w_i + 1) x_i,
from which sum_i x_i is subtracted. The width itself is not stored: it comes from the activations, and is an argument of
`unpack`.

Dispatch: numba on a CPU, if installed (`pip install 'intaglio[kernels]'`); Triton on a CUDA device; else torch, which
unpacks some rows of the weight at a time and multiplies them as floating point: the same numbers, but slower than a
dense weight. Integer results are exact in all of them.

Dimension letters: B rows of activations (tokens), I inputs, O outputs, J bytes of a packed row.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from intaglio.environment import tuning
from intaglio.errors import IntaglioError
from intaglio.kernels._utils import copies, describe_tensor, works

EPS = 1e-5
"""Lower bound of a row's peak (bitlinear, transformers)."""
_GROUP = 64
"""Row padding in weights: sixteen bytes, the shortest vector of the kernels."""
_AT_ONCE = 1 << 22
"""Weights that the torch product unpacks at a time: 16 MiB."""
_EXACT = 1 << 24
"""Sums of integers below this are exact in float32."""


def packed_width(width: int) -> int:
    """Return J, the bytes of a packed row."""
    return -(-width // _GROUP) * (_GROUP // 4)


def pack(weight_OI: Tensor) -> Tensor:
    """Pack ternary weights, four per byte; uint8 [O, J], contiguous."""
    if weight_OI.ndim != 2 or not weight_OI.numel() or weight_OI.dtype != torch.int8:
        raise IntaglioError(
            f"weight: {describe_tensor(weight_OI)} cannot be packed: a matrix of int8 with at least one row and one "
            "column can."
        )
    if int(weight_OI.min()) < -1 or int(weight_OI.max()) > 1:
        raise IntaglioError(
            f"weight: values from {int(weight_OI.min())} to {int(weight_OI.max())} cannot be packed in two bits: "
            "-1, 0 and 1 can."
        )
    outputs, width = weight_OI.shape
    filled = torch.nn.functional.pad(weight_OI, (0, 4 * packed_width(width) - width)) + 1
    codes = filled.to(torch.uint8).view(outputs, 4, -1)
    return codes[:, 0] | codes[:, 1] << 2 | codes[:, 2] << 4 | codes[:, 3] << 6


def unpack(packed_OJ: Tensor, width: int, dtype: torch.dtype = torch.int8) -> Tensor:
    """Return the weights [O, I] of -1, 0 and 1, the inverse of `pack`."""
    _check_packed(packed_OJ, width)
    if bool((packed_OJ & (packed_OJ >> 1) & 0x55).any()):
        raise IntaglioError("packed: a byte holds two set bits for one weight, which stand for none of -1, 0 and 1.")
    return _unpacked(packed_OJ, dtype)[:, :width].contiguous()


def _unpacked(packed_OJ: Tensor, dtype: torch.dtype) -> Tensor:
    """Return all 4J columns."""
    planes = torch.stack([packed_OJ >> 2 * k & 3 for k in range(4)], 1)
    return planes.to(dtype).sub_(1).flatten(1)


def quantize(x: Tensor, bits: int = 8, peak: int | None = None, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """Round activations to integers, with a scale for each row: q int8 [..., I] and s float32 [..., 1].

        s = peak / max(max_i |x_i|, eps),   q = clamp(round(x s), -2^(bits-1), 2^(bits-1) - 1)

    with halves to the even integer, and the quotient as torch computes it for a number and a tensor: the reciprocal
    times peak. A row with a value that is not finite has q = 0 and s = NaN.
    """
    low, high, peak = _range(bits, peak)
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    finite = largest.isfinite()
    scale = torch.where(finite, largest.clamp(min=eps).reciprocal() * peak, torch.nan)
    q = (x * scale).round().clamp(low, high).masked_fill(~finite, 0)
    return q.to(torch.int8), scale


def matmul(x_BI: Tensor, packed_OJ: Tensor) -> Tensor:
    """Multiply integers exactly: y_bo = sum_i x_bi w_oi, int32 [B, O]."""
    if torch.compiler.is_compiling():
        return torch.ops.intaglio.ternary_matmul(x_BI, packed_OJ)
    if x_BI.ndim != 2 or x_BI.dtype != torch.int8:
        raise IntaglioError(f"x: {describe_tensor(x_BI)} cannot be multiplied: a matrix of int8 can.")
    _check_packed(packed_OJ, x_BI.shape[1], x_BI)
    if (fast := _kernel(x_BI)) == "numba":
        from intaglio.kernels import ternary_numba

        return ternary_numba.matmul(x_BI, packed_OJ)
    if fast == "triton" and len(x_BI) <= _most_rows():
        from intaglio.kernels import ternary_triton

        return ternary_triton.matmul(x_BI, packed_OJ)
    return _dense(x_BI, packed_OJ).to(torch.int32)


def linear(
    x: Tensor,
    packed_OJ: Tensor,
    weight_scale: float | Tensor,
    bias_O: Tensor | None = None,
    *,
    bits: int | None = 8,
    peak: int | None = None,
    eps: float = EPS,
) -> Tensor:
    """Apply a linear layer with ternary weights [..., O], in x's dtype.

        y = (sum_i q_i w_i) / (s_w s_x) + bias,   q, s_x = quantize(x, bits, peak, eps)
        y = (sum_i x_i w_i) / s_w + bias          without bits

    With bits all implementations give the same float32 numbers to the last bit, those of `F.linear(q, w) / (s_w * s_x)
    + bias`. Without, numba takes a row of x in 31-bit fixed point, relative to the row's largest magnitude, so that the
    sum itself is exact, where torch and Triton add in float32.
    """
    if torch.compiler.is_compiling():
        if not isinstance(weight_scale, Tensor):
            weight_scale = torch.full((1,), weight_scale, device=x.device)
        return torch.ops.intaglio.ternary_linear(x, packed_OJ, weight_scale, bias_O, bits, peak, eps)
    if not x.ndim or not x.is_floating_point():
        raise IntaglioError(
            f"x: {describe_tensor(x)} cannot be multiplied: floating point of at least one dimension can."
        )
    shape, outputs = x.shape, len(packed_OJ)
    _check_packed(packed_OJ, shape[-1], x)
    if x.requires_grad and torch.is_grad_enabled():
        raise IntaglioError("x: packed weights pass no gradient on: call the model under torch.no_grad().")
    if not isinstance(weight_scale, Tensor):
        weight_scale = torch.tensor([weight_scale], device=x.device)
    _check_fits("weight_scale", weight_scale, (1, outputs), x)
    if bias_O is not None:
        _check_fits("bias", bias_O, (outputs,), x)
    limits = None if bits is None else _range(bits, peak)
    # A small product takes some microseconds, and each torch call beside it a quarter to one.
    x_BI = x if len(shape) == 2 else x.reshape(-1, shape[-1])
    y_BO = _linear(x_BI.float(), packed_OJ, weight_scale.float(), bias_O, bits or 0, limits, eps)
    if x.dtype != torch.float32:
        y_BO = y_BO.to(x.dtype)
    return y_BO if len(shape) == 2 else y_BO.view(*shape[:-1], outputs)


# Compilers must not trace into kernels called by address. Outside of compilation they are called without the custom
# op, whose overhead equals a small product.
@torch.library.custom_op("intaglio::ternary_matmul", mutates_args=(), schema="(Tensor x, Tensor packed) -> Tensor")
def _matmul_op(x: Tensor, packed: Tensor) -> Tensor:
    return matmul(x, packed)


@torch.library.custom_op(
    "intaglio::ternary_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor packed, Tensor scale, Tensor? bias, int? bits, int? peak, float eps) -> Tensor",
)
def _linear_op(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, bits: int | None, peak: int | None, eps: float
) -> Tensor:
    return linear(x, packed, scale, bias, bits=bits, peak=peak, eps=eps)


@_matmul_op.register_fake
def _(x: Tensor, packed: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], packed.shape[0]), dtype=torch.int32)


@_linear_op.register_fake
def _(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, bits: int | None, peak: int | None, eps: float
) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def _linear(
    x_BI: Tensor,
    packed_OJ: Tensor,
    scale_S: Tensor,
    bias_O: Tensor | None,
    bits: int,
    limits: tuple[int, int, int] | None,
    eps: float,
) -> Tensor:
    bias_O = None if bias_O is None else bias_O.detach().float()
    fast = _kernel(x_BI)
    if fast == "numba":
        from intaglio.kernels import ternary_numba

        threads = _threads(x_BI, packed_OJ, scale_S, limits, eps)
        return ternary_numba.linear(x_BI, packed_OJ, scale_S, bias_O, limits, eps, threads)
    x_BI, scale_S = x_BI.detach(), scale_S.detach().view(-1)
    if limits is None:
        factors_BI, divisor = x_BI, scale_S
    else:
        factors_BI, scale_B1 = quantize(x_BI, bits, limits[2], eps)
        divisor = scale_S * scale_B1
    if fast == "triton" and len(x_BI) <= _most_rows():
        from intaglio.kernels import ternary_triton

        y_BO = ternary_triton.matmul(factors_BI, packed_OJ).float() / divisor
    else:
        y_BO = _dense(factors_BI, packed_OJ).float() / divisor
    return y_BO if bias_O is None else y_BO + bias_O


def _threads(
    x_BI: Tensor, packed_OJ: Tensor, scale_S: Tensor, limits: tuple[int, int, int] | None, eps: float
) -> int | None:
    """Return the threads that the CPU kernel is fastest with, measured at the first use; None: by size."""
    tuner, threads = tuning.tuner(), torch.get_num_threads()
    if tuner is None or threads == 1:
        return None
    own = (x_BI.shape, packed_OJ.shape, limits is None, threads)
    if own not in tuner.chosen:
        from intaglio.kernels import ternary_numba

        weights = copies(packed_OJ.detach())
        calls = {
            str(count): partial(
                lambda count: ternary_numba.linear(x_BI, next(weights), scale_S, None, limits, eps, count), count
            )
            for count in (1, threads)
        }
        sizes = f"{x_BI.shape[1]}x{len(packed_OJ)}{' of floats' if limits is None else ''}"
        tuner.chosen[own] = tuner.choose(f"ternary {sizes} rows {len(x_BI)} threads {threads}", calls, compiles=True)
        tuner.save()
    return int(tuner.chosen[own])


def _dense(x_BI: Tensor, packed_OJ: Tensor) -> Tensor:
    """Compute the product in torch, some rows at a time; exact for integers (in float64 where float32 is short)."""
    width = x_BI.shape[1]
    exact = x_BI.is_floating_point() or 128 * width <= _EXACT
    dtype = torch.float32 if exact else torch.float64
    x_BI = x_BI.to(dtype)
    rows = max(1, _AT_ONCE // (4 * packed_OJ.shape[1]))
    parts = [x_BI @ _unpacked(some_OJ, dtype)[:, :width].T for some_OJ in packed_OJ.split(rows)]
    return torch.cat(parts, 1)


def _most_rows() -> int:
    from intaglio.kernels import ternary_triton

    return ternary_triton.MOST_ROWS


def _kernel(x: Tensor) -> str:
    """Return the implementation for this tensor's device: "numba", "triton" or "torch"."""
    if x.device.type == "cpu" and _has("numba"):
        return "numba"
    return "triton" if x.device.type == "cuda" and _has("triton") else "torch"


def _has(package: str) -> bool:
    return works(package, "ternary", "ternary products run in plain torch, slowly")


def _range(bits: int, peak: int | None) -> tuple[int, int, int]:
    """Return the smallest and largest integer, and the integer of a row's peak."""
    if bits not in range(2, 9):
        raise IntaglioError(f"bits: {bits} is not possible for activations: 2 to 8 are.")
    half = 1 << (bits - 1)
    peak = half if peak is None else peak
    if peak not in (half, half - 1):
        raise IntaglioError(f"peak: {peak} is not possible for {bits} bits: {half} and {half - 1} are.")
    return -half, half - 1, peak


def _check_packed(packed_OJ: Tensor, width: int, x: Tensor | None = None) -> None:
    if packed_OJ.ndim != 2 or packed_OJ.dtype != torch.uint8:
        raise IntaglioError(f"packed: {describe_tensor(packed_OJ)} is not what `pack` makes: a matrix of uint8 is.")
    if width < 1 or packed_OJ.shape[1] != packed_width(width):
        raise IntaglioError(
            f"packed: rows of {packed_OJ.shape[1]} bytes hold {_widths(packed_OJ.shape[1])} weights, not {width}."
        )
    if x is not None and x.device != packed_OJ.device:
        raise IntaglioError(f"x: it is on {x.device}, the packed weights on {packed_OJ.device}; both must be on one.")


def _check_fits(name: str, tensor: Tensor, sizes: tuple[int, ...], x: Tensor) -> None:
    if tensor.numel() not in sizes or tensor.device != x.device:
        accepted = " or ".join(map(str, dict.fromkeys(sizes)))
        shown = f"{describe_tensor(tensor)} on {tensor.device}"
        raise IntaglioError(f"{name}: {shown} does not fit: {accepted} on {x.device} would.")


def _widths(J: int) -> str:
    return "no" if J < 1 or J % (_GROUP // 4) else f"{4 * J - _GROUP + 1} to {4 * J}"
