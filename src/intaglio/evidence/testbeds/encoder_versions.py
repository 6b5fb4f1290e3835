"""Two encoders of the docstrings: a small old one, trained on one package, and a new one with all that it knows.

The old encoder is a BERT trained by contrast, one for each seed; the new one is MiniLM, whose vectors are cached. The
BERT is not pretrained: after masked language modelling that had learned the frequencies of words alone, contrast gave
every text the same vector.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from intaglio.checkpoint import Checkpoint, load
from intaglio.data.text_pairs import TextPair
from intaglio.environment import torch_threads
from intaglio.evidence.testbeds.cache import cached, preparation
from intaglio.evidence.testbeds.cached_models import THREADS, trained_model
from intaglio.evidence.testbeds.docstring_models import DocstringModels
from intaglio.evidence.testbeds.splits import draw
from intaglio.measures.embeddings import embed_texts
from intaglio.trainer.contrastive import Contrastive

SIZES: dict[str, Any] = {"query_length": 24, "document_length": 48}
UNTRAINED = "untrained"
"""New encoder of the miniature: a BERT of another seed."""


@dataclass(frozen=True)
class EncoderVersions(DocstringModels):
    """Docstring retrieval by two encoders.

    `old_packages` are those of the old encoder's pairs, `head_pairs` the pairs of all packages by which the new one is
    made compatible, `new_name` its name and `new_length` its most tokens of a text.
    """

    old_packages: tuple[str, ...] = ("sympy",)
    new_name: str = "minilm"
    new_length: int = 64
    head_pairs: int = 1500
    MINIATURE: ClassVar = {**DocstringModels.MINIATURE, "old_packages": ("jinja2",), "new_name": UNTRAINED,
                           "head_pairs": 12, "tuning_steps": 2}  # fmt: skip

    def old_encoder(self, seed: int) -> Checkpoint:
        """Return the old encoder of a seed, whose `encoder()` reads texts."""
        pairs = [pair for pair in self.pairs("train") if pair.package in self.old_packages]
        choices = {"data": self.digest, "settings": self.settings("old_packages", "width", "depth", "vocabulary"),
                   "seed": seed}  # fmt: skip
        recipe: dict[str, Any] = {"steps": 2 * self.tuning_steps, "batch_size": 16, "learning_rate": 3e-4,
                                  "warmup": 0.1, "seed": seed % 2**31,
                                  "objective": Contrastive(pooling="mean", **SIZES)}  # fmt: skip
        return trained_model(
            "docstring-old",
            choices,
            lambda: self.new("bert", seed),
            lambda: [TextPair(pair.query, pair.document).row() for pair in pairs],
            recipe,
        )

    def old_vectors(self, seed: int, texts: Sequence[str], side: str) -> Tensor:
        """Return the old encoder's vectors of texts, unit norm."""
        checkpoint = self.old_encoder(seed)
        with preparation():
            vectors: Tensor = checkpoint.encoder().encode(checkpoint, list(texts), side)
        return vectors

    def new_vectors(self, texts: Sequence[str]) -> Tensor:
        """Return the new encoder's vectors of texts, unit norm; they are cached."""

        def build(target: Path, scratch: Path) -> None:
            encoder = self.new_encoder()
            with preparation(), torch_threads(THREADS):
                vectors = embed_texts(encoder, texts, max_length=self.new_length)
            save_file({"vectors": F.normalize(vectors, dim=-1)}, target / "vectors.safetensors")

        content = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()
        choices = {"texts": content, **self.settings("new_name", "new_length", "width", "depth", "vocabulary")}
        return load_file(cached("docstring-new", choices, build) / "vectors.safetensors")["vectors"]

    def new_encoder(self) -> Checkpoint:
        """Return the new encoder."""
        return DocstringModels.new(self, "bert", 1) if self.new_name == UNTRAINED else load(self.new_name)

    def compatible_pairs(self) -> list[TextPair]:
        """Return the pairs by which an encoder is made compatible, the same for every unit."""
        every = self.pairs("train")
        chosen = draw("compatible pairs", [pair.id for pair in every], self.head_pairs, "training pairs")
        return [TextPair(every[index].query, every[index].document) for index in chosen]

    def cached_pairs(self, seed: int) -> tuple[Tensor, ...]:
        """Return the vectors of these pairs in the order of `BT2`'s `CachedPairs`, and the documents' numbers."""
        pairs = self.compatible_pairs()
        queries, documents = [pair.query for pair in pairs], [pair.positive for pair in pairs]
        old = [self.old_vectors(seed, texts, side) for texts, side in ((queries, "query"), (documents, "document"))]
        return self.new_vectors(queries), self.new_vectors(documents), *old, torch.arange(len(pairs))
