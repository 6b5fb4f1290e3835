"""Points on concentric rings, a class each: between two points of an outer ring lie the inner classes.

Mixed points of an outer ring fall into the data of other classes (manifold intrusion). Points are drawn from keys, so
sets of different keys share none.

Dimension letters: N points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from intaglio.data.images import Images
from intaglio.evidence.testbeds.splits import Part, Sized, check_count, check_part, generator


@dataclass(frozen=True)
class Rings(Sized):
    """The number of classes, of training points a class and of measured points a class, and the spread of a ring.

    Ring n has the radius n, with a normal error of standard deviation `spread`; ring 0 is a disc.
    """

    classes: int = 3
    training_points: int = 20
    run_points: int = 1000
    spread: float = 0.25
    noise: ClassVar[float] = 0.0  # no label is wrong
    MINIATURE: ClassVar = {"training_points": 20, "run_points": 100}

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a point."""
        return (2,)

    def training(self, seed: int) -> Images:
        """Return training points."""
        return self._points(f"rings train:{seed}", self.training_points)

    def images(self, part: Part, base: int = 0) -> Images:
        """Return the points that all runs are measured on."""
        check_part(part)
        return self._points(f"rings {part}:{base}", self.run_points)

    def _points(self, key: str, count: int) -> Images:
        check_count("points of a ring", count)
        draws = generator(key)
        labels_N = np.arange(self.classes * count) % self.classes
        angle_N = draws.uniform(0, 2 * math.pi, len(labels_N))
        radius_N = labels_N + self.spread * draws.standard_normal(len(labels_N))
        points_N2 = np.stack([radius_N * np.cos(angle_N), radius_N * np.sin(angle_N)], 1)
        classes_N = torch.from_numpy(labels_N)
        names = tuple(f"{key}:{number}" for number in range(len(labels_N)))
        return Images(torch.from_numpy(points_N2).float(), classes_N, classes_N, names)
