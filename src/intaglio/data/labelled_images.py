"""Images with a class each: a folder of class folders, an .npz file, or examples.

Dimension letters: N images, H and W pixels, C channels.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from intaglio.errors import IntaglioError, first_line, shorten

NEEDED = "image (a file, an array of 8-bit numbers or a PIL image) and label"
MODES = {1: "L", 3: "RGB"}
BROKEN = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, NotImplementedError, OverflowError,
          MemoryError, struct.error, zlib.error)  # fmt: skip
"""Errors of Pillow for files that it cannot decode."""


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images and the class of each, in order.

    Args:
        images: a file, a PIL image, or uint8 [H, W] or [H, W, C] each.
        labels: their classes.
        index: the name of each image, all different.
        hashes: the SHA-256 of each image's pixels in colours.
        name: their origin, for messages.
        skipped: broken files that were left out.
    """

    images: tuple[Any, ...]
    labels: tuple[str, ...]
    index: tuple[str, ...]
    hashes: tuple[str, ...]
    name: str
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return the number of images N."""
        return len(self.images)


def load_labelled_images(source: Any, *, skip_broken: bool = False) -> LabelledImages:
    """Return images with their classes; each is decoded once, so that broken ones are known.

    Args:
        source: a folder whose folders are the classes, an `.npz` file with `images` (uint8 [N, H, W] or [N, H, W, C])
            and `labels` [N], or examples `{image, label}`; either perhaps with `index`, the images' names.
        skip_broken: whether files that cannot be decoded are left out. Default False: they are refused.

    Raises:
        IntaglioError: nothing is there, an image is broken, or an example is malformed (it is named).
    """
    name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else "list of images"
    if isinstance(source, (str, os.PathLike)):
        path = Path(source).expanduser()
        rows = _folder(path) if path.is_dir() else _arrays(path)
    else:
        rows = list(source)
    images: list[Any] = []
    labels: list[str] = []
    index: list[str] = []
    hashes: list[str] = []
    broken: list[str] = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping) or row.get("image") is None or not isinstance(row.get("label"), (str, int)):
            raise IntaglioError(f"example {number} of {name} is {shorten(repr(row))}; it needs {NEEDED}")
        where = str(row.get("index", number))
        try:
            pixels = read_image(row["image"], where)
        except IntaglioError:
            if not skip_broken:
                raise
            broken.append(where)
            continue
        images.append(row["image"])
        labels.append(str(row["label"]))
        index.append(where)
        hashes.append(hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest())
    if not images:
        raise IntaglioError(f"{name} holds no image that can be read; folders of images by class are needed")
    return LabelledImages(tuple(images), tuple(labels), tuple(index), tuple(hashes), name, tuple(broken))


def load_images(source: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return images to classify, `{image, index}` each, and `label` where their classes are known.

    Args:
        source: an image file, a folder of images, or labelled images as `load_labelled_images` takes them.

    Raises:
        IntaglioError: there is no image.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        flat = _images_in(path, path.iterdir())
        return flat or _folder(path)
    if path.suffix.lower() in _suffixes():
        return _images_in(path.parent, [path])
    return _arrays(path)


def _suffixes() -> set[str]:
    pillow = _pillow()
    return {suffix for suffix, kind in pillow.registered_extensions().items() if kind in pillow.OPEN}


def _images_in(folder: Path, paths: Iterable[Path]) -> list[dict[str, Any]]:
    suffixes = _suffixes()
    return [
        {"image": path, "index": path.relative_to(folder).as_posix()}
        for path in sorted(paths)
        if path.is_file() and path.suffix.lower() in suffixes and not path.name.startswith(".")
    ]


def _folder(folder: Path) -> list[dict[str, Any]]:
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    rows = [{**row, "label": place.name} for place in classes for row in _images_in(folder, place.rglob("*"))]
    if not rows:
        raise IntaglioError(f"{folder} holds no images; a folder for each class, with its images, is needed")
    return rows


def _arrays(path: Path) -> list[dict[str, Any]]:
    if path.suffix != ".npz":
        raise IntaglioError(f"{path} is no folder of images and no .npz file with images and labels")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, TypeError, EOFError, BadZipFile, KeyError, zlib.error) as error:
        raise IntaglioError(f"cannot read the images {path}: {first_line(error)}") from None
    images, labels = (arrays.get(name, np.empty(0)) for name in ("images", "labels"))
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or labels.shape != (len(images),):
        raise IntaglioError(
            f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}; images, uint8 [N, H, W] or [N, H, W, C], and "
            "labels [N] are needed"
        )
    names = arrays.get("index", np.arange(len(images)))
    if names.shape != labels.shape:
        raise IntaglioError(f"the index of {path} has the shape {names.shape}; a name for each image is needed")
    columns = zip(images, labels.tolist(), names.tolist(), strict=True)
    return [{"image": image, "label": label, "index": name} for image, label, name in columns]


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise IntaglioError("images need the package Pillow: pip install 'intaglio[images]'") from None
    Image.init()
    return Image


def read_image(image: Any, where: str, channels: int = 3) -> np.ndarray:
    """Return an image as uint8 [H, W, C], grey (1 channel) or in colours (3).

    Args:
        image: a file, a PIL image, or uint8 [H, W] or [H, W, C].
        where: its name, for messages.
        channels: 1 or 3. Default 3.

    Raises:
        IntaglioError: the image is broken, or no image.
    """
    pillow = _pillow()
    if channels not in MODES:
        raise IntaglioError(f"the model takes images of {channels} channels; images have 1 or 3")
    try:
        if isinstance(image, (str, os.PathLike)):
            with pillow.open(image) as file:
                picture = file.convert(MODES[channels])
        elif isinstance(image, np.ndarray) and image.dtype == np.uint8:
            picture = pillow.fromarray(image.squeeze(-1) if image.shape[2:] == (1,) else image)
            picture = picture.convert(MODES[channels])
        elif hasattr(image, "convert"):
            picture = image.convert(MODES[channels])
        else:
            raise IntaglioError(f"the image {where} is {type(image).__name__}; {NEEDED} are needed")
    except IntaglioError:
        raise
    except (*BROKEN, pillow.DecompressionBombError) as error:
        reason = first_line(error)
        raise IntaglioError(
            f"the image {where} is broken ({reason}); mend or remove it (training leaves it out by skip_broken)"
        ) from None
    pixels_HWC = np.asarray(picture)
    return pixels_HWC[..., None] if pixels_HWC.ndim == 2 else pixels_HWC


def thumbnail(image: Any, where: str, side: int = 48) -> str:
    """Return a small PNG of an image, its longer side at most `side` pixels, in base64."""
    picture = _pillow().fromarray(read_image(image, where))
    picture.thumbnail((side, side))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")
