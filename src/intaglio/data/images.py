"""Labelled images: scikit-learn's digits (8x8 pixels) and 5,000 of MNIST's (28x28).

Dimension letters: N images, C channels (1), H and W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from intaglio.data import assets
from intaglio.errors import IntaglioError

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


def load_images(source: Source) -> Images:
    """Return all images, named by the SHA-256 of their pixels; equal images count once.

    Raises:
        IntaglioError: scikit-learn is not installed, or the asset cannot be had.
    """
    shades_NHW, classes_N = _read_digits() if source == "digits" else _read_mnist()
    hashes = [hashlib.sha256(image.tobytes()).hexdigest() for image in shades_NHW]
    first = {digest: index for index, digest in reversed(list(enumerate(hashes)))}
    chosen = sorted(first.values())
    most = 16 if source == "digits" else 255
    pixels_NCHW = torch.from_numpy(shades_NHW[chosen, None] / most).to(torch.float32)
    labels_N = torch.from_numpy(classes_N[chosen]).to(torch.int64)
    return Images(pixels_NCHW, labels_N, labels_N, tuple(hashes[index] for index in chosen))


def _read_digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise IntaglioError(
            "the images of digits need the package scikit-learn: pip install 'intaglio[evidence]'"
        ) from None
    bunch = load_digits()
    return bunch.images.astype(np.uint8), bunch.target


def _read_mnist() -> tuple[np.ndarray, np.ndarray]:
    rows_NP = np.loadtxt(assets.path("mnist5k") / "mnist_5k.csv.gz", delimiter=",", dtype=np.uint8)
    return rows_NP[:, :-1].reshape(-1, 28, 28), rows_NP[:, -1]
