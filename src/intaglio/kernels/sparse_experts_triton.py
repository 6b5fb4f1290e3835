"""GPU kernel of `sparse_experts`.

Two launches. The first computes the inner features: a program takes some rows of an expert, and exits at once where no
token activates it. The second reduces over the second matrix: a program takes some columns and a share of the experts,
skips inactive ones, and writes its own sums, which are added at the end, so that the result is deterministic. The union
is never computed on the host, which would have to wait. Up to sixteen tokens form a tensor-core tile; sums are float32,
without TF32.

**Not run on a GPU yet**, nor in Triton's interpreter: block sizes are unmeasured guesses.

Dimension letters: T tokens, D width, E experts, H rows of an expert, F = E H, S shares of the experts.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS = 16
_ROWS, _COLUMNS = 32, 128
_SHARES = 8


@triton.jit
def _inner(x, up, score, u, tokens, D, E, H, T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    """Compute BLOCK_H inner features of an expert for all tokens, [T, F] float32."""
    expert = tl.program_id(0)
    t = tl.arange(0, T)
    by = tl.load(score + t * E + expert, mask=t < tokens, other=0.0).to(tl.float32)
    if tl.sum((by != 0).to(tl.int32), 0) == 0:
        return
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    f = expert * H + h
    sums = tl.zeros((T, BLOCK_H), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        some = tl.load(x + t[:, None] * D + d[None, :], mask=(t < tokens)[:, None] & (d < D)[None, :], other=0.0)
        rows = tl.load(
            up + f.to(tl.int64)[None, :] * D + d[:, None], mask=(h < H)[None, :] & (d < D)[:, None], other=0.0
        )
        sums = tl.dot(some, rows, sums, input_precision="ieee")
    hidden = sums * tl.sigmoid(sums) * by[:, None]
    tl.store(u + t[:, None] * (E * H) + f[None, :], hidden, mask=(t < tokens)[:, None] & (h < H)[None, :])


@triton.jit
def _outer(u, down, score, y, tokens, D, E, H, each, T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    """Compute BLOCK_D columns of the sum over a share of the experts, [S, T, D] float32."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    share = tl.program_id(1)
    t = tl.arange(0, T)
    sums = tl.zeros((T, BLOCK_D), dtype=tl.float32)
    for expert in range(share * each, tl.minimum(E, (share + 1) * each)):
        by = tl.load(score + t * E + expert, mask=t < tokens, other=0.0)
        if tl.sum((by != 0).to(tl.int32), 0) > 0:
            for start in range(0, H, BLOCK_H):
                h = start + tl.arange(0, BLOCK_H)
                f = expert * H + h
                some = tl.load(
                    u + t[:, None] * (E * H) + f[None, :], mask=(t < tokens)[:, None] & (h < H)[None, :], other=0.0
                )
                rows = tl.load(
                    down + f.to(tl.int64)[:, None] * D + d[None, :], mask=(h < H)[:, None] & (d < D)[None, :], other=0.0
                )
                sums = tl.dot(some.to(rows.dtype), rows, sums, input_precision="ieee")
    target = y + (share * tokens + t)[:, None] * D + d[None, :]
    tl.store(target, sums, mask=(t < tokens)[:, None] & (d < D)[None, :])


def apply(x_TD: Tensor, up_FD: Tensor, down_FD: Tensor, score_TE: Tensor) -> Tensor:
    """Compute the product [T, D] in x's dtype; arguments are checked in `sparse_experts.apply`."""
    x_TD, up_FD, down_FD, score_TE = (tensor.contiguous() for tensor in (x_TD, up_FD, down_FD, score_TE))
    (tokens, D), E = x_TD.shape, score_TE.shape[1]
    H = len(up_FD) // E
    u_TF = torch.empty(tokens, len(up_FD), device=x_TD.device)
    shares = min(_SHARES, E)
    y_STD = torch.empty(shares, tokens, D, device=x_TD.device)
    # Triton launches on the current device, not the tensors'; its interpreter takes CPU tensors.
    with torch.cuda.device(x_TD.device) if x_TD.is_cuda else nullcontext():
        _inner[(E, triton.cdiv(H, _ROWS))](
            x_TD, up_FD, score_TE, u_TF, tokens, D, E, H, T=_TOKENS, BLOCK_H=_ROWS, BLOCK_D=_COLUMNS
        )
        _outer[(triton.cdiv(D, _COLUMNS), shares)](
            u_TF, down_FD, score_TE, y_STD, tokens, D, E, H, triton.cdiv(E, shares),
            T=_TOKENS, BLOCK_H=_ROWS, BLOCK_D=_COLUMNS,
        )  # fmt: skip
    return y_STD.sum(0).to(x_TD.dtype)
