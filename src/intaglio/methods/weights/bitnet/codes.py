"""Codes in few bytes: four ternary weights, two of up to 4 bits, or one of up to 8 in a byte.

Ternary ones lie as `kernels.ternary` wants them. Of others, consecutive inputs share a byte, the first in its lowest
bits.

Dimension letters: O output features, I input features, J bytes of a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from intaglio.kernels import ternary

TERNARY = (-1, 1)


def in_a_byte(low: int, high: int) -> int:
    """How many codes a byte holds: 4, 2 or 1.

    Args:
        low: the least code.
        high: the greatest.
    """
    return 4 if high - low < 4 else 2 if high - low < 16 else 1


def bytes_of_row(inputs: int, low: int, high: int) -> int:
    """J, the bytes of a row.

    Args:
        inputs: I.
        low: the least code.
        high: the greatest.
    """
    return ternary.packed_width(inputs) if (low, high) == TERNARY else -(-inputs // in_a_byte(low, high))


def pack(codes_OI: Tensor, low: int, high: int) -> Tensor:
    """Codes to bytes, uint8 [O, J], code - low each.

    Args:
        codes_OI: whole numbers of any dtype.
        low: the least code.
        high: the greatest.
    """
    if (low, high) == TERNARY:
        return ternary.pack(codes_OI.to(torch.int8))
    count = in_a_byte(low, high)
    held_OI = (codes_OI - low).to(torch.uint8)
    held_OI = F.pad(held_OI, (0, -held_OI.shape[1] % count))
    packed = held_OI[:, ::count].clone()
    for place in range(1, count):
        packed |= held_OI[:, place::count] << (8 // count * place)
    return packed


def unpack(packed_OJ: Tensor, inputs: int, low: int, high: int) -> Tensor:
    """What `pack` was given, int16 [O, I].

    Args:
        packed_OJ: bytes.
        inputs: I.
        low: the least code.
        high: the greatest.
    """
    if (low, high) == TERNARY:
        return ternary.unpack(packed_OJ, inputs, torch.int16)
    count = in_a_byte(low, high)
    width = 8 // count
    parts = [packed_OJ >> (width * place) & (2**width - 1) for place in range(count)]
    return torch.stack(parts, 2).flatten(1)[:, :inputs].to(torch.int16) + low


def product(x_BI: Tensor, packed_OJ: Tensor, low: int, high: int) -> Tensor:
    """x C^T [B, O] with the codes C of packed rows, in the dtype of x.

    Args:
        x_BI: activations, or their codes.
        packed_OJ: bytes.
        low: the least code.
        high: the greatest.
    """
    return F.linear(x_BI, unpack(packed_OJ, x_BI.shape[-1], low, high).to(x_BI.dtype))
