"""CPU kernel of `ternary`; the inner loop is in `ternary_simd`.

A call quantizes the activations, multiplies, and rescales in one compiled function. Rows of the weight are split over
torch's own threads (`openmp`) where a product is large enough, each of which quantizes for itself; results do not
depend on it. Without quantization the activations become 31-bit fixed point, whose four digits in base 256 (each from
-128 to 127) are four rows of integers.

Tensors are passed as addresses (`numba_pointers`): a product of SmolLM2's size takes about ten µs. The first call
compiles (about two seconds), and nothing is cached on disk.

Dimension letters: B rows of activations, I inputs, O outputs, J bytes of a packed row; D rows of integers (B, or 4B
digits).
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba.extending import intrinsic
from torch import Tensor

from intaglio.kernels.numba_pointers import as_float, compiled, pointer, shared
from intaglio.kernels.openmp import launch, most_threads
from intaglio.kernels.ternary_simd import ROWS, instructions, tile

_GIVEN, _QUANTIZED, _FLOATING = 0, 1, 2
_DIGITS = 4
"""8-bit digits of a fixed-point number."""
_CACHE = 1 << 19
"""Bytes of activations multiplied with all rows at a time: half of an L2 cache."""
_WORTH = 1 << 21
"""Integer products per further thread (about 15 microseconds of work)."""
_LINE = 64
_ARGUMENTS = struct.Struct("18qd")
_SHARES, _TAKEN, _EPS = 16, 17, 18
"""Places of the number of shares, of the shares taken, and of the least magnitude."""
_INFINITE = np.int32(0x7F800000)
"""Bits of infinity in float32; those of NaN are greater."""

_AHEAD, _AHEAD_RUNS = 1 << 14, 1 << 11
"""Prefetch distances in bytes, for consecutive rows and for four runs."""
_tile_1, _tile_2, _tile_4 = (tile(tokens, *instructions()) for tokens in (1, 2, 4))


def matmul(x_BI: Tensor, packed_OJ: Tensor) -> Tensor:
    """Multiply integers, int32 [B, O]; arguments are checked in `ternary.matmul`."""
    y_BO = torch.empty(len(x_BI), len(packed_OJ), dtype=torch.int32)
    _call(_GIVEN, x_BI, packed_OJ, y_BO)
    return y_BO


def linear(
    x_BI: Tensor,
    packed_OJ: Tensor,
    scale_S: Tensor,
    bias_O: Tensor | None,
    limits: tuple[int, int, int] | None,
    eps: float,
    threads: int | None = None,
) -> Tensor:
    """Apply a linear layer, float32 [B, O]; arguments are checked in `ternary.linear`.

    Without a number of threads it follows from the size.
    """
    y_BO = torch.empty(len(x_BI), len(packed_OJ))
    kind = _FLOATING if limits is None else _QUANTIZED
    _call(kind, x_BI, packed_OJ, y_BO, scale_S, bias_O, limits or (0, 0, 0), eps, threads)
    return y_BO


def _call(
    kind: int,
    x_BI: Tensor,
    packed_OJ: Tensor,
    y_BO: Tensor,
    scale_S: Tensor | None = None,
    bias_O: Tensor | None = None,
    limits: tuple[int, int, int] = (0, 0, 0),
    eps: float = 0.0,
    threads: int | None = None,
) -> None:
    x_BI, packed_OJ = x_BI.contiguous(), packed_OJ.contiguous()
    scale_S = None if scale_S is None else scale_S.contiguous()
    bias_O = None if bias_O is None else bias_O.contiguous()
    (B, width), (outputs, J) = x_BI.shape, packed_OJ.shape
    D = _DIGITS * B if kind == _FLOATING else B
    most = 1 + D * outputs * J * 4 // _WORTH if threads is None else threads
    threads = min(most_threads(), most)
    # Sixteen outputs are a cache line, which two threads should not share.
    each = -(-outputs // threads) + 15 & -16
    own = D * (4 * J + 4 * (each + ROWS) + 12) + 2 * _LINE
    room = torch.empty(threads * own, dtype=torch.uint8)
    arguments = _ARGUMENTS.pack(
        kind, x_BI.data_ptr(), B, width, packed_OJ.data_ptr(), outputs, J, y_BO.data_ptr(),
        0 if scale_S is None else scale_S.data_ptr(), 1 if scale_S is None else scale_S.numel(),
        0 if bias_O is None else bias_O.data_ptr(), *limits, room.data_ptr(), own, threads, 0, eps,
    )  # fmt: skip
    launch(_entry().address, bytearray(arguments), threads)


# Compiled from here on. Addresses are integers, and pointers are indexed: arrays take far longer to compile.
@intrinsic
def _nearest(_context, x):
    """Round half to even, as a float; np.rint would be a function call per number."""

    def emit(_context, builder, _signature, values):
        return builder.call(builder.module.declare_intrinsic("llvm.rint", [values[0].type]), values)

    return x(x), emit


@compiled
def _largest(bits, width):
    """Return the bits of the greatest magnitude of a row: ordered as integers, infinities and NaN highest."""
    largest = np.int32(0)
    for i in range(width):
        magnitude = bits[i] & np.int32(0x7FFFFFFF)
        largest = magnitude if magnitude > largest else largest
    return largest


@compiled
def _copied(x, q, width):
    total = np.int32(0)
    for i in range(width):
        q[i] = x[i]
        total += np.int32(x[i])
    return total


@compiled
def _rounded(x, q, width, scale, low, high):
    total = np.int32(0)
    for i in range(width):
        whole = _nearest(x[i] * scale)
        whole = low if whole < low else whole
        whole = np.int32(high if whole > high else whole)
        q[i] = np.int8(whole)
        total += whole
    return total


@compiled
def _digits(x, q, width, filled, scale, totals):
    """Write the base-256 digits of the fixed-point numbers round(x scale), a row per digit, lowest first."""
    t0, t1, t2, t3 = np.int32(0), np.int32(0), np.int32(0), np.int32(0)
    for i in range(width):
        left = np.int32(_nearest(np.float64(x[i]) * scale))
        d0 = np.int8(left)  # the lowest eight bits with their sign
        left = np.int32(left - d0) >> np.int32(8)
        d1 = np.int8(left)
        left = np.int32(left - d1) >> np.int32(8)
        d2 = np.int8(left)
        d3 = np.int8(np.int32(left - d2) >> np.int32(8))
        q[i], q[i + filled], q[i + 2 * filled], q[i + 3 * filled] = d0, d1, d2, d3
        t0 += np.int32(d0)
        t1 += np.int32(d1)
        t2 += np.int32(d2)
        t3 += np.int32(d3)
    totals[0], totals[1], totals[2], totals[3] = t0, t1, t2, t3


@compiled
def _prepare(kind, x, B, width, filled, low, high, peak, eps, digits, totals, scales):
    """Compute the integers [D, 4J], the sum of each row [D] (int32), and the scale of each token [B] (float64)."""
    total_D, scale_B = pointer(totals, np.int32), pointer(scales, np.float64)
    size = 1 if kind == _GIVEN else 4
    each = _DIGITS if kind == _FLOATING else 1
    for b in range(B):
        address = digits + b * each * filled
        q = pointer(address, np.int8)
        for d in range(each):
            for i in range(width, filled):
                q[d * filled + i] = np.int8(0)
        row = x + size * b * width
        x_I = pointer(row, np.float32)
        largest_bits = np.int32(0) if kind == _GIVEN else _largest(pointer(row, np.int32), width)
        largest = as_float(largest_bits)
        if kind == _GIVEN:
            total_D[b] = _copied(pointer(row, np.int8), q, width)
        elif largest_bits >= _INFINITE:
            for i in range(each * filled):
                q[i] = np.int8(0)
            for d in range(each):
                total_D[each * b + d] = np.int32(0)
            scale_B[b] = np.nan
        elif kind == _QUANTIZED:
            scale = np.float32(1) / max(largest, np.float32(eps)) * np.float32(peak)
            scale_B[b] = scale
            total_D[b] = _rounded(x_I, q, width, scale, np.float32(low), np.float32(high))
        else:
            # The power of two that scales the largest magnitude to [2^29, 2^30).
            power = math.ldexp(1.0, 30 - math.frexp(np.float64(largest))[1]) if largest_bits else 1.0
            scale_B[b] = power
            _digits(x_I, q, width, filled, power, pointer(totals + 4 * each * b, np.int32))


@compiled
def _multiply(digits, D, packed, J, sums, stride, first, end):
    """Multiply rows `first` to `end` of the weight with all rows of integers; `stride`: bytes of a row of sums."""
    # One or two rows of integers are memory-bound, fastest in four runs side by side; more are compute-bound,
    # fastest with consecutive rows. Remaining rows are computed twice.
    count = end - first
    groups = (count + ROWS - 1) // ROWS
    apart, most, ahead = (groups, count - groups, _AHEAD_RUNS) if D <= 2 else (1, count - 1, _AHEAD)
    b, c, e = min(apart, most), min(2 * apart, most), min(3 * apart, most)
    many = max(4, _CACHE // (4 * J) // 4 * 4)
    for start in range(0, D, many):
        stop = min(D, start + many)
        for group in range(groups):
            o = first + (group if D <= 2 else min(ROWS * group, max(0, count - ROWS)))
            rows, address, d = packed + o * J, sums + 4 * o, start
            while d + 4 <= stop:
                _tile_4(rows, b, c, e, ahead, J, digits + d * 4 * J, address + d * stride, stride)
                d += 4
            if d + 2 <= stop:
                _tile_2(rows, b, c, e, ahead, J, digits + d * 4 * J, address + d * stride, stride)
                d += 2
            if d < stop:
                _tile_1(rows, b, c, e, ahead, J, digits + d * 4 * J, address + d * stride, stride)


@compiled
def _finish(kind, B, outputs, y, scale, scales, bias, sums, stride, totals, token_scales, first, end):
    """Subtract sum_i x_i from the sums, divide by the scales and add the bias, for the outputs `first` to `end`."""
    total_D, token_scale_B = pointer(totals, np.int32), pointer(token_scales, np.float64)
    scale_S, bias_O = pointer(scale, np.float32), pointer(bias, np.float32)
    for b in range(B):
        y_O = pointer(y + 4 * b * outputs, np.float32)
        if kind == _GIVEN:
            whole_O, sum_O = pointer(y + 4 * b * outputs, np.int32), pointer(sums + b * stride, np.int32)
            for o in range(first, end):
                whole_O[o] = np.int32(sum_O[o] - total_D[b])
            continue
        if kind == _QUANTIZED:
            sum_O, total, own = pointer(sums + b * stride, np.int32), total_D[b], np.float32(token_scale_B[b])
            if scales == 1:
                divisor = np.float32(scale_S[0] * own)
                for o in range(first, end):
                    y_O[o] = np.float32(np.int32(sum_O[o] - total)) / divisor
            else:
                for o in range(first, end):
                    y_O[o] = np.float32(np.int32(sum_O[o] - total)) / np.float32(scale_S[o] * own)
        else:
            for o in range(first, end):
                value = np.int64(0)
                for d in range(_DIGITS * b + _DIGITS - 1, _DIGITS * b - 1, -1):
                    value = 256 * value + (pointer(sums + d * stride, np.int32)[o] - total_D[d])
                y_O[o] = np.float32(value / token_scale_B[b]) / scale_S[o if scales > 1 else 0]
        if bias:
            for o in range(first, end):
                y_O[o] += bias_O[o]


@compiled
def _parts(D, J, outputs, room):
    """Return the offsets of integers, sums, scales and totals, and the stride of the sums in bytes."""
    stride = 4 * ROWS * ((outputs + ROWS - 1) // ROWS)
    digits = (room + _LINE - 1) // _LINE * _LINE
    sums = digits + D * 4 * J
    scales = (sums + D * stride + _LINE - 1) // _LINE * _LINE
    return digits, sums, scales, scales + 8 * D, stride


@compiled
def _compute(arguments, share):
    """Compute a share of the outputs; sums are kept for these alone."""
    call = pointer(arguments, np.int64)
    kind, B, J, outputs, shares = call[0], call[2], call[6], call[5], call[_SHARES]
    D = B * _DIGITS if kind == _FLOATING else B
    each = ((outputs + shares - 1) // shares + 15) // 16 * 16
    first, end = share * each, min(outputs, (share + 1) * each)
    if first < end:
        digits, sums, own, totals, stride = _parts(D, J, each, call[14] + share * call[15])
        sums -= 4 * first
        eps = pointer(arguments, np.float64)[_EPS]
        _prepare(kind, call[1], B, call[3], 4 * J, call[11], call[12], call[13], eps, digits, totals, own)
        _multiply(digits, D, call[4], J, sums, stride, first, end)
        _finish(kind, B, outputs, call[7], call[8], call[9], call[10], sums, stride, totals, own, first, end)


@lru_cache(maxsize=1)
def _entry() -> Any:
    return shared(_compute, _SHARES, _TAKEN)
