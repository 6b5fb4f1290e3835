"""Digits in several domains whose labels follow conflicting conventions, for soups of models tuned on each.

A base set D is plain and labelled correctly. Data set d_i shows other digits under transformation i and swaps the
labels of the classes 2 i and 2 i + 1. Choice and test use every transformation, with true labels.

Dimension letters: N images, C channels (1), H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from intaglio.data.images import Images, Source
from intaglio.evidence.testbeds.digits import Digits
from intaglio.evidence.testbeds.splits import Part, Sized

TRANSFORMATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda pixels_NCHW: F.pad(pixels_NCHW, (1, -1, 0, 0)),
    lambda pixels_NCHW: F.pad(pixels_NCHW, (-1, 1, 0, 0)),
    lambda pixels_NCHW: F.pad(pixels_NCHW, (0, 0, 1, -1)),
    lambda pixels_NCHW: F.pad(pixels_NCHW, (0, 0, -1, 1)),
    lambda pixels_NCHW: F.avg_pool2d(pixels_NCHW, 3, 1, 1),
)
"""By one pixel to the right, left, down and up, and blurred; one for each data set d_i."""
SETS = len(TRANSFORMATIONS)


@dataclass(frozen=True)
class Conventions(Sized):
    """Numbers of images: of D, of each d_i, and before transformation of the choice and of a run."""

    source: Source = "digits"
    base_images: int = 100
    added_images: int = 80
    choice_images: int = 120
    run_images: int = 200
    pilot_images: int = 120
    MINIATURE: ClassVar = {"base_images": 40, "added_images": 20, "choice_images": 20, "run_images": 40,
                           "pilot_images": 40}  # fmt: skip

    @cached_property
    def digits(self) -> Digits:
        """The images before transformation."""
        total = self.base_images + SETS * self.added_images + self.choice_images
        return Digits(self.source, total, self.run_images, self.run_images, self.pilot_images)

    def base(self, seed: int) -> Images:
        """Return D."""
        return self.digits.training(seed).take(range(self.base_images))

    def added(self, seed: int, number: int) -> Images:
        """Return d_i, transformed, with two classes swapped."""
        first = self.base_images + number * self.added_images
        images = self.digits.training(seed).take(range(first, first + self.added_images))
        swapped_N = torch.where(images.true_N // 2 == number, images.true_N ^ 1, images.true_N)
        return replace(images, pixels_NCHW=TRANSFORMATIONS[number](images.pixels_NCHW), labels_N=swapped_N)

    def choice(self, seed: int) -> Images:
        """Return the images that models are chosen on, none of which was trained on."""
        first = self.base_images + SETS * self.added_images
        return _everywhere(self.digits.training(seed).take(range(first, first + self.choice_images)))

    def images(self, part: Part, base: int = 0) -> Images:
        """Return the images that all runs are measured on."""
        return _everywhere(self.digits.images(part, base))


def joined(parts: Sequence[Images]) -> Images:
    """Return the images of several sets as one."""
    pixels_NCHW, labels_N, true_N = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("pixels_NCHW", "labels_N", "true_N")
    )
    return Images(pixels_NCHW, labels_N, true_N, tuple(name for part in parts for name in part.names))


def _everywhere(images: Images) -> Images:
    """Return the images plain and under every transformation."""
    transformed = [
        replace(images, pixels_NCHW=change(images.pixels_NCHW), names=tuple(f"{name}/{n}" for name in images.names))
        for n, change in enumerate(TRANSFORMATIONS)
    ]
    return joined([images, *transformed])
