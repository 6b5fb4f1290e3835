"""20 Newsgroups as embeddings of MiniLM, and excerpts of Wikipedia for what needs texts of no class.

Training texts are those of the data set; its test texts are split by their hash into validation, pilot and evaluation.

Dimension letters: N texts, D encoder width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from intaglio.checkpoint import load
from intaglio.data import assets
from intaglio.data.labelled_texts import LabelledTexts, load_labelled_texts
from intaglio.data.texts import document_hash, load_texts
from intaglio.environment import torch_threads
from intaglio.evidence.testbeds.cache import cached, preparation
from intaglio.evidence.testbeds.splits import Bounds, Part, Sized, check_part, draw, generator, part_of
from intaglio.measures.embeddings import embed_texts

BOUNDS: Bounds = {"validation": (0, 250), "pilot": (250, 400), "evaluation": (400, 1000)}
"""Split of the data set's test texts."""
BLOBS = "blobs"
"""Source of the miniature: Gaussian classes."""


@dataclass(frozen=True, eq=False)
class Embedded:
    """Embeddings, float32 [N, D], and the classes of the texts."""

    z_ND: Tensor
    labels: tuple[str, ...]
    names: tuple[str, ...]

    def take(self, indices: Any) -> Embedded:
        """Return the rows of some indices, in that order."""
        rows = [int(index) for index in indices]
        return Embedded(self.z_ND[rows], tuple(self.labels[i] for i in rows), tuple(self.names[i] for i in rows))


@dataclass(frozen=True)
class Newsgroups(Sized):
    """Numbers of texts a class; `length` tokens of each are read, `other` texts of Wikipedia are embedded too."""

    source: str = "newsgroups"
    length: int = 64
    training_texts: int = 100
    kept_texts: int = 120
    test_texts: int = 100
    other: int = 800
    MINIATURE: ClassVar = {"source": BLOBS, "training_texts": 12, "other": 60}

    def training(self, seed: int) -> Embedded:
        """Return random training texts, the same number of each class, in random order."""
        every = _embedded(self)["train"]
        key = f"newsgroups train:{seed}"
        chosen = [
            rows[index]
            for name, rows in _by_class(every).items()
            for index in draw(key, [every.names[row] for row in rows], self.training_texts, f"texts of {name}")
        ]
        return every.take(generator(key).permutation(chosen))

    def tasks(self, seed: int, count: int) -> list[tuple[str, ...]]:
        """Return the classes in random order, in `count` tasks of the same size."""
        classes = sorted(set(_embedded(self)["train"].labels))
        order = [classes[index] for index in generator(f"newsgroups tasks:{seed}").permutation(len(classes))]
        size = len(order) // count
        return [tuple(order[start : start + size]) for start in range(0, len(order), size)]

    def texts(self, part: Part) -> Embedded:
        """Return the test texts of a set."""
        check_part(part, BOUNDS)
        every = _embedded(self)["test"]
        return every.take([i for i, name in enumerate(every.names) if part_of(name, BOUNDS) == part])

    def others(self) -> Tensor:
        """Return embeddings [N, D] of texts of none of the classes."""
        return _embedded(self)["other"].z_ND


def _by_class(data: Embedded) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, label in enumerate(data.labels):
        rows.setdefault(label, []).append(row)
    return rows


@lru_cache(maxsize=4)
def _embedded(bed: Newsgroups) -> dict[str, Embedded]:
    """Return the embeddings of all texts that a bed can draw: `train`, `test` and `other`."""
    if bed.source == BLOBS:
        return _blobs(bed)
    folder = assets.path("newsgroups")
    paths, counts = {part: folder / f"{part}.jsonl" for part in ("train", "test")}, (bed.kept_texts, bed.test_texts)
    data = {part: _kept(paths[part], count) for part, count in zip(paths, counts, strict=True)}
    documents = load_texts("wikipedia").documents
    pieces = [text for document in documents for text in document.split("\n\n") if len(text) > 200][: bed.other]
    data["other"] = LabelledTexts(tuple(pieces), ("",) * len(pieces))

    def build(target: Path, scratch: Path) -> None:
        encoder = load("minilm")
        with preparation(), torch_threads(1):
            tensors = {part: embed_texts(encoder, texts.texts, max_length=bed.length) for part, texts in data.items()}
        save_file(tensors, target / "embeddings.safetensors")

    sizes = bed.settings("source", "length", "kept_texts", "test_texts", "other")
    vectors = load_file(cached("newsgroups", {**sizes, "encoder": "minilm"}, build) / "embeddings.safetensors")
    return {
        part: Embedded(vectors[part], texts.labels, tuple(document_hash(text)[:12] for text in texts.texts))
        for part, texts in data.items()
    }


def _kept(path: Path, count: int) -> LabelledTexts:
    """Return up to `count` texts of each class, chosen by their hash."""
    read = load_labelled_texts(path)
    order = sorted(range(len(read)), key=lambda row: document_hash(read.texts[row]))
    taken, rows = dict.fromkeys(read.classes, 0), []
    for row in order:
        if taken[read.labels[row]] < count:
            taken[read.labels[row]] += 1
            rows.append(row)
    return LabelledTexts(tuple(read.texts[row] for row in rows), tuple(read.labels[row] for row in rows))


def _blobs(bed: Newsgroups, classes: int = 6, width: int = 16) -> dict[str, Embedded]:
    draws = generator(BLOBS)
    centres = 1.5 * draws.standard_normal((classes, width))
    data = {}
    for part, count in (("train", bed.training_texts + 8), ("test", 40), ("other", bed.other // classes)):
        z = centres[:, None] + draws.standard_normal((classes, count, width))
        labels = tuple(f"class {index}" for index in range(classes) for _ in range(count))
        names = tuple(f"{part} {number}" for number in range(len(labels)))
        data[part] = Embedded(torch.from_numpy(z.reshape(-1, width).astype(np.float32)), labels, names)
    return data
