"""CPU kernel of `gather`.

A call selects the inputs, records their indices and values, and adds their columns to the outputs eight at a time, so
that outputs are read and written once per eight columns; columns are contiguous, and those of skipped inputs are not
touched; the next eight are prefetched (`row_dot_llvm`). Then the rows of `up` are added alike. With several rows of
activations a column is read where any of them selects it, and adds zero for the others.

Outputs are split over torch's own threads (`openmp`) where a product is large enough. Each output is summed in a fixed
order, so results do not depend on the threads. Projections of the same input (`SharedInput`) are computed in one call:
each thread selects inputs for itself and computes its share of every projection's outputs, so threads start once. A low
rank takes a launch of its own before.

Dimension letters: B rows of activations, I inputs, O outputs, R rank; C selected inputs.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from intaglio.kernels import row_dot_llvm
from intaglio.kernels.llvm_emitter import LINE as _LINE
from intaglio.kernels.numba_pointers import as_float, compiled, pointer, shared
from intaglio.kernels.openmp import launch, most_threads

_WORTH = 1 << 20
"""Weights per further thread (about 15 microseconds of work)."""
_CHUNK = 1024
"""Outputs processed at a time where several rows read the same columns: they stay in the L1 cache."""
_TOGETHER = 8
"""Columns added at a time."""
_CALL = struct.Struct("9q")
"""Addresses and sizes of a call: x, B, I, projections, y, room, bytes of a share's room, shares, shares taken."""
_PROJECTION = struct.Struct("9qd")
"""Of each projection, after those: weight, O, scale, bias, thresholds of rows, down, up, low [R, B], R; threshold."""
_SHARES, _TAKEN, _LIMIT = 7, 8, 9
"""Places of fields of eight bytes."""
_CALL_SIZE, _PROJECTION_SIZE = _CALL.size, _PROJECTION.size

_dots = njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})


def linear(
    x_BI: Tensor,
    weight_IO: Tensor,
    threshold_B: Tensor | float,
    scale_I: Tensor | None,
    down_RI: Tensor | None,
    up_RO: Tensor | None,
    bias_O: Tensor | None,
    threads: int | None = None,
) -> Tensor:
    """Apply a linear layer, float32 [B, O]; arguments are checked in `gather.linear`.

    Without a number of threads it follows from the size.
    """
    (B, inputs), outputs = x_BI.shape, weight_IO.shape[1]
    most = 1 + B * inputs * outputs // _WORTH if threads is None else threads
    threads = min(most_threads(), most)
    low_RB = None if down_RI is None else torch.empty(len(down_RI), B)
    part = _projection(weight_IO, threshold_B, scale_I, bias_O, down_RI, up_RO, low_RB)
    if low_RB is not None:
        _launch(_low, x_BI, B, weight_IO.dtype, 0, part, threads)
    return _launch(_entry, x_BI, B, weight_IO.dtype, outputs, part, threads).view(B, outputs)


class SharedInput:
    """Projections without a low rank that read the same input.

    Args:
        parts: weight [I, O], threshold, scale [I] or None, and bias [O] in float32 or None of each; the weights of one
            dtype.
    """

    def __init__(self, parts: Sequence[tuple[Tensor, float, Tensor | None, Tensor | None]]) -> None:
        self._parts = parts  # addresses are valid as long as the tensors live
        self.inputs, self.dtype = parts[0][0].shape[0], parts[0][0].dtype
        self.widths = [weight_IO.shape[1] for weight_IO, *_ in parts]
        self._packed = b"".join(_projection(*part) for part in parts)

    def worth(self, rows: int) -> int:
        """Return the number of threads that the size is worth."""
        return min(most_threads(), 1 + rows * self.inputs * sum(self.widths) // _WORTH)

    def __call__(self, x: Tensor, threads: int) -> list[Tensor]:
        """Return each projection's outputs, float32 [..., O]; x [..., I] is float32 and contiguous."""
        *before, inputs = x.shape
        B = x.numel() // inputs
        y = _launch(_entry, x, B, self.dtype, sum(self.widths), self._packed, min(most_threads(), threads))
        parts = y.split([B * width for width in self.widths]) if len(self.widths) > 1 else (y,)
        return [part.view(*before, width) for part, width in zip(parts, self.widths, strict=True)]


def _projection(
    weight_IO: Tensor,
    threshold_B: Tensor | float,
    scale_I: Tensor | None,
    bias_O: Tensor | None,
    down_RI: Tensor | None = None,
    up_RO: Tensor | None = None,
    low_RB: Tensor | None = None,
) -> bytes:
    one, many = (threshold_B, None) if isinstance(threshold_B, float) else (0.0, threshold_B)
    scale, bias, thresholds, down, up, low = (
        0 if part is None else part.data_ptr() for part in (scale_I, bias_O, many, down_RI, up_RO, low_RB)
    )
    rank, outputs = 0 if down_RI is None else len(down_RI), weight_IO.shape[1]
    return _PROJECTION.pack(weight_IO.data_ptr(), outputs, scale, bias, thresholds, down, up, low, rank, one)


def _launch(
    entry: Any, x: Tensor, B: int, dtype: torch.dtype, outputs: int, projections: bytes, threads: int
) -> Tensor:
    """Return the outputs of all projections, one after the other."""
    inputs = x.shape[-1]
    y = torch.empty(B * outputs)
    own = (4 * (inputs + 2 * B * inputs) + 4 * _LINE) // _LINE * _LINE
    room = torch.empty(threads * own + _LINE, dtype=torch.uint8)
    count = len(projections) // _PROJECTION.size
    call = _CALL.pack(x.data_ptr(), B, inputs, count, y.data_ptr(), room.data_ptr(), own, threads, 0)
    launch(entry(dtype).address, bytearray(call + projections), threads)
    return y


# Compiled from here on. Addresses are integers, and pointers are indexed: arrays take far longer to compile.


@compiled
def _choose(x, B, inputs, threshold, thresholds, scale, places, values, rest):
    """Record the selected inputs, their values [C, B] (0 for rows that skip them) and the rest [B, I]; return C.

    NaN inputs are selected, so that they show in the result.
    """
    x_BI, scale_I, threshold_B = pointer(x, np.float32), pointer(scale, np.float32), pointer(thresholds, np.float32)
    place_C, value_CB, rest_BI = pointer(places, np.int32), pointer(values, np.float32), pointer(rest, np.float32)
    chosen = 0
    for i in range(inputs):
        size = scale_I[i] if scale else np.float32(1)
        wanted = False
        for b in range(B):
            value = x_BI[b * inputs + i]
            least = threshold_B[b] if thresholds else np.float32(threshold)
            keep = not (abs(value) * size <= least)
            wanted = wanted or keep
            value_CB[chosen * B + b] = value if keep else np.float32(0)
            rest_BI[b * inputs + i] = np.float32(0) if keep else value
        if wanted:
            place_C[chosen] = i
            chosen += 1
    return chosen


@compiled
def _parts(B, inputs, room):
    """Return the offsets of indices, values, rests, and factors."""
    places = (room + _LINE - 1) // _LINE * _LINE
    values = places + 4 * inputs
    rest = values + 4 * B * inputs
    return places, values, rest, (rest + 4 * B * inputs + _LINE - 1) // _LINE * _LINE


@lru_cache
def _functions(dtype: torch.dtype) -> tuple[Any, Any]:
    """Return `(dots, add)` for a weight dtype."""
    half = dtype == torch.bfloat16
    stored = np.uint16 if half else np.float32
    size = 2 if half else 4

    if half:

        @compiled
        def number(bits):
            return as_float(np.int32(np.uint32(bits) << np.uint32(16)))
    else:

        @compiled
        def number(value):
            return value

    @_dots
    def dots(down, inputs, rest, B, low, first, end):
        """Compute low[r, b] = sum_i down[r, i] rest[b, i] for the rows `first` to `end`."""
        low_RB = pointer(low, np.float32)
        for r in range(first, end):
            down_I = pointer(down + size * r * inputs, stored)
            for b in range(B):
                rest_I = pointer(rest + 4 * b * inputs, np.float32)
                total = np.float32(0)
                for i in range(inputs):
                    total += number(down_I[i]) * rest_I[i]
                low_RB[r * B + b] = total

    eight_1, eight_2 = (row_dot_llvm.adds(_TOGETHER, n, half, onward=True) for n in (1, 2))
    single = row_dot_llvm.adds(1, 1, half)

    @compiled
    def columns(start, row, places, c):
        """Return the addresses of eight columns."""
        place_C = pointer(places, np.int32)
        return (
            start + row * np.int64(place_C[c] if places else c),
            start + row * np.int64(place_C[c + 1] if places else c + 1),
            start + row * np.int64(place_C[c + 2] if places else c + 2),
            start + row * np.int64(place_C[c + 3] if places else c + 3),
            start + row * np.int64(place_C[c + 4] if places else c + 4),
            start + row * np.int64(place_C[c + 5] if places else c + 5),
            start + row * np.int64(place_C[c + 6] if places else c + 6),
            start + row * np.int64(place_C[c + 7] if places else c + 7),
        )

    @compiled
    def add(weight, outputs, places, values, count, B, y, first, end, numbers):
        """Add sum_c values[c, b] weight[places[c], o] to y[b, o] for the outputs `first` to `end`.

        Without places all c are added. Columns are added one after the other, so that a row's result does not depend on
        the other rows.
        """
        place_C, value_CB = pointer(places, np.int32), pointer(values, np.float32)
        number_N = pointer(numbers, np.float32)
        row, out = size * outputs, 4 * outputs
        chunk = end - first if B == 1 else _CHUNK
        for begin in range(first, end, max(1, chunk)):
            n, start = min(end - begin, chunk), weight + size * begin
            c = 0
            while c + _TOGETHER <= count:
                w = columns(start, row, places, c)
                then = columns(start, row, places, c + _TOGETHER) if c + 2 * _TOGETHER <= count else w
                for b in range(0, B, 2):
                    for k in range(_TOGETHER):
                        number_N[k] = value_CB[(c + k) * B + b]
                        number_N[_TOGETHER + k] = value_CB[(c + k) * B + min(b + 1, B - 1)]
                    here = y + b * out + 4 * begin
                    if b + 1 < B:
                        eight_2((n, numbers, *w, *then, here, here + out))
                    else:
                        eight_1((n, numbers, *w, *then, here))
                c += _TOGETHER
            while c < count:
                w0 = start + row * np.int64(place_C[c] if places else c)
                for b in range(B):
                    single((n, values + 4 * (c * B + b), w0, y + b * out + 4 * begin))
                c += 1

    return dots, add


@compiled
def _begin(y, B, outputs, bias, first, end):
    bias_O = pointer(bias, np.float32)
    for b in range(B):
        y_O = pointer(y + 4 * b * outputs, np.float32)
        for o in range(first, end):
            y_O[o] = bias_O[o] if bias else np.float32(0)


@lru_cache
def _entry(dtype: torch.dtype) -> Any:
    """Compute outputs."""
    _, add = _functions(dtype)

    @compiled
    def compute(arguments, share):
        call = pointer(arguments, np.int64)
        x, B, inputs, y, shares = call[0], call[1], call[2], call[4], call[_SHARES]
        places, values, rest, numbers = _parts(B, inputs, call[5] + share * call[6])
        for p in range(call[3]):
            at = arguments + _CALL_SIZE + _PROJECTION_SIZE * p
            part, limit = pointer(at, np.int64), pointer(at, np.float64)[_LIMIT]
            weight, outputs, up, low, rank = part[0], part[1], part[6], part[7], part[8]
            chosen = _choose(x, B, inputs, limit, part[4], part[2], places, values, rest)
            # Sixteen outputs are a cache line, which two threads should not share.
            each = ((outputs + shares - 1) // shares + 15) // 16 * 16
            first, end = min(outputs, share * each), min(outputs, (share + 1) * each)
            _begin(y, B, outputs, part[3], first, end)
            add(weight, outputs, places, values, chosen, B, y, first, end, numbers)
            if rank:
                add(up, outputs, np.int64(0), low, rank, B, y, first, end, numbers)
            y += 4 * B * outputs

    return shared(compute, _SHARES, _TAKEN)


@lru_cache
def _low(dtype: torch.dtype) -> Any:
    """Compute the low-rank activations of one projection."""
    dots, _ = _functions(dtype)

    @compiled
    def compute(arguments, share):
        call = pointer(arguments, np.int64)
        x, B, inputs, shares = call[0], call[1], call[2], call[_SHARES]
        places, values, rest, _ = _parts(B, inputs, call[5] + share * call[6])
        at = arguments + _CALL_SIZE
        part, limit = pointer(at, np.int64), pointer(at, np.float64)[_LIMIT]
        _choose(x, B, inputs, limit, part[4], part[2], places, values, rest)
        some = (part[8] + shares - 1) // shares
        dots(part[5], inputs, rest, B, part[7], min(part[8], share * some), min(part[8], (share + 1) * some))

    return shared(compute, _SHARES, _TAKEN)
