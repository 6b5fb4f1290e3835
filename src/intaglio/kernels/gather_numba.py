"""The product from some columns of a weight on a CPU. See `gather` for what is computed.

A call chooses the inputs, notes their places and values, and adds their columns to the outputs eight at a time, so that
outputs are read and written once for eight columns; columns lie one behind the other in memory, and those of inputs
that were not chosen are not touched. Then come the rows of `up`, which are added in just the same way. With several
rows of activations a column is read where one of them wants it, and counts nothing for the others.

Outputs are shared out over torch's number of threads where a product is worth it. Each output is a sum in one order,
whatever the threads, so results do not depend on them.

Dimension letters: B rows of activations, I inputs, O outputs, R rank; C chosen inputs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from intaglio.kernels.addresses import as_float, compiled, may_share, pointer

_WORTH = 1 << 20
"""Weights that a further thread is worth waking for: about 15 microseconds."""
_CHUNK = 1024
"""Outputs that are worked on at a time where several rows read the same columns: those stay in the first cache."""
_LINE = 64

_dots = njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})
_adds = njit(nogil=True, error_model="numpy", fastmath={"contract"})


def linear(
    x_BI: Tensor,
    weight_IO: Tensor,
    threshold_B: Tensor | float,
    scale_I: Tensor | None,
    down_RI: Tensor | None,
    up_RO: Tensor | None,
    bias_O: Tensor | None,
) -> Tensor:
    """Apply a linear layer; see `gather.linear`, which has checked the arguments.

    Args:
        x_BI: float32 [B, I]. weight_IO: float32 or bfloat16 [I, O], contiguous, as are down_RI [R, I] and up_RO [R, O],
        which have its dtype, or are None. threshold_B: float32 [B], or one number. scale_I: float32 [I], or None.
        bias_O: float32 [O], or None.

    Returns:
        float32 [B, O].
    """
    (B, inputs), outputs = x_BI.shape, weight_IO.shape[1]
    rank = 0 if down_RI is None else len(down_RI)
    y_BO = torch.empty(B, outputs)
    room = torch.empty(4 * (inputs + B * (2 * inputs + rank)) + 4 * rank + 2 * _LINE, dtype=torch.uint8)
    one, many = (threshold_B, 0) if isinstance(threshold_B, float) else (0.0, threshold_B.data_ptr())
    given = (
        x_BI.data_ptr(), B, inputs, weight_IO.data_ptr(), outputs, one, many,
        0 if scale_I is None else scale_I.data_ptr(), 0 if down_RI is None else down_RI.data_ptr(),
        0 if up_RO is None else up_RO.data_ptr(), rank, 0 if bias_O is None else bias_O.data_ptr(),
        y_BO.data_ptr(), room.data_ptr(),
    )  # fmt: skip
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS, 1 + B * inputs * outputs // _WORTH)
    if threads > 1 and may_share():
        _together(weight_IO.dtype)(*given, threads)
    else:
        _alone(weight_IO.dtype)(*given)
    return y_BO


# What follows is compiled. Addresses are integers, and pointers are indexed: arrays take far longer to compile.


@compiled
def _choose(x, B, inputs, threshold, thresholds, scale, places, values, rest):
    """Note the inputs that a row wants, their values [C, B] (0 for a row that does not want them) and what is left
    [B, I], and return C. What is not a number is wanted, so that it shows in the result."""
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
def _parts(B, inputs, rank, room):
    """Where places, values, rests, low-rank activations [R, B] and the places of `up` begin."""
    places = (room + _LINE - 1) // _LINE * _LINE
    values = places + 4 * inputs
    rest = values + 4 * B * inputs
    low = rest + 4 * B * inputs
    return places, values, rest, low, low + 4 * B * rank


@lru_cache
def _functions(dtype: torch.dtype) -> tuple[Any, Any]:
    """`(dots, add)` for weights of a dtype."""
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
        """low[r, b] = sum_i down[r, i] rest[b, i] for the rows `first` to `end`."""
        low_RB = pointer(low, np.float32)
        for r in range(first, end):
            down_I = pointer(down + size * r * inputs, stored)
            for b in range(B):
                rest_I = pointer(rest + 4 * b * inputs, np.float32)
                total = np.float32(0)
                for i in range(inputs):
                    total += number(down_I[i]) * rest_I[i]
                low_RB[r * B + b] = total

    @_adds
    def eight(y_O, w0, w1, w2, w3, w4, w5, w6, w7, c0, c1, c2, c3, c4, c5, c6, c7, first, end):
        a0, a1, a2, a3 = pointer(w0, stored), pointer(w1, stored), pointer(w2, stored), pointer(w3, stored)
        a4, a5, a6, a7 = pointer(w4, stored), pointer(w5, stored), pointer(w6, stored), pointer(w7, stored)
        for o in range(first, end):
            even = number(a0[o]) * c0 + number(a1[o]) * c1 + number(a2[o]) * c2 + number(a3[o]) * c3
            odd = number(a4[o]) * c4 + number(a5[o]) * c5 + number(a6[o]) * c6 + number(a7[o]) * c7
            y_O[o] += even + odd

    @_adds
    def single(y_O, w, c, first, end):
        a = pointer(w, stored)
        for o in range(first, end):
            y_O[o] += number(a[o]) * c

    @compiled
    def add(weight, outputs, places, values, count, B, y, first, end):
        """y[b, o] += sum_c values[c, b] weight[places[c], o] for the outputs `first` to `end`; without places, all."""
        place_C, value_CB = pointer(places, np.int32), pointer(values, np.float32)
        row = size * outputs
        chunk = end - first if B == 1 else _CHUNK
        for start in range(first, end, max(1, chunk)):
            stop = min(end, start + chunk)
            c = 0
            while c + 8 <= count:
                w0 = weight + row * np.int64(place_C[c] if places else c)
                w1 = weight + row * np.int64(place_C[c + 1] if places else c + 1)
                w2 = weight + row * np.int64(place_C[c + 2] if places else c + 2)
                w3 = weight + row * np.int64(place_C[c + 3] if places else c + 3)
                w4 = weight + row * np.int64(place_C[c + 4] if places else c + 4)
                w5 = weight + row * np.int64(place_C[c + 5] if places else c + 5)
                w6 = weight + row * np.int64(place_C[c + 6] if places else c + 6)
                w7 = weight + row * np.int64(place_C[c + 7] if places else c + 7)
                for b in range(B):
                    v = c * B + b
                    eight(
                        pointer(y + 4 * b * outputs, np.float32), w0, w1, w2, w3, w4, w5, w6, w7,
                        value_CB[v], value_CB[v + B], value_CB[v + 2 * B], value_CB[v + 3 * B],
                        value_CB[v + 4 * B], value_CB[v + 5 * B], value_CB[v + 6 * B], value_CB[v + 7 * B],
                        start, stop,
                    )  # fmt: skip
                c += 8
            while c < count:
                w = weight + row * np.int64(place_C[c] if places else c)
                for b in range(B):
                    single(pointer(y + 4 * b * outputs, np.float32), w, value_CB[c * B + b], start, stop)
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
def _alone(dtype: torch.dtype) -> Any:
    """The product in one thread."""
    dots, add = _functions(dtype)

    @compiled
    def alone(x, B, inputs, weight, outputs, threshold, thresholds, scale, down, up, rank, bias, y, room):
        places, values, rest, low, _ = _parts(B, inputs, rank, room)
        chosen = _choose(x, B, inputs, threshold, thresholds, scale, places, values, rest)
        dots(down, inputs, rest, B, low, 0, rank)
        _begin(y, B, outputs, bias, 0, outputs)
        add(weight, outputs, places, values, chosen, B, y, 0, outputs)
        add(up, outputs, np.int64(0), low, rank, B, y, 0, outputs)

    return alone


@lru_cache
def _together(dtype: torch.dtype) -> Any:
    """The product in several."""
    dots, add = _functions(dtype)

    @njit(nogil=True, error_model="numpy", parallel=True)
    def together(x, B, inputs, weight, outputs, threshold, thresholds, scale, down, up, rank, bias, y, room, threads):
        places, values, rest, low, _ = _parts(B, inputs, rank, room)
        chosen = _choose(x, B, inputs, threshold, thresholds, scale, places, values, rest)
        before = numba.get_num_threads()
        numba.set_num_threads(threads)
        if rank * inputs >= _WORTH:
            some = (rank + threads - 1) // threads
            for share in prange(threads):
                dots(down, inputs, rest, B, low, min(rank, share * some), min(rank, (share + 1) * some))
        else:
            dots(down, inputs, rest, B, low, 0, rank)
        # Sixteen outputs are a line of the cache, which two threads had better not write to.
        part = ((outputs + threads - 1) // threads + 15) // 16 * 16
        for share in prange(threads):
            first, end = min(outputs, share * part), min(outputs, (share + 1) * part)
            _begin(y, B, outputs, bias, first, end)
            add(weight, outputs, places, values, chosen, B, y, first, end)
            add(up, outputs, np.int64(0), low, rank, B, y, first, end)
        numba.set_num_threads(before)

    return together
