"""Experts on a CPU. See `experts` for what is computed.

Work is cut into pieces of some rows of one expert of the union. A piece finds the tokens that take its expert, makes
the inner features of its rows and adds them, times the rows of the second matrix, to those tokens; so each row of
either matrix is read once, in order, whatever number of tokens takes it, and a token that does not take it costs
nothing. Four rows by four tokens are multiplied at a time, so that what is read from the caches serves four times.
Threads take runs of pieces and have sums of their own, which are added up at the end.

bfloat16 is widened as it is read; sums are float32. The first call compiles, some seconds for each dtype.

Dimension letters: T tokens, D width, E experts, H rows of an expert, F = E H.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from intaglio.kernels.addresses import may_share

_PIECE = 16
"""Rows of a piece: enough to be worth the look for its tokens, few enough that two threads get equally many."""
_COLUMNS = 1 << 10
"""Columns at a time: four rows of them stay in the first cache while all tokens meet them, and as many of the other
matrix, which come next, are fetched meanwhile."""
_LINE = 64
_WORTH = 1 << 19
"""Elements of the weights that a further thread is worth waking for: about 50 microseconds."""


def apply(x_TD: Tensor, up_FD: Tensor, down_FD: Tensor, score_TE: Tensor) -> Tensor:
    """Multiply; see `experts.apply`, which has checked the arguments.

    Args:
        x_TD: float32 or bfloat16.
        up_FD: in the same dtype.
        down_FD: likewise.
        score_TE: floating point.

    Returns:
        [T, D] in x's dtype.
    """
    x, score = (_array(tensor.float()) for tensor in (x_TD, score_TE))
    up, down = _array(up_FD), _array(down_FD)
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS, 1 + _read(score, up) // _WORTH)
    y = _together(x, up, down, score, threads) if threads > 1 and may_share() else _alone(x, up, down, score)
    return torch.from_numpy(y).to(x_TD.dtype)


def _array(tensor: Tensor) -> Any:
    """As numpy sees it; bfloat16, which it has not, as its bits."""
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _read(score: Any, up: Any) -> int:
    """Elements of both matrices that the union reads."""
    return 2 * int((score != 0).any(0).sum()) * up.size // score.shape[1]


# What follows is compiled. Sums may be taken in any order, which vectors need.
_compiled = njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})


@intrinsic
def _wide(_context, value):
    """A weight as float32: itself, or the bfloat16 of these bits."""
    if value == types.float32:
        return types.float32(value), lambda _c, _b, _s, values: values[0]

    def emit(_context, builder, _signature, values):
        word = builder.zext(values[0], ir.IntType(32))
        return builder.bitcast(builder.shl(word, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(value), emit


@intrinsic
def _ask(_context, address):
    """Have the line of the cache at an address fetched, without waiting for it."""

    def emit(_context, builder, _signature, values):
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, *[ir.IntType(32)] * 3])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        said = [ir.Constant(ir.IntType(32), number) for number in (0, 2, 1)]
        builder.call(fetch, [builder.inttoptr(values[0], byte), *said])
        return _context.get_dummy_value()

    return types.void(types.int64), emit


@_compiled
def _fetch(weight, row, left, right):
    """Four rows from `row` on, some columns of them, are wanted soon."""
    if row + 4 > len(weight):
        return
    for k in range(4):
        address = weight.ctypes.data + ((row + k) * weight.shape[1] + left) * weight.itemsize
        for byte in range(0, (right - left) * weight.itemsize, _LINE):
            _ask(address + byte)


@_compiled
def _dots_4(p, q, r, s, xa, xb, xc, xd, u, n):
    """Some columns of four rows by four tokens: sixteen inner products, added to u[n:n+4]."""
    pa = pb = pc = pd = qa = qb = qc = qd = np.float32(0)
    ra = rb = rc = rd = sa = sb = sc = sd = np.float32(0)
    for i in range(len(xa)):
        wp, wq, wr, ws = _wide(p[i]), _wide(q[i]), _wide(r[i]), _wide(s[i])
        va, vb, vc, vd = xa[i], xb[i], xc[i], xd[i]
        pa += wp * va
        pb += wp * vb
        pc += wp * vc
        pd += wp * vd
        qa += wq * va
        qb += wq * vb
        qc += wq * vc
        qd += wq * vd
        ra += wr * va
        rb += wr * vb
        rc += wr * vc
        rd += wr * vd
        sa += ws * va
        sb += ws * vb
        sc += ws * vc
        sd += ws * vd
    for m, (of_p, of_q, of_r, of_s) in enumerate(
        ((pa, qa, ra, sa), (pb, qb, rb, sb), (pc, qc, rc, sc), (pd, qd, rd, sd))
    ):
        u[n + m, 0] += of_p
        u[n + m, 1] += of_q
        u[n + m, 2] += of_r
        u[n + m, 3] += of_s


@_compiled
def _dots_1(p, q, r, s, xa, u, n):
    """The same by one token."""
    pa = qa = ra = sa = np.float32(0)
    for i in range(len(xa)):
        va = xa[i]
        pa += _wide(p[i]) * va
        qa += _wide(q[i]) * va
        ra += _wide(r[i]) * va
        sa += _wide(s[i]) * va
    u[n, 0] += pa
    u[n, 1] += qa
    u[n, 2] += ra
    u[n, 3] += sa


@_compiled
def _add(y, p, q, r, s, a, b, c, d):
    """Add four rows, times a number each, to what one token has so far."""
    for i in range(len(y)):
        y[i] += _wide(p[i]) * a + _wide(q[i]) * b + _wide(r[i]) * c + _wide(s[i]) * d


@_compiled
def _silu(z):
    return z / (np.float32(1) + np.float32(math.exp(-z)))


@_compiled
def _four(weight, row, left, right):
    return (
        weight[row, left:right],
        weight[row + 1, left:right],
        weight[row + 2, left:right],
        weight[row + 3, left:right],
    )


@_compiled
def _piece(x, up, down, score, expert, first, end, tokens, u, y):
    """Rows `first` to `end` of one expert, for all tokens that take it."""
    D, taken = x.shape[1], 0
    for t in range(len(x)):
        if score[t, expert] != 0:
            tokens[taken] = t
            taken += 1
    for f in range(first, end, 4):
        # The last four rows again where fewer are left: those that are done already count nothing.
        start = f if f + 4 <= end else max(0, end - 4)
        u[:taken] = 0
        for left in range(0, D, _COLUMNS):
            right = min(D, left + _COLUMNS)
            _fetch(down, start, left, right)
            p, q, r, s = _four(up, start, left, right)
            n = 0
            while n + 4 <= taken:
                a, b, c, d = tokens[n], tokens[n + 1], tokens[n + 2], tokens[n + 3]
                _dots_4(p, q, r, s, x[a, left:right], x[b, left:right], x[c, left:right], x[d, left:right], u, n)
                n += 4
            while n < taken:
                _dots_1(p, q, r, s, x[tokens[n], left:right], u, n)
                n += 1
        for n in range(taken):
            by = score[tokens[n], expert]
            for k in range(4):
                inside = f <= start + k < end
                u[n, k] = _silu(u[n, k]) * by if inside else np.float32(0)
        for left in range(0, D, _COLUMNS):
            right = min(D, left + _COLUMNS)
            _fetch(up, start + 4, left, right)
            p, q, r, s = _four(down, start, left, right)
            for n in range(taken):
                _add(y[tokens[n], left:right], p, q, r, s, u[n, 0], u[n, 1], u[n, 2], u[n, 3])


@_compiled
def _union(score):
    """The experts that some token takes."""
    found = np.empty(score.shape[1], np.int64)
    count = 0
    for e in range(score.shape[1]):
        for t in range(len(score)):
            if score[t, e] != 0:
                found[count] = e
                count += 1
                break
    return found[:count]


@_compiled
def _some(x, up, down, score, union, low, high, y):
    """Pieces `low` to `high` of the union."""
    H = len(up) // score.shape[1]
    each = (H + _PIECE - 1) // _PIECE
    tokens, u = np.empty(len(x), np.int64), np.empty((len(x), 4), np.float32)
    for piece in range(low, high):
        start = union[piece // each] * H
        first = start + piece % each * _PIECE
        _piece(x, up, down, score, union[piece // each], first, min(start + H, first + _PIECE), tokens, u, y)


@_compiled
def _alone(x, up, down, score):
    union, y = _union(score), np.zeros(x.shape, np.float32)
    _some(x, up, down, score, union, 0, len(union) * ((len(up) // score.shape[1] + _PIECE - 1) // _PIECE), y)
    return y


@njit(nogil=True, error_model="numpy", parallel=True)
def _together(x, up, down, score, threads):
    union = _union(score)
    pieces = len(union) * ((len(up) // score.shape[1] + _PIECE - 1) // _PIECE)
    sums = np.zeros((threads, *x.shape), np.float32)
    before = numba.get_num_threads()
    numba.set_num_threads(threads)
    for share in prange(threads):
        _some(x, up, down, score, union, share * pieces // threads, (share + 1) * pieces // threads, sums[share])
    numba.set_num_threads(before)
    y = sums[0]
    for share in range(1, threads):
        y = y + sums[share]
    return y
