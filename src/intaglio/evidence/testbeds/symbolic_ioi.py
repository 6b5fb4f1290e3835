"""Indirect object identification in symbols, and a small Llama that solves it.

    <s> n3 f1 n7 f0 n7 -> n3

The model is trained once for each seed, on prompts of both splits: the splits are those of the dictionaries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.from_scratch import new, word_tokenizer
from intaglio.data.segments import Segments
from intaglio.evidence.testbeds.cached_models import pretraining_recipe, trained_model
from intaglio.evidence.testbeds.splits import Sized
from intaglio.methods.probes.sae_eval import symbolic
from intaglio.methods.probes.sae_eval.tasks import IOITask

CONTEXT = 16


@dataclass(frozen=True)
class SymbolicIOI(Sized):
    """Number of names and fillers, and the size of a small Llama and of its training."""

    names: int = 30
    fillers: int = 8
    width: int = 64
    depth: int = 3
    steps: int = 1500
    batch: int = 128
    learning_rate: float = 3e-3
    MINIATURE: ClassVar = {"names": 6, "fillers": 4, "width": 32, "depth": 2, "steps": 120, "batch": 32}

    @property
    def task(self) -> IOITask:
        """The task; its tokens are those of `new`."""
        return symbolic(self.names, self.fillers)

    def new(self, seed: int) -> Checkpoint:
        """Return an untrained Llama."""
        names, fillers = (f"n{i}" for i in range(self.names)), (f"f{i}" for i in range(self.fillers))
        tokenizer = word_tokenizer(("<pad>", "<s>", "->", *names, *fillers), pad_token="<pad>", unk_token="<pad>")
        sizes = {"width": self.width, "depth": self.depth, "context": CONTEXT, "seed": seed % 2**32}
        return new("llama", tokenizer=tokenizer, **sizes)

    def training(self, seed: int) -> Segments:
        """Return prompts of both splits in turn with their answers: a pretrained model has seen all words."""
        half = (self.steps * self.batch + 1) // 2
        splits = [self.task.prompts(half, seed % 2**32, split) for split in ("train", "test")]
        rows = [torch.cat([prompts.ids_NT, prompts.answers_N2[:, :1]], 1) for prompts in splits]
        return Segments.of(torch.stack(rows, 1).flatten(0, 1)[: self.steps * self.batch])

    def load(self, seed: int) -> Checkpoint:
        """Return the trained model of a seed, one shared object a process."""
        sizes = self.settings("names", "fillers", "width", "depth", "steps", "batch", "learning_rate")
        recipe = pretraining_recipe(self.steps, self.batch, self.learning_rate, seed)
        choices = {"settings": sizes, "seed": seed}
        return trained_model("symbolic_ioi", choices, lambda: self.new(seed), lambda: self.training(seed), recipe)
