"""Docstring retrieval with small models pretrained on the training packages: a Llama, and an encoder of the same size.

The encoder is a ModernBERT: after 400 steps a BERT, and one whose norms come before its blocks, had learned little
beyond the frequencies of words (6.3 nats; ModernBERT 5.6).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.from_scratch import new, trained_tokenizer
from intaglio.data.texts import Corpus
from intaglio.evidence.testbeds.cached_models import copied, pretraining_recipe, trained_model
from intaglio.evidence.testbeds.docstrings import Docstrings
from intaglio.trainer.causal_lm import CausalLM
from intaglio.trainer.masked_lm import MaskedLM

Kind = Literal["llama", "modernbert", "bert"]
_DECIDES = ("training_packages", "document", "width", "depth", "vocabulary", "context", "length", "steps", "batch",
            "learning_rate")  # fmt: skip


@dataclass(frozen=True)
class DocstringModels(Docstrings):
    """Docstring retrieval, and the size and pretraining of the models."""

    width: int = 128
    depth: int = 4
    vocabulary: int = 4096
    context: int = 160
    length: int = 128
    steps: int = 800
    batch: int = 16
    learning_rate: float = 3e-3
    encoder_learning_rate: float = 2e-3
    """Of the encoder; at 5e-3 it too learns little beyond the frequencies of words."""
    tuning_steps: int = 200
    """Optimizer steps of an encoder's training on pairs."""
    MINIATURE: ClassVar = {**Docstrings.MINIATURE, "width": 16, "depth": 1, "vocabulary": 300, "length": 32,
                           "steps": 4, "batch": 4, "tuning_steps": 20}  # fmt: skip

    def texts(self) -> tuple[str, ...]:
        """Return the texts of the pretraining: summaries with their documents, of the training pairs."""
        return tuple(f"{pair.query}\n{pair.document}" for pair in self.pairs("train"))

    def new(self, kind: Kind, seed: int = 0) -> Checkpoint:
        """Return an untrained model."""
        tokenizer = _tokenizer(self, kind != "llama")
        return new(kind, width=self.width, depth=self.depth, context=self.context, seed=seed, tokenizer=tokenizer)

    def load(self, kind: Kind) -> Checkpoint:
        """Return a copy of the pretrained model, which may be changed."""
        length = self.length
        objective: Any = CausalLM(length=length) if kind == "llama" else MaskedLM(mask_ratio=0.3, length=length)
        rate = self.learning_rate if kind == "llama" else self.encoder_learning_rate
        settings = {**self.settings(*_DECIDES), "learning_rate": rate}
        choices = {"kind": kind, "data": self.digest, "settings": settings}
        recipe = pretraining_recipe(self.steps, self.batch, rate, 0)
        return copied(
            trained_model(
                f"docstring-{kind}",
                choices,
                lambda: self.new(kind),
                lambda: list(self.texts()),
                {**recipe, "objective": objective},
            )
        )


@lru_cache(maxsize=4)
def _tokenizer(bed: DocstringModels, encoder: bool) -> Any:
    corpus = Corpus("docstrings", bed.texts())
    return trained_tokenizer(corpus, bed.vocabulary, bed.context, encoder=encoder)
