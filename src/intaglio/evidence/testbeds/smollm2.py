"""SmolLM2-135M-Instruct with English Wikipedia: a real model for methods that need no training.

The texts `stdlib` are Python's standard library. `upper` writes every letter as a capital: prose in a form that the
model has hardly read.

The evaluation articles are none of those that the library's own development measured on (`Corpus.split` holds out
hashes below 200 of 1000; here these are training articles).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from intaglio.checkpoint import Checkpoint, load
from intaglio.data.python_source import STANDARD_LIBRARY, source_files
from intaglio.data.segments import Segments, special_affixes
from intaglio.data.texts import Corpus, load_texts
from intaglio.errors import IntaglioError
from intaglio.evidence.testbeds.source_code import SourceCode
from intaglio.evidence.testbeds.splits import Bounds, Part, Windows, check_part, draw_windows, remainder

BOUNDS: Bounds = {"train": (0, 400), "validation": (400, 500), "pilot": (500, 600), "evaluation": (600, 1000)}
CALIBRATION = (0, 500)
"""Calibration draws use the validation articles too, except while settings are chosen."""


@dataclass(frozen=True)
class SmolLM2Wikipedia:
    """The model, the texts, and how much of them is used."""

    model: str = "smollm2"
    texts: str = "wikipedia"
    samples: int = 32
    length: int = 256
    documents_run: int = 24
    documents_pilot: int = 10
    tokens: int = 256
    upper: bool = False

    def load(self) -> Checkpoint:
        """Return the dense model, one shared object a process: copy it before changing it."""
        return _load(self.model)

    def part(self, part: Part) -> Corpus:
        """Return the articles of a set."""
        check_part(part, BOUNDS)
        return _articles(self.texts, *BOUNDS[part])

    def calibration(self, seed: int, part: Part = "evaluation") -> Windows:
        """Return a random window from each of `samples` random articles.

        Validation articles are left out while settings are chosen (`part="validation"`) or a pool is drawn (`train`).
        """
        low, high = BOUNDS["train"] if part in ("train", "validation") else CALIBRATION
        return self._windows("calibration", low, high, self.samples, self.length, seed)

    def documents(self, part: Part, base: int = 0) -> Windows:
        """Return the windows of a set that every run is measured on; another base gives other windows."""
        check_part(part, BOUNDS)
        count = self.documents_run if part == "evaluation" else self.documents_pilot
        return self._windows(part, *BOUNDS[part], count, self.tokens, base)

    def toy(self, **changes: Any) -> SourceCode:
        """Return a small model of bytes with the same interface."""
        return SourceCode().toy(**changes)

    def _windows(self, what: str, low: int, high: int, count: int, length: int, seed: int) -> Windows:
        prefix, suffix = special_affixes(self.load().tokenizer)
        inner = length - len(prefix) - len(suffix)
        documents = dict(_tokens(self.model, self.texts, low, high, self.upper))
        drawn = draw_windows(f"{what}:{seed}", documents, count, inner, f"{what} articles of {length} tokens")
        rows = [prefix + ids + suffix for ids in drawn.values()]
        return Windows(Segments.of(rows), tuple(name[:12] for name in drawn))


@lru_cache(maxsize=1)
def _load(model: str) -> Checkpoint:
    checkpoint = load(model)
    if checkpoint.tokenizer is None:
        raise IntaglioError(f"the model {model!r} has no tokenizer, so no text can be measured")
    return checkpoint


@lru_cache(maxsize=8)
def _articles(texts: str, low: int, high: int) -> Corpus:
    corpus = _source() if texts == STANDARD_LIBRARY else load_texts(texts)
    pairs = zip(corpus.documents, corpus.hashes, strict=True)
    return Corpus(f"{texts} [{low}, {high})", tuple(text for text, name in pairs if low <= remainder(name) < high))


def _source() -> Corpus:
    return Corpus(STANDARD_LIBRARY, tuple(file.text for file in source_files()))


@lru_cache(maxsize=4)
def _tokens(
    model: str, texts: str, low: int, high: int, upper: bool = False
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Each article's hash and token ids, without special ones."""
    tokenizer, corpus = _load(model).tokenizer, _articles(texts, low, high)
    documents = [text.upper() if upper else text for text in corpus.documents]
    rows = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    return tuple((name, tuple(ids)) for name, ids in zip(corpus.hashes, rows, strict=True))
