"""Identifiers in real Python source labelled with their roles, and a small Llama trained on such text.

Files are those of `source_code`, rewritten as in `data.identifier_roles`: with a space between any two tokens, so that
no token of the vocabulary spans two words.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.from_scratch import new, trained_tokenizer
from intaglio.data.identifier_roles import Line, lines, passages
from intaglio.data.segments import Segments
from intaglio.data.texts import Corpus
from intaglio.evidence.testbeds.cached_models import pretraining_recipe, trained_model
from intaglio.evidence.testbeds.source_code import SourceCode
from intaglio.evidence.testbeds.splits import Part, Sized, draw, random_windows, token_stream

_DECIDES = ("vocabulary", "width", "depth", "context", "steps", "batch")


@dataclass(frozen=True)
class IdentifierRoles(Sized):
    """Source, size of the model, and its training as a causal language model."""

    source: SourceCode = field(default_factory=SourceCode)
    vocabulary: int = 1024
    width: int = 128
    depth: int = 4
    context: int = 128
    steps: int = 800
    batch: int = 8
    learning_rate: float = 3e-3
    MINIATURE: ClassVar = {"source": SourceCode().toy(), "vocabulary": 280, "width": 16, "depth": 4, "context": 64,
                           "steps": 4, "batch": 4}  # fmt: skip

    def examples(self, part: Part, count: int, seed: int) -> list[dict[str, Any]]:
        """Return random passages of a set, each with at least one labelled identifier."""
        every = _passages(self.source, part)
        names = [str(number) for number in range(len(every))]
        return [every[index] for index in draw(f"roles {part}:{seed}", names, count, f"passages of {part} files")]

    def tokenizer(self) -> Any:
        """Return the tokenizer, trained on the training files."""
        return _tokens(self.source, self.vocabulary, self.context)[0]

    def training(self, seed: int) -> Segments:
        """Return the windows of a training."""
        _, stream_S = _tokens(self.source, self.vocabulary, self.context)
        return random_windows(f"roles train:{seed}", stream_S, self.steps * self.batch, self.context)

    def new(self, seed: int) -> Checkpoint:
        """Return an untrained model of the test bed's size."""
        sizes = {"width": self.width, "depth": self.depth, "context": self.context}
        return new("llama", seed=seed, tokenizer=self.tokenizer(), **sizes)

    def trained(self, seed: int = 0) -> Checkpoint:
        """Return the trained model; see `trained_model`."""
        return trained_model(
            "identifier_roles",
            {"seed": seed, "data": self.source.digest, "settings": self.settings(*_DECIDES)},
            lambda: self.new(seed),
            lambda: self.training(seed),
            pretraining_recipe(self.steps, self.batch, self.learning_rate, seed),
        )


@lru_cache(maxsize=16)
def _lines(source: SourceCode, part: Part) -> tuple[tuple[Line, ...], ...]:
    files = []
    for text in source.part(part).documents:
        try:
            files.append(tuple(lines(text)))
        except SyntaxError:
            continue  # templates that are no Python of this version
    return tuple(files)


@lru_cache(maxsize=16)
def _passages(source: SourceCode, part: Part) -> tuple[dict[str, Any], ...]:
    every = (passage for file in _lines(source, part) for passage in passages(file))
    return tuple(passage for passage in every if any(label is not None for label in passage["labels"]))


@lru_cache(maxsize=2)
def _tokens(source: SourceCode, vocabulary: int, context: int) -> tuple[Any, np.ndarray]:
    """Return a tokenizer trained on the training files, and all of these in its tokens."""
    texts = tuple("".join(line.text for line in file) for file in _lines(source, "train") if file)
    tokenizer = trained_tokenizer(Corpus("Python source with spaces", texts), vocabulary, context)
    return tokenizer, token_stream(tokenizer, texts)
