"""Memory read bandwidth on a CPU, for the byte bounds of other benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange, types
from numba.extending import intrinsic

from intaglio.kernels.ternary_simd import Emitter

CACHE = 64 << 20
"""Bytes of all copies of a weight together, at the least; the last cache has 32 MiB."""
READ = 8 << 20
"""Bytes of one turn of the reader."""
TURN = 0.01
"""Seconds of a turn, about."""

Call = Callable[[int], Any]


@intrinsic
def _fetch(_context, address):
    def emit(context, builder, _signature, values):
        Emitter(builder, "any").fetch(values[0])
        return context.get_dummy_value()

    return types.void(types.int64), emit


@njit(nogil=True)
def _read(words):
    """Sum all values by cache line, prefetching 16 KiB ahead as the product does."""
    start = words.ctypes.data + (1 << 14)
    a = b = c = d = e = f = g = h = np.uint64(0)
    for i in range(0, len(words) - 7, 8):
        _fetch(start + 8 * i)
        a += words[i]
        b += words[i + 1]
        c += words[i + 2]
        d += words[i + 3]
        e += words[i + 4]
        f += words[i + 5]
        g += words[i + 6]
        h += words[i + 7]
    return a + b + c + d + e + f + g + h


@njit(nogil=True, parallel=True)
def _read_shared(words, threads, sums):
    part = len(words) // threads
    for share in prange(threads):
        sums[share] = _read(words[share * part : (share + 1) * part])


def reader(threads: int) -> tuple[Call, Call]:
    """Return two ways to read `READ` bytes: ours and torch's."""
    words = np.ones((8 * CACHE // READ, READ // 8), np.uint64)
    floats = torch.from_numpy(words.view(np.float32))
    sums = np.zeros(threads, np.uint64)
    if threads == 1:
        return (lambda i: _read(words[i % len(words)])), (lambda i: floats[i % len(words)].sum())
    return (lambda i: _read_shared(words[i % len(words)], threads, sums)), (lambda i: floats[i % len(words)].sum())


def in_turns(calls: dict[str, Call], threads: int, seconds: float) -> tuple[dict[str, list[float]], int, float]:
    """Alternate all calls, the readers among them, and return their times.

    Returns:
        The seconds of every call, the turns, and the bytes a second of the faster reader at its best.
    """
    torch.set_num_threads(threads)
    numba.set_num_threads(threads)
    turns = dict(calls)
    turns["read"], turns["read, torch"] = reader(threads)
    times: dict[str, list[float]] = {name: [] for name in turns}
    calls_of = {}
    for name, call in turns.items():
        call(0)
        start = time.perf_counter()
        call(1)
        calls_of[name] = max(1, min(100, round(TURN / (time.perf_counter() - start))))
    clock = time.thread_time if threads == 1 else time.perf_counter
    began, turn = time.perf_counter(), 0
    while time.perf_counter() - began < seconds or turn < 5:
        for name, call in turns.items():
            for number in range(turn * calls_of[name], (turn + 1) * calls_of[name]):
                start = clock()
                call(number)
                times[name].append(clock() - start)
        turn += 1
    return times, turn, READ / min(min(times["read"]), min(times["read, torch"]))
