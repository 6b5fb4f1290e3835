"""CPU kernel of `sparse_experts`.

Work is split into chunks of rows of one expert of the union. A chunk collects the tokens of its expert, computes the
inner features of its rows, then adds them, times the rows of the second matrix, to those tokens; so each row of either
matrix is read once, whatever the number of tokens, and inactive tokens cost nothing. The rows of a chunk are four runs
that are read side by side (`row_dot_llvm`), and up to four tokens share a read of a row. Threads take chunks in turn,
with sums of their own, added up at the end.

bfloat16 is widened when read; sums are float32. The first call compiles, some seconds for each dtype.

Dimension letters: T tokens, D width, E experts, H rows of an expert, F = E H, U experts of the union.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from intaglio.kernels import row_dot_llvm
from intaglio.kernels.llvm_emitter import LINE as _LINE
from intaglio.kernels.numba_pointers import compiled, may_share, pointer

_ROWS = 4
"""Rows multiplied at a time."""
_PIECE = 64
"""Rows of a chunk: enough to amortise the search for tokens, few enough to balance two threads."""
_WORTH = 1 << 19
"""Weight elements per further thread (about 50 microseconds of work)."""


def apply(x_TD: Tensor, up_FD: Tensor, down_FD: Tensor, score_TE: Tensor) -> Tensor:
    """Compute the product [T, D] in x's dtype; arguments are checked in `sparse_experts.apply`."""
    dtype, (T, D), (F, E) = x_TD.dtype, x_TD.shape, (len(up_FD), score_TE.shape[1])
    x_TD, score_TE = x_TD.detach().float().contiguous(), score_TE.detach().float().contiguous()
    up_FD, down_FD = up_FD.detach().contiguous(), down_FD.detach().contiguous()
    half = dtype == torch.bfloat16
    # The number of useful threads depends on the union, which compiled code determines.
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS, 1 + 2 * F * D // _WORTH)
    threads = threads if threads > 1 and may_share() else 1
    y_STD = torch.zeros(threads, T, D)
    # Buffer of the compiled code: arrays of its own would be freed once only their addresses are left.
    room = torch.empty(8 * E + _LINE + threads * _own(T), dtype=torch.uint8)
    arguments = (
        x_TD.data_ptr(), up_FD.data_ptr(), down_FD.data_ptr(), score_TE.data_ptr(), T, D, F, E, y_STD.data_ptr(),
        room.data_ptr(),
    )  # fmt: skip
    if threads > 1:
        _together(half)(*arguments, threads)
    else:
        _alone(half)(*arguments)
    return (y_STD[0] if threads == 1 else y_STD.sum(0)).to(dtype)


@compiled
def _own(T):
    """Return a thread's buffer in bytes: the tokens of an expert, and the inner features of a chunk for each."""
    return (8 * T + 4 * _PIECE * T + _LINE - 1) // _LINE * _LINE


@compiled
def _silu(z):
    return z / (np.float32(1) + np.float32(math.exp(-z)))


@compiled
def _union(score, T, E, union):
    """Record the experts that any token activates and return their number."""
    score_TE, union_U = pointer(score, np.float32), pointer(union, np.int64)
    count = 0
    for e in range(E):
        for t in range(T):
            if score_TE[t * E + e] != 0:
                union_U[count] = e
                count += 1
                break
    return count


def _by_tokens(multiply: Any, half: bool) -> Any:
    """Multiply four rows with the tokens of their expert, as many at a time as `multiply` supports."""
    most = row_dot_llvm.most_vectors()
    one, two, three, four = (multiply(_ROWS, min(n, most), half) for n in (1, 2, 3, 4))

    @compiled
    def by_tokens(w, D, apart, numbers, vectors, tokens, taken):
        token_N = pointer(tokens, np.int64)
        w1, w2, w3 = w + apart[0], w + apart[1], w + apart[2]
        for n in range(0, taken, most):
            some, target = min(most, taken - n), numbers + 4 * _ROWS * n
            a, b = vectors + 4 * D * token_N[n], vectors + 4 * D * token_N[n + min(1, some - 1)]
            c, d = vectors + 4 * D * token_N[n + min(2, some - 1)], vectors + 4 * D * token_N[n + some - 1]
            if some == 1:
                one((D, target, w, w1, w2, w3, a))
            elif some == 2:
                two((D, target, w, w1, w2, w3, a, b))
            elif some == 3 and most > 2:
                three((D, target, w, w1, w2, w3, a, b, c))
            elif most > 2:
                four((D, target, w, w1, w2, w3, a, b, c, d))

    return by_tokens


@lru_cache
def _functions(half: bool) -> Any:
    """Return the function that processes chunks, for a weight dtype."""
    size = 2 if half else 4
    dots, adds = _by_tokens(row_dot_llvm.dots, half), _by_tokens(row_dot_llvm.adds, half)

    @compiled
    def piece(x, up, down, score, T, D, E, expert, first, count, tokens, sums, y):
        """Process `count` rows of an expert from `first` on, in four side-by-side runs, for all its tokens."""
        score_TE, token_N = pointer(score, np.float32), pointer(tokens, np.int64)
        sum_NR = pointer(sums, np.float32)
        taken, row = 0, size * D
        for t in range(T):
            if score_TE[t * E + expert] != 0:
                token_N[taken] = t
                taken += 1
        run = (count + _ROWS - 1) // _ROWS
        latest = max(0, count - run)
        s1, s2, s3 = min(run, latest), min(2 * run, latest), min(3 * run, latest)
        starts = (0, s1, s2, s3)
        apart = (row * s1, row * s2, row * s3)
        for g in range(run):
            dots(up + row * (first + g), D, apart, sums + 4 * _ROWS * g * T, x, tokens, taken)
            for n in range(taken):
                by = score_TE[token_N[n] * E + expert]
                for r in range(_ROWS):
                    at = _ROWS * (g * T + n) + r
                    sum_NR[at] = _silu(sum_NR[at]) * by if starts[r] + g >= r * run else np.float32(0)
        for g in range(run):
            adds(down + row * (first + g), D, apart, sums + 4 * _ROWS * g * T, y, tokens, taken)

    @compiled
    def some(x, up, down, score, T, D, H, E, union, low, high, y, tokens):
        """Process chunks `low` to `high` of the union; `tokens` is the thread's buffer."""
        union_U, sums = pointer(union, np.int64), tokens + 8 * T
        each = (H + _PIECE - 1) // _PIECE
        for number in range(low, high):
            expert, before = union_U[number // each], number % each * _PIECE
            count = min(_PIECE, H - before)
            piece(x, up, down, score, T, D, E, expert, expert * H + before, count, tokens, sums, y)

    return some


@lru_cache
def _alone(half: bool) -> Any:
    """Compute the product in one thread."""
    some = _functions(half)

    @compiled
    def alone(x, up, down, score, T, D, F, E, y, room):
        H, count = F // E, _union(score, T, E, room)
        own = (room + 8 * E + _LINE - 1) // _LINE * _LINE
        some(x, up, down, score, T, D, H, E, room, 0, count * ((H + _PIECE - 1) // _PIECE), y, own)

    return alone


@lru_cache
def _together(half: bool) -> Any:
    """Compute the product in several threads, each into its own sums."""
    some = _functions(half)

    @njit(nogil=True, error_model="numpy", parallel=True)
    def together(x, up, down, score, T, D, F, E, y, room, threads):
        H, count = F // E, _union(score, T, E, room)
        own = (room + 8 * E + _LINE - 1) // _LINE * _LINE
        pieces = count * ((H + _PIECE - 1) // _PIECE)
        threads = max(1, min(threads, 1 + 2 * count * H * D // _WORTH))
        before = numba.get_num_threads()
        numba.set_num_threads(threads)
        for share in prange(threads):
            low, high = share * pieces // threads, (share + 1) * pieces // threads
            target = own + share * _own(T)
            some(x, up, down, score, T, D, H, E, room, low, high, y + 4 * T * D * share, target)
        numba.set_num_threads(before)

    return together
