"""Gaussian rows that follow from integer keys alone, so that any row is computed on any device without its table."""

from __future__ import annotations

import math

import torch
from torch import Tensor

GOLDEN, MULTIPLIER_1, MULTIPLIER_2 = (number - (1 << 64) for number in
                                      (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))  # fmt: skip
"""Constants of SplitMix64 as signed integers."""
FRACTION = 24
"""Bits of a uniform number."""


def mixed(bits: Tensor) -> Tensor:
    """Return the SplitMix64 finalizer of 64-bit integers, int64 of the same shape."""
    for shift, multiplier in ((30, MULTIPLIER_1), (27, MULTIPLIER_2)):
        bits = (bits ^ _shifted(bits, shift)) * multiplier
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, count: int) -> Tensor:
    """Return a logical shift to the right."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def row_keys(seeds: Tensor, ids: Tensor) -> Tensor:
    """Return the hash of each pair of a sequence's seed and a token id, int64, broadcast."""
    return mixed(mixed(seeds) ^ mixed((ids + 1) * GOLDEN))


def gaussian_rows(seeds: Tensor, ids: Tensor, width: int) -> Tensor:
    """Return rows of N(0, 1) numbers that follow from seed, token and dimension alone, float32 [..., D].

    Args:
        seeds: of the sequences, int64, broadcast against `ids`.
        ids: tokens, int64.
        width: D.
    """
    half = torch.arange(1, (width + 1) // 2 + 1, device=ids.device)
    bits = mixed(row_keys(seeds, ids)[..., None] + half * GOLDEN)
    radius = (-2 * torch.log((_shifted(bits, 64 - FRACTION) + 0.5) / (1 << FRACTION))).sqrt()
    angle = ((bits & ((1 << FRACTION) - 1)) * (2 * math.pi / (1 << FRACTION))).float()
    return torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten(-2)[..., :width]


def random_types(seeds: Tensor, ids: Tensor, ratio: float) -> Tensor:
    """Return which token types of a sequence have a random row, bool, each with probability `ratio`."""
    return _shifted(mixed(row_keys(seeds, ids)), 64 - FRACTION) < ratio * (1 << FRACTION)
