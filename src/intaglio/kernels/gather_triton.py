"""GPU kernel of `gather`, for one token.

Two launches. The first writes, for each block of inputs, the indices and values of the selected ones, the others'
values, and the number selected: blocks are independent. The second gives each program some outputs and some blocks of
inputs; it reads the selected columns of its blocks and adds the result with atomics, so that there are enough programs
for a GPU. The low-rank part is two small dense products of torch.

As atomics run in any order, the last bits may differ from call to call.

The kernels are tested in Triton's interpreter; **not run on a GPU yet**, so block sizes are unmeasured guesses.

Dimension letters: I inputs, O outputs, R rank, N blocks of inputs.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_INPUTS = 256
"""Inputs of a block."""
_OUTPUTS = 128
"""Outputs of a program."""
_COLUMNS = 16
"""Columns read together by a program."""


@triton.jit
def _choose(x, scale, limit, places, values, rest, counts, inputs, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    """Write a block's selected indices and values, in front, the others' values, and the number selected."""
    start = tl.program_id(0) * BLOCK
    i = start + tl.arange(0, BLOCK)
    inside = i < inputs
    value = tl.load(x + i, mask=inside, other=0).to(tl.float32)
    score = tl.abs(value)
    if SCALED:
        score = score * tl.load(scale + i, mask=inside, other=0)
    kept = ((score <= tl.load(limit)) == 0) & inside
    order = tl.cumsum(kept.to(tl.int32), 0)
    target = start + order - 1
    tl.store(places + target, i, mask=kept)
    tl.store(values + target, value, mask=kept)
    tl.store(rest + i, tl.where(kept, 0.0, value), mask=inside)
    tl.store(counts + tl.program_id(0), tl.sum(kept.to(tl.int32), 0))


@triton.jit
def _gather(
    weight, places, values, counts, y, outputs, BLOCK: tl.constexpr, BLOCK_O: tl.constexpr, COLUMNS: tl.constexpr
):
    """Add the selected columns of a block of inputs to y[o], BLOCK_O outputs per program."""
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    start = tl.program_id(1) * BLOCK
    count = tl.load(counts + tl.program_id(1))
    sums = tl.zeros((BLOCK_O,), dtype=tl.float32)
    for first in range(0, count, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        place = tl.load(places + start + c, mask=c < count, other=0).to(tl.int64)
        value = tl.load(values + start + c, mask=c < count, other=0)
        target = weight + place[:, None] * outputs + o[None, :]
        some = tl.load(target, mask=(c < count)[:, None] & (o < outputs)[None, :], other=0).to(tl.float32)
        sums += tl.sum(some * value[:, None], 0)
    tl.atomic_add(y + o, sums, mask=o < outputs)


def linear(
    x_BI: Tensor,
    weight_IO: Tensor,
    threshold: float | Tensor,
    scale_I: Tensor | None,
    down_RI: Tensor | None,
    up_RO: Tensor | None,
    bias_O: Tensor | None,
) -> Tensor:
    """Apply a linear layer to a row [1, O], in x's dtype; arguments are checked in `gather.linear`."""
    (inputs, outputs), device = weight_IO.shape, x_BI.device
    limit = threshold if isinstance(threshold, Tensor) else torch.full((1,), threshold, device=device)
    blocks = triton.cdiv(inputs, _INPUTS)
    places = torch.empty(blocks * _INPUTS, dtype=torch.int32, device=device)
    values, counts = torch.empty(blocks * _INPUTS, device=device), torch.empty(blocks, dtype=torch.int32, device=device)
    rest_1I = torch.empty(1, inputs, device=device)
    y_1O = torch.zeros(1, outputs, device=device) if bias_O is None else bias_O.float()[None].clone()
    # Triton launches on the current device, not the tensors'; its interpreter takes CPU tensors.
    with torch.cuda.device(device) if x_BI.is_cuda else nullcontext():
        _choose[(blocks,)](
            x_BI, x_BI if scale_I is None else scale_I, limit, places, values, rest_1I, counts, inputs,
            SCALED=scale_I is not None, BLOCK=_INPUTS,
        )  # fmt: skip
        _gather[(triton.cdiv(outputs, _OUTPUTS), blocks)](
            weight_IO, places, values, counts, y_1O, outputs, BLOCK=_INPUTS, BLOCK_O=_OUTPUTS, COLUMNS=_COLUMNS
        )
    if down_RI is not None and up_RO is not None:
        y_1O = y_1O + (rest_1I.to(down_RI.dtype) @ down_RI.T @ up_RO).float()
    return y_1O.to(x_BI.dtype)
