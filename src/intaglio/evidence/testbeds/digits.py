"""Handwritten digits: scikit-learn's 1,797 images of 8x8 pixels, or 5,000 of MNIST's of 28x28, in four disjoint sets.

Images are split by the hash of their pixels, and equal images count once. Writers are not recorded, so one writer's
digits may be in several sets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

from torch.nn import functional as F

from intaglio.data.images import CLASSES, SIDES, Images, Source, load_images
from intaglio.errors import IntaglioError
from intaglio.evidence.testbeds.splits import Bounds, Part, Sized, check_count, check_part, draw, keyed, part_of

BOUNDS: Bounds = {"train": (0, 500), "validation": (500, 650), "pilot": (650, 750), "evaluation": (750, 1000)}


def noisy(images: Images, share: float, seed: int) -> Images:
    """Return the same images, exactly round(share * N) of them with one of the nine wrong labels.

    (Papers that draw from all ten classes get 10 % fewer wrong labels than they name.)
    """
    if not 0 <= share <= 1:
        raise IntaglioError(f"the share of wrong labels is {share}; it must lie between 0 and 1")
    labels_N = images.true_N.clone()
    count = round(share * len(images))
    for index in draw(f"digits noise:{seed}", images.names, count) if count else ():
        shift = 1 + keyed(f"digits wrong:{seed}", images.names[index]) % (CLASSES - 1)
        labels_N[index] = (labels_N[index] + shift) % CLASSES
    return replace(images, labels_N=labels_N)


@dataclass(frozen=True)
class Digits(Sized):
    """The source of the images and the number of them.

    `digits` are scikit-learn's, `mnist5k` a bundled asset (about 2,500 / 750 / 500 / 1,250 images); `noise` is the
    share of training and validation labels that are wrong; `balanced`, whether the training images have equally many of
    each class.
    """

    source: Source = "digits"
    training_images: int = 800
    validation_images: int = 250
    run_images: int = 400
    pilot_images: int = 160
    noise: float = 0.0
    balanced: bool = False
    MINIATURE: ClassVar = {"source": "digits", "training_images": 160, "validation_images": 100, "run_images": 100,
                           "pilot_images": 100}  # fmt: skip

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an image."""
        return (1, self.side, self.side)

    @property
    def classes(self) -> int:
        """The number of classes."""
        return CLASSES

    @property
    def side(self) -> int:
        """Pixels of a side."""
        return SIDES[self.source]

    def part(self, part: Part) -> Images:
        """Return all images of a set, with clean labels."""
        check_part(part, BOUNDS)
        return _images(self.source)[part]

    def training(self, seed: int) -> Images:
        """Return noisy training images, in random order."""
        return noisy(self._draw("train", self.training_images, seed, self.balanced), self.noise, seed)

    def images(self, part: Part, base: int = 0) -> Images:
        """Return the images that all runs are measured on; labels of `validation` are as noisy as those trained on."""
        if part == "validation":
            return noisy(self._draw(part, self.validation_images, base), self.noise, base)
        return self._draw(part, self.pilot_images if part == "pilot" else self.run_images, base)

    def _draw(self, part: Part, count: int, seed: int, balanced: bool = False) -> Images:
        images, key, what = self.part(part), f"{self.source} {part}:{seed}", f"{part} images of digits"
        if not balanced:
            return images.take(draw(key, images.names, count, what))
        order = images.take(draw(key, images.names, len(images), what))
        rank_N = F.one_hot(order.true_N, CLASSES).cumsum(0).gather(1, order.true_N[:, None])[:, 0]
        kept = order.take((rank_N <= count // CLASSES).nonzero().flatten())
        check_count(what, count, len(kept))
        return kept


@lru_cache(maxsize=2)
def _images(source: Source) -> dict[Part, Images]:
    everything = load_images(source)
    parts = [part_of(name, BOUNDS) for name in everything.names]
    everything = replace(everything, names=tuple(name[:12] for name in everything.names))
    return {part: everything.take([i for i, p in enumerate(parts) if p == part]) for part in BOUNDS}
