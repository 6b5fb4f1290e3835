"""Python source read by two tokenizers, with a small Llama for each: for methods that swap a model's vocabulary.

Each tokenizer is a byte-level BPE trained on its own half of the training files; both models are trained on all of
them. Files are split as in `source_code`. A document is a window of text, the same for both, measured by the byte.

Dimension letters: T tokens of a document, S tokens of all files.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch.nn import functional as F

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.from_scratch import new, trained_tokenizer
from intaglio.data.segments import Segments
from intaglio.data.texts import Corpus
from intaglio.evidence.testbeds.cached_models import pretraining_recipe, trained_model
from intaglio.evidence.testbeds.source_code import SourceCode
from intaglio.evidence.testbeds.splits import Part, Sized, draw_windows, keyed, random_windows, token_stream
from intaglio.trainer.causal_lm import CausalLM

Which = Literal["base", "donor"]


@dataclass(frozen=True)
class TwoTokenizers(Sized):
    """Source, sizes of both models, their training, and number and size in bytes of the documents measured on."""

    source: SourceCode = field(default_factory=SourceCode)
    vocab: int = 1000
    donor_vocab: int = 3000
    width: int = 96
    donor_width: int = 112
    depth: int = 2
    context: int = 128
    steps: int = 1000
    batch: int = 8
    learning_rate: float = 3e-3
    documents_run: int = 60
    documents_pilot: int = 30
    size: int = 1024
    MINIATURE: ClassVar = {"source": SourceCode().toy(), "vocab": 280, "donor_vocab": 300, "width": 16,
                           "donor_width": 24, "depth": 1, "context": 32, "steps": 4, "batch": 4, "size": 128,
                           "documents_run": 8, "documents_pilot": 8}  # fmt: skip

    def tokenizer(self, which: Which) -> Any:
        """Return the tokenizer of one of the models."""
        return copy.deepcopy(_tokens(self, which)[0])

    def training(self, which: Which, seed: int, steps: int | None = None) -> Segments:
        """Return the windows of a training of `steps` (default: the test bed's) in one model's tokens."""
        count = (self.steps if steps is None else steps) * self.batch
        return random_windows(f"two tokenizers {which}:{seed}", _tokens(self, which)[1], count, self.context)

    def documents(self, part: Part, base: int = 0) -> dict[str, str]:
        """Return the documents of a set by their file's hash; another base gives other windows."""
        corpus = self.source.part(part)
        content = {name: text.encode() for name, text in zip(corpus.hashes, corpus.documents, strict=True)}
        count = self.documents_run if part == "evaluation" else self.documents_pilot
        what = f"{part} files of {self.size} bytes"
        windows = draw_windows(f"two tokenizers {part}:{base}", content, count, self.size, what)
        # A character that is cut in two is left out, so that every document is text.
        return {name[:12]: bytes(window).decode("utf-8", "ignore") for name, window in windows.items()}

    def new(self, which: Which, seed: int) -> Checkpoint:
        """Return one of the models untrained, with an untied head; the two never share weights."""
        return new(
            "llama",
            width=self.width if which == "base" else self.donor_width,
            depth=self.depth,
            context=max(self.context, self.size),
            seed=keyed(f"two tokenizers {which}", str(seed)) % 2**31,
            tokenizer=self.tokenizer(which),
            tie_word_embeddings=False,
        )

    def recipe(self, seed: int, steps: int | None = None) -> dict[str, Any]:
        """Return the keyword arguments of `train`; with `steps` those of a fine-tuning, at a tenth of the rate."""
        rate = self.learning_rate * (1.0 if steps is None else 0.1)
        recipe = pretraining_recipe(self.steps if steps is None else steps, self.batch, rate, seed)
        return recipe | {"objective": CausalLM(length=self.context)}  # not the longest input, which documents need

    def trained(self, which: Which, seed: int) -> Checkpoint:
        """Return one of the trained models; see `trained_model`."""
        measured = ("source", "documents_run", "documents_pilot", "size")
        settings = {name: value for name, value in asdict(self).items() if name not in measured}
        return trained_model(
            f"two_tokenizers_{which}",
            {"which": which, "seed": seed, "data": self.source.digest, "context": self.size, "settings": settings},
            lambda: self.new(which, seed),
            lambda: self.training(which, seed),
            self.recipe(seed),
        )


@lru_cache(maxsize=4)
def _tokens(bed: TwoTokenizers, which: Which) -> tuple[Any, np.ndarray]:
    """Return a model's tokenizer, and all training files in its tokens."""
    corpus, half = bed.source.part("train"), 0 if which == "base" else 1
    pairs = zip(corpus.hashes, corpus.documents, strict=True)
    own = tuple(text for name, text in pairs if keyed("half", name) % 2 == half)
    vocab = bed.vocab if which == "base" else bed.donor_vocab
    tokenizer = trained_tokenizer(Corpus(f"Python source ({which})", own), vocab, max(bed.context, bed.size))
    return tokenizer, token_stream(tokenizer, corpus.documents)


@torch.no_grad()
def nats_per_byte(checkpoint: Checkpoint, documents: Mapping[str, str]) -> dict[str, float]:
    """Return -log p of each document after an end-of-text token, in nats over its UTF-8 bytes."""
    tokenizer, model = checkpoint.tokenizer, checkpoint.model
    losses = {}
    for name, text in documents.items():
        ids_T = torch.tensor([tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]])
        logits_TV = model(input_ids=ids_T[None, :-1].to(checkpoint.device)).logits[0].float()
        nats = F.cross_entropy(logits_TV, ids_T[1:].to(logits_TV.device), reduction="sum")
        losses[name] = float(nats) / len(text.encode())
    return losses
