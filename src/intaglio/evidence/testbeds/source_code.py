"""Bytes of real Python source, and small Llamas that predict them.

The source is the standard library of the running interpreter (`digest` identifies its version), without tests and
generated files. Files are split by hash. Byte b is token b; each file ends with the end-of-text token.

Dimension letters: S bytes of all files of a set.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.from_scratch import byte_tokenizer, new
from intaglio.data.python_source import STANDARD_LIBRARY, SourceFile, source_files, source_folder, sources_digest
from intaglio.data.segments import Segments
from intaglio.data.texts import Corpus, document_hash
from intaglio.evidence.testbeds.cached_models import pretraining_recipe, trained_model
from intaglio.evidence.testbeds.splits import (
    Part,
    Prompt,
    Sized,
    Windows,
    check_count,
    check_part,
    draw_windows,
    generator,
    part_of,
    random_windows,
)
from intaglio.methods.base import Progress, no_progress
from intaglio.trainer import train

TOY = "toy"
"""Package of made-up source, the same with every Python, for golden numbers."""
_DECIDES = ("packages", "width", "depth", "context", "steps", "batch", "overrides")


@dataclass(frozen=True)
class SourceCode(Sized):
    """Source files, the size of a model, its training, and the number of documents measured on.

    With the defaults, training takes about 10 minutes on one core and reaches 1.97 bits a byte on unseen files of
    Python 3.11's library. `overrides` are further arguments of `intaglio.new`. With `prompt`, the first bytes of each
    document are a unit of its own; without, all documents, whole, are the prompts of every unit.
    """

    packages: tuple[str, ...] = (STANDARD_LIBRARY,)
    folder: str = ""
    width: int = 128
    depth: int = 4
    context: int = 256
    steps: int = 1500
    batch: int = 8
    learning_rate: float = 3e-3
    samples: int = 16
    documents_run: int = 100
    documents_pilot: int = 40
    tokens: int = 256
    overrides: tuple[tuple[str, Any], ...] = ()
    prompt: int = 0
    MINIATURE: ClassVar = {"packages": (TOY,), "folder": "", "width": 16, "depth": 1, "context": 32, "steps": 8,
                           "batch": 4, "samples": 4, "tokens": 32,
                           "documents_run": 8, "documents_pilot": 8}  # fmt: skip

    @property
    def digest(self) -> str:
        """SHA-256 of all source."""
        return sources_digest(_files(self.packages, self.folder))

    def part(self, part: Part) -> Corpus:
        """Return the files of a set."""
        check_part(part)
        return _files_of(self.packages, self.folder, part)

    def training(self, seed: int, steps: int | None = None) -> Segments:
        """Return the windows of a training of `steps` (default: the test bed's); fewer are the first of more."""
        stream_S = _stream(self.packages, self.folder)
        count = (self.steps if steps is None else steps) * self.batch
        return random_windows(f"source code train:{seed}", stream_S, count, self.context, "bytes")

    def calibration(self, seed: int, part: Part = "evaluation") -> Windows:
        """Return a random window from each of `samples` random training files, whatever the set measured on."""
        return self._windows("train", self.samples, self.context, seed)

    def documents(self, part: Part, base: int = 0) -> Windows:
        """Return the windows of a set that every run is measured on; another base gives other windows."""
        count = self.documents_run if part == "evaluation" else self.documents_pilot
        return self._windows(part, count, self.tokens, base)

    def new(self, seed: int, **changes: Any) -> Checkpoint:
        """Return an untrained model of the test bed's size; `changes` override arguments of `intaglio.new`."""
        sizes = {"width": self.width, "depth": self.depth, "context": max(self.context, self.tokens)}
        return new("llama", **{**sizes, "seed": seed % 2**32, **dict(self.overrides), **changes})

    def recipe(self, seed: int) -> dict[str, Any]:
        """Return the keyword arguments of `intaglio.trainer.train` for this test bed."""
        return pretraining_recipe(self.steps, self.batch, self.learning_rate, seed)

    def source(self, part: Part, index: int, base: int = 0) -> tuple[Prompt, ...]:
        """Return all documents of a set as prompts, for units that are trainings; of `train`, some for each index.

        With `prompt`, return the beginning of the document `index` alone.
        """
        if self.prompt:
            documents = self.documents(part, base)
            check_count(f"{part} prompts", index + 1, documents.segments.n)
            ids_T = documents.segments.ids_NT[index, : self.prompt]
            return (Prompt("code", documents.names[index], tuple(ids_T.tolist())),)
        train = part == "train"
        windows = self._windows(part, self.samples, self.tokens, index) if train else self.documents(part, base)
        rows = windows.segments.ids_NT.tolist()
        return tuple(Prompt("code", name, tuple(row)) for name, row in zip(windows.names, rows, strict=True))

    def corpus(self) -> Corpus:
        """Return the files of the training set, which tables of drafters may be counted in."""
        return self.part("train")

    def trained(self, seed: int = 0, progress: Progress = no_progress) -> Checkpoint:
        """Return the trained model of a seed; see `trained_model`."""
        if self.packages == (TOY,):
            return _toy_model(self, seed)
        choices = self.settings(*_DECIDES) | {
            "length": max(self.context, self.tokens),
            "overrides": dict(self.overrides),
        }
        return trained_model(
            "source_code",
            {"seed": seed, "data": self.digest, "settings": choices},
            lambda: self.new(seed),
            lambda: self.training(seed),
            self.recipe(seed),
            progress=progress,
        )

    def load(self) -> Checkpoint:
        """Return the trained model of seed 0, so that this test bed can replace `SmolLM2Wikipedia`."""
        return self.trained()

    def _windows(self, part: Part, count: int, length: int, seed: int) -> Windows:
        corpus = self.part(part)
        content = {name: text.encode() for name, text in zip(corpus.hashes, corpus.documents, strict=True)}
        what = f"{part} files of {length} bytes"
        windows = draw_windows(f"source code {part}:{seed}", content, count, length, what)
        return Windows(Segments.of(list(windows.values())), tuple(name[:12] for name in windows))


@lru_cache(maxsize=4)
def _toy_model(bed: SourceCode, seed: int) -> Checkpoint:
    checkpoint = bed.new(seed)
    train(checkpoint, bed.training(seed), **bed.recipe(seed))
    return checkpoint


def _toy_files() -> tuple[SourceFile, ...]:
    names = ("alpha", "beta", "gamma", "value", "count", "total", "index", "name", "item")
    files = []
    for number in range(120):
        rows = generator(f"toy source:{number}").integers(0, (len(names), len(names), 100), size=(20, 3))
        text = f"# File {number}.\n" + "".join(f"{names[a]} = {names[b]} + {c}\n" for a, b, c in rows)
        files.append(SourceFile(TOY, f"toy.m{number}", text, document_hash(text)))
    return tuple(files)


def _files(packages: tuple[str, ...], folder: str) -> tuple[SourceFile, ...]:
    if packages == (TOY,):
        return _toy_files()
    return source_folder(folder) if folder else source_files(packages)


@lru_cache(maxsize=8)
def _files_of(packages: tuple[str, ...], folder: str, part: Part) -> Corpus:
    whole = Corpus("Python source", tuple(file.text for file in _files(packages, folder)))
    # In the order of their hashes: a file that is new in some version moves no other.
    files = sorted(zip(whole.hashes, whole.documents, strict=True))
    return Corpus(f"Python source ({part})", tuple(text for name, text in files if part_of(name) == part))


@lru_cache(maxsize=4)
def _stream(packages: tuple[str, ...], folder: str) -> np.ndarray:
    """All training files in a row, each followed by the end-of-text token, uint16 [S]."""
    end = np.array([byte_tokenizer(1).eos_token_id], dtype=np.uint16)
    pieces = [np.frombuffer(text.encode(), dtype=np.uint8) for text in _files_of(packages, folder, "train").documents]
    return np.concatenate([part for piece in pieces for part in (piece.astype(np.uint16), end)] or [end[:0]])
