"""Small grey sprites whose place, size and shade are independent discrete sources.

All combinations are drawn; a unit trains on a random half of them and is measured on the other, in two halves:
`validation`, and what probes and looks share (their units differ in what they train on).

Dimension letters: N images, S sources.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from intaglio.evidence.testbeds.splits import Part, Sized, generator


@dataclass(frozen=True, eq=False)
class Factored:
    """Images, float32 [N, 1, side, side], and their sources, int64 [N, S]."""

    images: Tensor
    sources: np.ndarray


@dataclass(frozen=True)
class Sprites(Sized):
    """Numbers of places along each axis, of sizes and of shades; `side` pixels."""

    places: int = 8
    sizes: int = 3
    shades: int = 4
    side: int = 16
    MINIATURE: ClassVar = {"places": 3, "sizes": 2, "shades": 2, "side": 8}

    def training(self, seed: int) -> Factored:
        """Return a random half of the combinations."""
        return self._take(seed, 0, 2)

    def held_out(self, seed: int, part: Part) -> Factored:
        """Return combinations that the seed's training lacks: a quarter for validation, another for measuring."""
        return self._take(seed, 2, 3) if part == "validation" else self._take(seed, 3, 4)

    def _take(self, seed: int, first: int, last: int) -> Factored:
        """Return some quarters of the combinations in the seed's order."""
        every = _all(self)
        order_N = generator(f"sprites:{seed}").permutation(len(every.sources))
        rows_N = order_N[len(order_N) * first // 4 : len(order_N) * last // 4]
        return Factored(every.images[torch.from_numpy(rows_N)], every.sources[rows_N])


@lru_cache(maxsize=2)
def _all(bed: Sprites) -> Factored:
    counts = (bed.places, bed.places, bed.sizes, bed.shades)
    sources_NS = np.stack([axis.ravel() for axis in np.meshgrid(*map(np.arange, counts), indexing="ij")], axis=1)
    widest = max(2, bed.side // 4)
    step = (bed.side - widest) / (bed.places - 1)
    images = np.zeros((len(sources_NS), 1, bed.side, bed.side), np.float32)
    for image, (x, y, size, shade) in zip(images, sources_NS, strict=True):
        edge = widest - (bed.sizes - 1 - size)
        top, left = round(x * step), round(y * step)
        image[0, top : top + edge, left : left + edge] = 0.4 + 0.6 * shade / (bed.shades - 1)
    return Factored(torch.from_numpy(images), sources_NS)
