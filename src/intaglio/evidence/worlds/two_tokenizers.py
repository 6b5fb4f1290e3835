"""Python source read by two tokenizers, and a small Llama for each: for what gives a model another one's vocabulary.

Each tokenizer is a byte-level BPE trained on a half of the training files of its own; both models learn from all of
them. Files are sealed as in `source_code`. A document is a window of text, the same for both, and what a model says of
it is told by the byte.

    world = TwoTokenizers()
    base, donor = world.trained("base", seed), world.trained("donor", seed)
    losses = nats_per_byte(base, world.documents("run"))

Dimension letters: N windows, T tokens of a window, S tokens of all files.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional as F

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.from_scratch import new, trained_tokenizer
from intaglio.data.python_source import STANDARD_LIBRARY
from intaglio.data.segments import Segments
from intaglio.data.texts import Corpus
from intaglio.errors import IntaglioError
from intaglio.evidence.experiment import Stage
from intaglio.evidence.worlds.sealing import MEASURED, Part, draw, keyed
from intaglio.evidence.worlds.source_code import SourceCode
from intaglio.evidence.worlds.trained import trained
from intaglio.methods.base import Progress, no_progress
from intaglio.trainer.causal_lm import CausalLM

Which = Literal["base", "donor"]
_CODE = (
    "intaglio.data.python_source", "intaglio.evidence.worlds.source_code", "intaglio.evidence.worlds.two_tokenizers",
)  # fmt: skip


@dataclass(frozen=True)
class TwoTokenizers:
    """The world: which source, the sizes of both models, how they are trained, and how much is measured on.

    Args:
        packages: whose source. Default the standard library.
        folder: source below this directory in their place; tests put a small one here. Default "": none.
        vocab: entries of the base's vocabulary. Default 1000.
        donor_vocab: of the donor's. Default 3000.
        width: of the base. Default 96.
        donor_width: of the donor. Default 112.
        depth: layers of both. Default 2.
        context: tokens of a training window. Default 128.
        steps: of training, of both. Default 1000.
        batch: windows of a step. Default 8.
        learning_rate: at its highest. Default 3e-3.
        documents_run: files that a run is measured on, a window each. Default 60.
        documents_pilot: of the pilot, and of validation. Default 30.
        size: bytes of such a window. Default 1024.
    """

    packages: tuple[str, ...] = (STANDARD_LIBRARY,)
    folder: str = ""
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

    @property
    def source(self) -> SourceCode:
        """The files and their sets."""
        return SourceCode(packages=self.packages, folder=self.folder)

    def tokenizer(self, which: Which) -> Any:
        """The tokenizer of one of the models: trained on its own half of the training files.

        Args:
            which: `base` or `donor`.
        """
        return copy.deepcopy(_tokenizer(self, which))

    def training(self, which: Which, seed: int, steps: int | None = None) -> Segments:
        """Windows cut at random out of all training files in a row, in the tokens of one of the models.

        Args:
            which: `base` or `donor`.
            seed: decides their places; fewer steps get the first ones of more.
            steps: of how many steps. Default: a whole training.
        """
        stream_S = _stream(self, which)
        starts = len(stream_S) - self.context + 1
        if starts < 1:
            raise IntaglioError(f"the training files have {len(stream_S)} tokens; a window of {self.context} is needed")
        key = f"two tokenizers {which}:{seed}"
        count = (self.steps if steps is None else steps) * self.batch
        places_N = np.array([keyed(key, str(window)) % starts for window in range(count)])
        windows_NT = np.lib.stride_tricks.sliding_window_view(stream_S, self.context)[places_N]
        return Segments.of(torch.from_numpy(windows_NT.astype(np.int64)))

    def documents(self, stage: Stage, base: int = 0) -> dict[str, str]:
        """What a stage is measured on: a window of text out of each of some files, by the file's hash.

        Args:
            stage: each has files of its own.
            base: another seed base gives other files of the set, and other places in them.
        """
        part: Part = MEASURED[stage]
        corpus = self.source.part(part)
        long = {n: t for n, t in zip(corpus.hashes, corpus.documents, strict=True) if len(t.encode()) >= self.size}
        key, names = f"two tokenizers {part}:{base}", list(long)
        count = self.documents_run if stage == "run" else self.documents_pilot
        found = {}
        for place in draw(key, names, count, f"{part} files of {self.size} bytes"):
            text = long[names[place]].encode()
            start = keyed(f"{key}:place", names[place]) % (len(text) - self.size + 1)
            # A character that is cut in two is left out, so that every document is text.
            found[names[place][:12]] = text[start : start + self.size].decode("utf-8", "ignore")
        return found

    def new(self, which: Which, seed: int) -> Checkpoint:
        """One of the models with random weights, its head a matrix of its own.

        Args:
            which: `base` or `donor`; they never have the same weights.
            seed: of the weights.
        """
        width = self.width if which == "base" else self.donor_width
        own = keyed(f"two tokenizers {which}", str(seed)) % 2**31
        context = max(self.context, self.size)
        return new(
            "llama", width=width, depth=self.depth, context=context, seed=own, tokenizer=self.tokenizer(which),
            tie_word_embeddings=False,
        )  # fmt: skip

    def recipe(self, seed: int, steps: int | None = None) -> dict[str, Any]:
        """How models of this world are trained: keyword arguments of `intaglio.trainer.train`.

        Args:
            seed: of the order of the windows.
            steps: fewer ones, at a tenth of the rate: fine-tuning. Default: a whole training.
        """
        return {
            "objective": CausalLM(length=self.context),  # not the longest input, which documents are read with
            "steps": self.steps if steps is None else steps,
            "batch_size": self.batch,
            "learning_rate": self.learning_rate * (1.0 if steps is None else 0.1),
            "final_share": 0.1,
            "betas": (0.9, 0.95),
            "weight_decay": 0.1,
            "seed": seed % 2**31,
        }

    def trained(self, which: Which, seed: int, progress: Progress = no_progress) -> Checkpoint:
        """One of the models, trained: copy it before it is carved; see `SourceCode.trained`.

        Args:
            which: `base` or `donor`.
            seed: another one is another model.
            progress: called after each step of a training.
        """
        measured = ("documents_run", "documents_pilot", "size")
        settings = {name: value for name, value in asdict(self).items() if name not in measured}
        return trained(
            f"two_tokenizers_{which}",
            {"which": which, "seed": seed, "data": self.source.digest, "context": self.size, "settings": settings},
            lambda: self.new(which, seed),
            lambda: self.training(which, seed),
            self.recipe(seed),
            _CODE,
            progress,
        )


@lru_cache(maxsize=8)
def _tokenizer(world: TwoTokenizers, which: Which) -> Any:
    corpus = world.source.part("train")
    half = 0 if which == "base" else 1
    own = [
        text for name, text in zip(corpus.hashes, corpus.documents, strict=True) if keyed("half", name) % 2 == half
    ]  # fmt: skip
    vocab = world.vocab if which == "base" else world.donor_vocab
    return trained_tokenizer(Corpus(f"Python source ({which})", tuple(own)), vocab, max(world.context, world.size))


@lru_cache(maxsize=4)
def _stream(world: TwoTokenizers, which: Which) -> np.ndarray:
    """All training files in a row, each with the end-of-text token behind it, uint16 [S]."""
    tokenizer = _tokenizer(world, which)
    texts = list(world.source.part("train").documents)
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return np.concatenate([np.array([*row, tokenizer.eos_token_id], dtype=np.uint16) for row in rows])


@torch.no_grad()
def nats_per_byte(checkpoint: Checkpoint, documents: Mapping[str, str]) -> dict[str, float]:
    """-log p of each document, in nats over its UTF-8 bytes, told after an end-of-text token: every byte is scored.

    Args:
        checkpoint: a decoder and its tokenizer.
        documents: `{name: text}`.
    """
    tokenizer, model = checkpoint.tokenizer, checkpoint.model
    found = {}
    for name, text in documents.items():
        ids_T = torch.tensor([tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]])
        logits_TV = model(input_ids=ids_T[None, :-1].to(checkpoint.device)).logits[0].float()
        nats = F.cross_entropy(logits_TV, ids_T[1:].to(logits_TV.device), reduction="sum")
        found[name] = float(nats) / len(text.encode())
    return found
