"""Bytes of real Python source, and a small Llama that predicts them: for what trains, and for what carves something
small that was trained.

The source is the standard library of the running interpreter (so another version of Python gives other data: `digest`
says so), without tests and generated files. Files are sealed by their hash. Byte b is token b; each file ends with the
tokenizer's end-of-text token.

    world = SourceCode()
    checkpoint = world.new(seed)
    train(checkpoint, world.training(seed), **world.recipe(seed))
    losses = quality(checkpoint, world.documents("run").segments).losses      # nats a byte

Dimension letters: N windows, T bytes of a window, S bytes of all files of a set.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.from_scratch import byte_tokenizer, new
from intaglio.data.python_source import STANDARD_LIBRARY, SourceFile, source_files, source_folder, sources_digest
from intaglio.data.segments import Segments
from intaglio.data.texts import Corpus
from intaglio.errors import IntaglioError
from intaglio.evidence.experiment import Stage
from intaglio.evidence.worlds.sealing import MEASURED, Bounds, Part, Windows, check_part, draw, keyed, part_of
from intaglio.evidence.worlds.trained import trained
from intaglio.methods.base import Progress, no_progress

BOUNDS: Bounds = {"train": (0, 600), "validation": (600, 700), "pilot": (700, 800), "evaluation": (800, 1000)}
"""Which remainders of a file's hash are in which set."""
_CODE = ("intaglio.data.python_source", "intaglio.evidence.worlds.source_code")
_DECIDES = ("packages", "width", "depth", "context", "tokens", "steps", "batch")


@dataclass(frozen=True)
class SourceCode:
    """The world: which source, a model's size, how it is trained, and how much is measured on.

    Training with the defaults takes about 6 minutes on two quiet cores. With the library of Python 3.11 the model then
    predicts files that it has not seen with 1.97 bits a byte.

    Args:
        packages: whose source; installed packages beside `stdlib` give more. Default the standard library.
        folder: source below this directory in their place; tests put a small one here. Default "": none.
        width: of the model. Default 128.
        depth: layers. Default 4.
        context: bytes of a training window, and the longest input. Default 256.
        steps: of training. Default 1500.
        batch: windows of a step. Default 8.
        learning_rate: at its highest. Default 3e-3.
        samples: windows of a calibration draw, each from another file. Default 16.
        documents_run: files that a run is measured on, a window each. Default 100.
        documents_pilot: of the pilot, and of validation. Default 40.
        tokens: bytes of such a window. Default 256.
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

    @property
    def digest(self) -> str:
        """SHA-256 of all source: what another version of Python or of a package changes."""
        return sources_digest(_files(self.packages, self.folder))

    def part(self, part: Part) -> Corpus:
        """The files of a sealed set.

        Args:
            part: which.
        """
        check_part(part, BOUNDS)
        return _sealed(self.packages, self.folder, part)

    def training(self, seed: int) -> Segments:
        """The windows of a whole training, `steps * batch` of them, cut at random out of all training files in a row.

        Args:
            seed: decides their places; fewer steps get the first ones of more.
        """
        stream_S = _stream(self.packages, self.folder, "train")
        starts = len(stream_S) - self.context + 1
        if starts < 1:
            raise IntaglioError(f"the training files have {len(stream_S)} bytes; a window of {self.context} is needed")
        key = f"source code train:{seed}"
        places_N = np.array([keyed(key, str(window)) % starts for window in range(self.steps * self.batch)])
        windows_NT = np.lib.stride_tricks.sliding_window_view(stream_S, self.context)[places_N]
        return Segments.of(torch.from_numpy(windows_NT.astype(np.int64)))

    def calibration(self, seed: int) -> Windows:
        """A window at random out of each of some training files.

        Args:
            seed: decides files and places.
        """
        return self._windows("train", self.samples, self.context, seed)

    def validation(self, seed: int = 0) -> Windows:
        """Windows to choose settings on.

        Args:
            seed: decides files and places. Default 0.
        """
        return self._windows("validation", self.documents_pilot, self.tokens, seed)

    def documents(self, stage: Stage, base: int = 0) -> Windows:
        """What every run of a stage is measured on: a window out of each of some files.

        Args:
            stage: pilots have files of their own.
            base: another seed base gives other files of the set, and other places in them.
        """
        count = self.documents_run if stage == "run" else self.documents_pilot
        return self._windows(MEASURED[stage], count, self.tokens, base)

    def new(self, seed: int, **changes: Any) -> Checkpoint:
        """A model of the world's size with random weights.

        Args:
            seed: of the weights.
            **changes: arguments of `intaglio.new` in the place of the world's.
        """
        sizes = {"width": self.width, "depth": self.depth, "context": max(self.context, self.tokens)}
        return new("llama", **{**sizes, "seed": seed, **changes})

    def recipe(self, seed: int) -> dict[str, Any]:
        """How models of this world are trained: keyword arguments of `intaglio.trainer.train`.

        Args:
            seed: of the order of the windows.
        """
        return {
            "steps": self.steps,
            "batch_size": self.batch,
            "learning_rate": self.learning_rate,
            "final_share": 0.1,
            "betas": (0.9, 0.95),
            "weight_decay": 0.1,
            "seed": seed,
        }

    def trained(self, seed: int = 0, progress: Progress = no_progress) -> Checkpoint:
        """A trained model, one object a process: copy it before it is carved.

        It is trained once and then found in the user's cache, under a digest of settings, data, code and versions; two
        processes that ask at the same time train once, and a killed training goes on.

        Args:
            seed: of weights and windows: another one is another model. Default 0.
            progress: called after each step of a training.
        """
        settings = asdict(self)
        return trained(
            "source_code",
            {"seed": seed, "data": self.digest, "settings": {name: settings[name] for name in _DECIDES}},
            lambda: self.new(seed),
            lambda: self.training(seed),
            self.recipe(seed),
            _CODE,
            progress,
        )

    def load(self) -> Checkpoint:
        """The trained model with seed 0, so that what carves SmolLM2 can carve this."""
        return self.trained()

    def _windows(self, part: Part, count: int, length: int, seed: int) -> Windows:
        corpus = self.part(part)
        content = {name: text.encode() for name, text in zip(corpus.hashes, corpus.documents, strict=True)}
        long_enough = [name for name, text in content.items() if len(text) >= length]
        key = f"source code {part}:{seed}"
        drawn = [long_enough[place] for place in draw(key, long_enough, count, f"{part} files of {length} bytes")]
        starts = {name: keyed(f"{key}:place", name) % (len(content[name]) - length + 1) for name in drawn}
        rows = [list(content[name][start : start + length]) for name, start in starts.items()]
        return Windows(Segments.of(rows), tuple(name[:12] for name in drawn))


def _files(packages: tuple[str, ...], folder: str) -> tuple[SourceFile, ...]:
    return source_folder(folder) if folder else source_files(packages)


@lru_cache(maxsize=8)
def _sealed(packages: tuple[str, ...], folder: str, part: Part) -> Corpus:
    whole = Corpus("Python source", tuple(file.text for file in _files(packages, folder)))
    # In the order of their hashes: a file that is new in some version moves no other.
    found = sorted(zip(whole.hashes, whole.documents, strict=True))
    return Corpus(f"Python source ({part})", tuple(text for name, text in found if part_of(name, BOUNDS) == part))


@lru_cache(maxsize=4)
def _stream(packages: tuple[str, ...], folder: str, part: Part) -> np.ndarray:
    """All files of a set in a row, each with the end-of-text token behind it, uint16 [S]."""
    end = np.array([byte_tokenizer(1).eos_token_id], dtype=np.uint16)
    pieces = [np.frombuffer(text.encode(), dtype=np.uint8) for text in _sealed(packages, folder, part).documents]
    return np.concatenate([part for piece in pieces for part in (piece.astype(np.uint16), end)] or [end[:0]])
