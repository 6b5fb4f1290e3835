"""Packed integer codes: four ternary weights, two of up to 4 bits, or one of up to 8 in a byte.

Ternary codes lie as `kernels.ternary` expects them. Of others, consecutive inputs share a byte, the first in its lowest
bits. In every function, `low` and `high` are the smallest and the largest code.

Dimension letters: B any leading dimensions, O output features, I input features, J bytes of a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from intaglio.kernels import ternary

TERNARY = (-1, 1)


def codes_per_byte(low: int, high: int) -> int:
    """Return how many codes a byte holds: 4, 2 or 1."""
    return 4 if high - low < 4 else 2 if high - low < 16 else 1


def row_bytes(inputs: int, low: int, high: int) -> int:
    """Return J, the bytes of a row of `inputs` codes."""
    return ternary.packed_width(inputs) if (low, high) == TERNARY else -(-inputs // codes_per_byte(low, high))


def pack(codes_OI: Tensor, low: int, high: int) -> Tensor:
    """Pack whole numbers of any dtype, uint8 [O, J]; each is stored as code - low."""
    if (low, high) == TERNARY:
        return ternary.pack(codes_OI.to(torch.int8))
    count = codes_per_byte(low, high)
    shifted_OI = (codes_OI - low).to(torch.uint8)
    shifted_OI = F.pad(shifted_OI, (0, -shifted_OI.shape[1] % count))
    packed_OJ = shifted_OI[:, ::count].clone()
    for slot in range(1, count):
        packed_OJ |= shifted_OI[:, slot::count] << (8 // count * slot)
    return packed_OJ


def unpack(packed_OJ: Tensor, inputs: int, low: int, high: int) -> Tensor:
    """Return the codes that `pack` was given, int16 [O, I], from rows of `inputs` codes."""
    if (low, high) == TERNARY:
        return ternary.unpack(packed_OJ, inputs, torch.int16)
    count = codes_per_byte(low, high)
    width = 8 // count
    parts = [packed_OJ >> (width * slot) & (2**width - 1) for slot in range(count)]
    return torch.stack(parts, 2).flatten(1)[:, :inputs].to(torch.int16) + low


def product(x_BI: Tensor, packed_OJ: Tensor, low: int, high: int) -> Tensor:
    """Return x C^T [B, O] with the codes C of packed rows, in the dtype of x."""
    return F.linear(x_BI, unpack(packed_OJ, x_BI.shape[-1], low, high).to(x_BI.dtype))
