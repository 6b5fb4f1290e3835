"""GPU kernel of `ternary`.

A single row of activations is multiplied by the ordinary units: a program takes some rows of the weight, reads each
byte once, and adds its four weights times their activations. From two rows on the tensor cores multiply, at least
sixteen rows at a time (zero-padded), as reading the weight dominates. Integers are multiplied as int8 and added in
int32, exactly; floating point in float32, without TF32.

The kernels are tested in Triton's interpreter; **not run on a GPU yet**, so block sizes and `MOST_ROWS` are unmeasured
guesses.

Dimension letters: B rows of activations, I inputs, O outputs, J bytes of a packed row.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_ROWS = 128
"""Most rows of activations; beyond, unpacking for a dense product should pay."""


@triton.jit
def _vector(x, packed, y, inputs, outputs, J, BLOCK_O: tl.constexpr, BLOCK_J: tl.constexpr):
    """Multiply one row of activations: BLOCK_O outputs per program."""
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    row = packed + o.to(tl.int64)[:, None] * J
    sums = tl.zeros((BLOCK_O, BLOCK_J), dtype=y.dtype.element_ty)
    for start in range(0, J, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        codes = tl.load(row + j[None, :], mask=(o < outputs)[:, None] & (j < J)[None, :], other=0x55).to(tl.int32)
        for k in tl.static_range(4):
            i = k * J + j
            some = tl.load(x + i, mask=(j < J) & (i < inputs), other=0).to(y.dtype.element_ty)
            sums += (((codes >> 2 * k) & 3) - 1).to(y.dtype.element_ty) * some[None, :]
    tl.store(y + o, tl.sum(sums, 1), mask=o < outputs)


@triton.jit
def _matrix(
    x, packed, y, rows, inputs, outputs, J, BLOCK_B: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_J: tl.constexpr
):
    """Multiply BLOCK_B rows of activations: BLOCK_O outputs per program."""
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    row = packed + o.to(tl.int64)[None, :] * J
    token = x + b.to(tl.int64)[:, None] * inputs
    sums = tl.zeros((BLOCK_B, BLOCK_O), dtype=y.dtype.element_ty)
    for start in range(0, J, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        codes = tl.load(row + j[:, None], mask=(j < J)[:, None] & (o < outputs)[None, :], other=0x55)
        for k in tl.static_range(4):
            i = k * J + j
            some = tl.load(token + i[None, :], mask=(b < rows)[:, None] & ((j < J) & (i < inputs))[None, :], other=0)
            weights = (((codes >> 2 * k) & 3).to(tl.int8) - 1).to(x.dtype.element_ty)
            sums = tl.dot(some, weights, sums, input_precision="ieee", out_dtype=y.dtype.element_ty)
    target = y + b.to(tl.int64)[:, None] * outputs + o[None, :]
    tl.store(target, sums, mask=(b < rows)[:, None] & (o < outputs)[None, :])


def matmul(x_BI: Tensor, packed_OJ: Tensor) -> Tensor:
    """Multiply, int32 or float32 [B, O]; arguments are checked in `ternary.matmul`."""
    x_BI, packed_OJ = x_BI.contiguous(), packed_OJ.contiguous()
    (B, width), (outputs, J) = x_BI.shape, packed_OJ.shape
    y_BO = torch.empty(B, outputs, dtype=torch.float32 if x_BI.is_floating_point() else torch.int32, device=x_BI.device)
    # Triton launches on the current device, not the tensors'; its interpreter takes CPU tensors.
    with torch.cuda.device(x_BI.device) if x_BI.is_cuda else nullcontext():
        if B == 1:
            _vector[(triton.cdiv(outputs, 16),)](
                x_BI, packed_OJ, y_BO, width, outputs, J, BLOCK_O=16, BLOCK_J=128, num_warps=4
            )
        elif B:
            tall = 16 if B <= 16 else 32
            _matrix[(triton.cdiv(outputs, 64), triton.cdiv(B, tall))](
                x_BI, packed_OJ, y_BO, B, width, outputs, J, BLOCK_B=tall, BLOCK_O=64, BLOCK_J=64, num_warps=4
            )
    return y_BO
