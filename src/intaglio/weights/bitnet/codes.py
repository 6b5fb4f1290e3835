"""Codes in few bytes: four ternary weights, two of up to 4 bits, or one of up to 8 in a byte.

Codes of three or four values lie in planes: byte j of a row holds the columns j, J + j, 2J + j and 3J + j, from its
lowest bits up, of a row filled up to a multiple of 64 columns: a run of bytes is a run of weights. Wider codes follow
each other.

Dimension letters: O output features, I input features, J bytes of a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 64
"""Columns that a row of codes of two bits is filled up to a multiple of."""


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
    count = in_a_byte(low, high)
    return -(-inputs // GROUP) * (GROUP // 4) if count == 4 else -(-inputs // count)


def pack(codes_OI: Tensor, low: int, high: int) -> Tensor:
    """Codes to bytes, uint8 [O, J], code - low each; what a row is filled up with is code 0.

    Args:
        codes_OI: whole numbers of any dtype.
        low: the least code.
        high: the greatest.
    """
    count = in_a_byte(low, high)
    width = bytes_of_row(codes_OI.shape[1], low, high)
    held_OI = (F.pad(codes_OI, (0, count * width - codes_OI.shape[1])) - low).to(torch.uint8)
    parts = held_OI.chunk(count, 1) if count == 4 else [held_OI[:, place::count] for place in range(count)]
    packed = parts[0].clone()
    for place in range(1, count):
        packed |= parts[place] << (8 // count * place)
    return packed


def unpack(packed_OJ: Tensor, inputs: int, low: int, high: int) -> Tensor:
    """What `pack` was given, int16 [O, I].

    Args:
        packed_OJ: bytes.
        inputs: I.
        low: the least code.
        high: the greatest.
    """
    count = in_a_byte(low, high)
    width = 8 // count
    parts = [packed_OJ >> (width * place) & (2**width - 1) for place in range(count)]
    held_OI = torch.cat(parts, 1) if count == 4 else torch.stack(parts, 2).flatten(1)
    return held_OI[:, :inputs].to(torch.int16) + low


def product(x_BI: Tensor, packed_OJ: Tensor, low: int, high: int) -> Tensor:
    """x C^T [B, O] with the codes C of packed rows, in the dtype of x.

    Args:
        x_BI: activations, or their codes.
        packed_OJ: bytes.
        low: the least code.
        high: the greatest.
    """
    return F.linear(x_BI, unpack(packed_OJ, x_BI.shape[-1], low, high).to(x_BI.dtype))
