"""Handwritten digits: the 1,797 images of 8x8 pixels that scikit-learn brings along, in four sealed sets.

The images are sealed by the hash of their pixels, and equal images are one. Writers are not recorded, so one writer's
digits may be in several sets.

Dimension letters: N images, C channels (1), H and W pixels (8), T pixels in reading order (64).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from intaglio.errors import IntaglioError
from intaglio.evidence.experiment import Stage
from intaglio.evidence.worlds.sealing import MEASURED, Bounds, Part, check_part, draw, keyed, part_of

BOUNDS: Bounds = {"train": (0, 500), "validation": (500, 650), "pilot": (650, 750), "evaluation": (750, 1000)}
"""Which remainders of an image's hash are in which set."""
CLASSES = 10
SHADES = 17
"""Values that a pixel can have, 0 to 16: ids of pixel tokens. The class tokens of a sequence model come after them."""


@dataclass(frozen=True, eq=False)
class Images:
    """Some images and their classes.

    Args:
        pixels_NCHW: float32 [N, 1, 8, 8], 0 to 1.
        labels_N: int64, what they are learned as.
        true_N: int64, what they are; differs from the labels where noise was put in.
        names: the first 12 digits of each image's hash.
    """

    pixels_NCHW: Tensor
    labels_N: Tensor
    true_N: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        """The number of images N."""
        return len(self.names)

    @property
    def tokens_NT(self) -> Tensor:
        """The pixels in reading order as token ids, int64 0 to 16."""
        return (self.pixels_NCHW.flatten(1) * (SHADES - 1)).round().to(torch.int64)

    @property
    def sentences_NT(self) -> Tensor:
        """The pixel tokens and the class token (17 + label) behind them, [N, 65]: for models of sequences."""
        return torch.cat([self.tokens_NT, SHADES + self.labels_N[:, None]], dim=1)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over images and labels in their order: equal exactly when they are."""
        total = hashlib.sha256(",".join(self.names).encode("ascii"))
        total.update(bytes(self.labels_N.tolist()))
        return total.hexdigest()

    def take(self, places: Sequence[int] | Tensor) -> Images:
        """Some of the images.

        Args:
            places: which, in the order wanted.
        """
        chosen = torch.as_tensor(places, dtype=torch.int64)
        names = tuple(self.names[place] for place in chosen.tolist())
        return Images(self.pixels_NCHW[chosen], self.labels_N[chosen], self.true_N[chosen], names)

    def of(self, classes: Sequence[int]) -> Images:
        """The images of some classes, by what they truly are.

        Args:
            classes: digits 0 to 9.
        """
        return self.take(torch.isin(self.true_N, torch.tensor(list(classes))).nonzero().flatten())

    def noisy(self, share: float, seed: int) -> Images:
        """The same images, exactly round(share * N) of them with a wrong label, each of the nine others equally likely.

        (Papers that draw from all ten classes get 10 % fewer wrong labels than they name.)

        Args:
            share: of wrong labels, 0 to 1.
            seed: decides which, and what they become.

        Raises:
            IntaglioError: the share is out of range.
        """
        if not 0 <= share <= 1:
            raise IntaglioError(f"the share of wrong labels is {share}; it must lie between 0 and 1")
        labels_N = self.true_N.clone()
        count = round(share * len(self))
        for place in draw(f"digits noise:{seed}", self.names, count) if count else ():
            other = 1 + keyed(f"digits wrong:{seed}", self.names[place]) % (CLASSES - 1)
            labels_N[place] = (labels_N[place] + other) % CLASSES
        return replace(self, labels_N=labels_N)


@dataclass(frozen=True)
class Digits:
    """The world: how many of the images are used.

    Args:
        training_images: of a draw. Default 800 of about 900.
        validation_images: default 250 of about 270.
        run_images: evaluation images of a run. Default 400 of about 450.
        pilot_images: of the pilot. Default 160 of about 180.
        noise: share of training and validation labels that are wrong. Default 0.
    """

    training_images: int = 800
    validation_images: int = 250
    run_images: int = 400
    pilot_images: int = 160
    noise: float = 0.0

    @property
    def digest(self) -> str:
        """SHA-256 of all images and classes: another release of the data changes it."""
        return hashlib.sha256("".join(self.part(part).digest for part in BOUNDS).encode("ascii")).hexdigest()

    def part(self, part: Part) -> Images:
        """All images of a sealed set, with clean labels.

        Args:
            part: which.

        Raises:
            IntaglioError: there is no such set, or scikit-learn is not installed.
        """
        check_part(part, BOUNDS)
        return _sealed()[part]

    def training(self, seed: int) -> Images:
        """Training images, in an order that the seed decides.

        Args:
            seed: decides images, order and noise.
        """
        return self._drawn("train", self.training_images, seed).noisy(self.noise, seed)

    def validation(self, seed: int) -> Images:
        """Images to choose settings on; their labels are as noisy as those of training, as they would be in earnest.

        Args:
            seed: decides images and noise.
        """
        return self._drawn("validation", self.validation_images, seed).noisy(self.noise, seed)

    def images(self, stage: Stage, base: int = 0) -> Images:
        """What every run of a stage is measured on, with clean labels (those of `validation` while tuning).

        Args:
            stage: pilots have images of their own.
            base: another seed base gives others of the set.
        """
        if stage == "tuning":
            return self.validation(base)
        return self._drawn(MEASURED[stage], self.pilot_images if stage == "pilot" else self.run_images, base)

    def _drawn(self, part: Part, count: int, seed: int) -> Images:
        images = self.part(part)
        return images.take(draw(f"digits {part}:{seed}", images.names, count, f"{part} images of digits"))


@lru_cache(maxsize=1)
def _sealed() -> dict[Part, Images]:
    pixels_NHW, classes_N = _read()
    # Shades are 0 to 16 as they lie in the file.
    hashes = [hashlib.sha256(image.tobytes()).hexdigest() for image in pixels_NHW.astype(np.uint8)]
    first = {digest: place for place, digest in reversed(list(enumerate(hashes)))}
    places = sorted(first.values())
    pixels_NCHW = torch.from_numpy(pixels_NHW[places, None] / (SHADES - 1)).to(torch.float32)
    labels_N = torch.from_numpy(classes_N[places]).to(torch.int64)
    everything = Images(pixels_NCHW, labels_N, labels_N, tuple(hashes[place][:12] for place in places))
    parts = [part_of(hashes[place], BOUNDS) for place in places]
    return {part: everything.take([i for i, p in enumerate(parts) if p == part]) for part in BOUNDS}


def _read() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise IntaglioError(
            "the world of digits needs the package scikit-learn: pip install 'intaglio[evidence]'"
        ) from None
    found = load_digits()
    return found.images, found.target
