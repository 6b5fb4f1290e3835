"""Handwritten digits: scikit-learn's 1,797 images of 8x8 pixels, or 5,000 of MNIST's of 28x28, in four disjoint sets.

Images are split by the hash of their pixels, and equal images count once. Writers are not recorded, so one writer's
digits may be in several sets.

Dimension letters: N images, C channels (1), H and W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from intaglio.data import assets
from intaglio.errors import IntaglioError
from intaglio.evidence.testbeds.splits import Bounds, Part, Sized, check_part, draw, keyed, part_of

BOUNDS: Bounds = {"train": (0, 500), "validation": (500, 650), "pilot": (650, 750), "evaluation": (750, 1000)}
CLASSES = 10
Source = Literal["digits", "mnist5k"]
SIDES = {"digits": 8, "mnist5k": 28}


@dataclass(frozen=True, eq=False)
class Images:
    """Images, float32 0 to 1, with the labels to learn and the true classes, which differ where noise was added."""

    pixels_NCHW: Tensor
    labels_N: Tensor
    true_N: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of images N."""
        return len(self.names)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over images and labels in their order."""
        total = hashlib.sha256(",".join(self.names).encode("ascii"))
        total.update(bytes(self.labels_N.tolist()))
        return total.hexdigest()

    def take(self, indices: Sequence[int] | Tensor) -> Images:
        """Return the images at some indices, in that order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        names = tuple(self.names[index] for index in chosen.tolist())
        return Images(self.pixels_NCHW[chosen], self.labels_N[chosen], self.true_N[chosen], names)

    def noisy(self, share: float, seed: int) -> Images:
        """Return the same images, exactly round(share * N) of them with one of the nine wrong labels.

        (Papers that draw from all ten classes get 10 % fewer wrong labels than they name.)
        """
        if not 0 <= share <= 1:
            raise IntaglioError(f"the share of wrong labels is {share}; it must lie between 0 and 1")
        labels_N = self.true_N.clone()
        count = round(share * len(self))
        for index in draw(f"digits noise:{seed}", self.names, count) if count else ():
            shift = 1 + keyed(f"digits wrong:{seed}", self.names[index]) % (CLASSES - 1)
            labels_N[index] = (labels_N[index] + shift) % CLASSES
        return replace(self, labels_N=labels_N)


@dataclass(frozen=True)
class Digits(Sized):
    """The source of the images and the number of them.

    `digits` are scikit-learn's, `mnist5k` a bundled asset (about 2,500 / 750 / 500 / 1,250 images); `noise` is the
    share of training and validation labels that are wrong.
    """

    source: Source = "digits"
    training_images: int = 800
    validation_images: int = 250
    run_images: int = 400
    pilot_images: int = 160
    noise: float = 0.0
    MINIATURE: ClassVar = {"source": "digits", "training_images": 160, "validation_images": 100, "run_images": 100,
                           "pilot_images": 100}  # fmt: skip

    @property
    def digest(self) -> str:
        """SHA-256 of all images and classes."""
        return hashlib.sha256("".join(self.part(part).digest for part in BOUNDS).encode("ascii")).hexdigest()

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
        return self._draw("train", self.training_images, seed).noisy(self.noise, seed)

    def images(self, part: Part, base: int = 0) -> Images:
        """Return the images that all runs are measured on; labels of `validation` are as noisy as those trained on."""
        if part == "validation":
            return self._draw(part, self.validation_images, base).noisy(self.noise, base)
        return self._draw(part, self.pilot_images if part == "pilot" else self.run_images, base)

    def _draw(self, part: Part, count: int, seed: int) -> Images:
        images = self.part(part)
        return images.take(draw(f"{self.source} {part}:{seed}", images.names, count, f"{part} images of digits"))


@lru_cache(maxsize=2)
def _images(source: Source) -> dict[Part, Images]:
    shades_NHW, classes_N = _read_digits() if source == "digits" else _read_mnist()
    hashes = [hashlib.sha256(image.tobytes()).hexdigest() for image in shades_NHW]
    first = {digest: index for index, digest in reversed(list(enumerate(hashes)))}
    chosen = sorted(first.values())
    most = 16 if source == "digits" else 255
    pixels_NCHW = torch.from_numpy(shades_NHW[chosen, None] / most).to(torch.float32)
    labels_N = torch.from_numpy(classes_N[chosen]).to(torch.int64)
    everything = Images(pixels_NCHW, labels_N, labels_N, tuple(hashes[index][:12] for index in chosen))
    parts = [part_of(hashes[index], BOUNDS) for index in chosen]
    return {part: everything.take([i for i, p in enumerate(parts) if p == part]) for part in BOUNDS}


def _read_digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise IntaglioError(
            "the test bed of digits needs the package scikit-learn: pip install 'intaglio[evidence]'"
        ) from None
    bunch = load_digits()
    return bunch.images.astype(np.uint8), bunch.target


def _read_mnist() -> tuple[np.ndarray, np.ndarray]:
    rows_NP = np.loadtxt(assets.path("mnist5k") / "mnist_5k.csv.gz", delimiter=",", dtype=np.uint8)
    return rows_NP[:, :-1].reshape(-1, 28, 28), rows_NP[:, -1]
