"""CPU kernel of `sparse_experts`.

Work is split into chunks of rows of one expert of the union. A chunk collects the tokens of its expert, computes the
inner features of its rows, then adds them, times the rows of the second matrix, to those tokens; so each row of either
matrix is read once, whatever the number of tokens, and inactive tokens cost nothing. The rows of a chunk are four runs
that are read side by side (`row_dot_llvm`), and up to four tokens share a read of a row. Threads take chunks in turn,
with sums of their own, added up at the end; they are torch's own (`openmp`).

bfloat16 is widened when read; sums are float32. The first call compiles, some seconds for each dtype.

Dimension letters: T tokens, D width, E experts, H rows of an expert, F = E H, U experts of the union.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from intaglio.kernels import row_dot_llvm
from intaglio.kernels.llvm_emitter import LINE as _LINE
from intaglio.kernels.numba_pointers import compiled, pointer, shared
from intaglio.kernels.openmp import launch, most_threads

_ROWS = 4
"""Rows multiplied at a time."""
_PIECE = 64
"""Rows of a chunk: enough to amortise the search for tokens, few enough to balance two threads."""
_WORTH = 1 << 19
"""Weight elements per further thread (about 50 microseconds of work)."""
_SHARES, _TAKEN = 11, 12
"""Places of the number of shares, and of the shares taken, in the arguments."""


def apply(x_TD: Tensor, up_FD: Tensor, down_FD: Tensor, score_TE: Tensor) -> Tensor:
    """Compute the product [T, D] in x's dtype; arguments are checked in `sparse_experts.apply`."""
    dtype, (T, D), (F, E) = x_TD.dtype, x_TD.shape, (len(up_FD), score_TE.shape[1])
    x_TD, score_TE = x_TD.detach().float().contiguous(), score_TE.detach().float().contiguous()
    up_FD, down_FD = up_FD.detach().contiguous(), down_FD.detach().contiguous()
    half = dtype == torch.bfloat16
    threads = min(most_threads(), 1 + 2 * F * D // _WORTH)
    y_STD = torch.zeros(threads, T, D)
    # Buffer of the compiled code: arrays of its own would be freed once only their addresses are left.
    own = _own(T) + 8 * E
    room = torch.empty(_LINE + threads * own, dtype=torch.uint8)
    arguments = struct.pack(
        "13q", x_TD.data_ptr(), up_FD.data_ptr(), down_FD.data_ptr(), score_TE.data_ptr(), T, D, F, E, y_STD.data_ptr(),
        room.data_ptr(), own, threads, 0,
    )  # fmt: skip
    launch(_entry(half).address, bytearray(arguments), threads)
    return (y_STD[0] if threads == 1 else y_STD.sum(0)).to(dtype)


def _own(T: int) -> int:
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
def _entry(half: bool) -> Any:
    """Compute shares of the chunks, each into its own sums."""
    some = _functions(half)

    @compiled
    def compute(arguments, share):
        call = pointer(arguments, np.int64)
        x, up, down, score, T, D, F, E = call[0], call[1], call[2], call[3], call[4], call[5], call[6], call[7]
        union = (call[9] + share * call[10] + 7) // 8 * 8
        H, count = F // E, _union(score, T, E, union)
        pieces = count * ((H + _PIECE - 1) // _PIECE)
        # The number of useful threads depends on the union.
        shares = max(1, min(call[_SHARES], 1 + 2 * count * H * D // _WORTH))
        if share < shares:
            low, high = share * pieces // shares, (share + 1) * pieces // shares
            some(x, up, down, score, T, D, H, E, union, low, high, call[8] + 4 * T * D * share, union + 8 * E)

    return shared(compute, _SHARES, _TAKEN)
