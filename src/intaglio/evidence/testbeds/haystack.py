"""A needle-in-a-haystack language for small models: facts hidden in filler, and questions about them at the end.

A document is `<s>`, filler words with facts among them, and questions with their answers:

    <s> w3 w3 w9 k7 k2 v4 w1 ... k5 k1 v8 ... w6 ? k7 k2 v4

The filler is a Markov chain of order 1 over `words` words, the same for all sets. A fact is a key of `key_tokens`
tokens and a value of `value_tokens` tokens, drawn at random. The keys of a document differ from one another in every
token. Keys are split by their hash: every key token occurs in training, a key of the evaluation never does.

Dimension letters: N documents, T tokens of a document, Q questions, A tokens of an answer, F facts, K tokens of a key,
L tokens of a fact, W words of filler, V vocabulary.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.from_scratch import new, word_tokenizer
from intaglio.data.segments import Segments
from intaglio.errors import IntaglioError
from intaglio.evidence.testbeds.cached_models import copied, pretraining_recipe, trained_model
from intaglio.evidence.testbeds.splits import BOUNDS, Part, Sized, check_count, check_part, generator, part_of
from intaglio.trainer.instruction_tuning import InstructionTuning

SPECIAL = ("<pad>", "<s>", "</s>", "<mask>", "<unk>", "?")
"""The first tokens of the vocabulary, in the order of their ids."""
PAD, BOS, EOS, MASK, UNKNOWN, QUESTION = range(len(SPECIAL))
ROLES = dict(zip(("pad_token", "bos_token", "eos_token", "mask_token", "unk_token"), SPECIAL, strict=False))
CONTEXT = 129
"""Least context of a model, so that it can go on with longer documents; the end of text takes a token."""
CONCENTRATION = 0.1
"""Of the Dirichlet distribution of the filler's transitions: a word has two or three likely successors out of 16."""


@dataclass(frozen=True, eq=False)
class Needles:
    """Documents, positions of their answers' tokens, and the share of the filler before each fact in question."""

    segments: Segments
    positions_NQA: Tensor
    depths_NQ: Tensor
    names: tuple[str, ...]

    @property
    def answers_NQA(self) -> Tensor:
        """The answers' tokens."""
        flat_NP = self.segments.ids_NT.gather(1, self.positions_NQA.flatten(1))
        return flat_NP.view_as(self.positions_NQA)

    def correct_NQ(self, predicted_NT: Tensor) -> Tensor:
        """Return which questions are answered with every token of the answer right, as by `generate`."""
        predicted_NP = predicted_NT.gather(1, (self.positions_NQA - 1).flatten(1))
        return (predicted_NP.view_as(self.positions_NQA) == self.answers_NQA).all(-1)


@torch.no_grad()
def answers(model: nn.Module, needles: Needles, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Return which questions a causal model answers, bool [N, Q], and the log-probability of each answer [N, Q]."""
    device = next(model.parameters()).device
    predicted, scores = [], []
    for batch in needles.segments.batches(batch_size):
        ids_NT = batch["input_ids"].to(device)
        logits_NTV = model(input_ids=ids_NT).logits.float()
        predicted.append(logits_NTV.argmax(-1).cpu())
        log_probs_NTV = logits_NTV[:, :-1].log_softmax(-1)
        scores.append(log_probs_NTV.gather(2, ids_NT[:, 1:, None])[..., 0].cpu())
    score_NP = torch.cat(scores).gather(1, (needles.positions_NQA - 1).flatten(1))
    return needles.correct_NQ(torch.cat(predicted)), score_NP.view_as(needles.positions_NQA).sum(-1)


@dataclass(frozen=True)
class Haystack(Sized):
    """One language, the number of documents, and the size of a small Llama that reads them.

    The trained model begins as that of the test bed `easier`, if any: with few facts, recall is learned much sooner.
    With one key token, the keys of the evaluation would be untrained words. `keys` are at least twice as many as facts.
    """

    length: int = 64
    facts: int = 4
    questions: int = 1
    words: int = 16
    keys: int = 32
    key_tokens: int = 2
    values: int = 16
    value_tokens: int = 1
    language: int = 0
    documents_run: int = 512
    documents_pilot: int = 256
    width: int = 64
    depth: int = 2
    steps: int = 1000
    batch: int = 32
    learning_rate: float = 3e-3
    easier: Haystack | None = None
    MINIATURE: ClassVar = {"length": 32, "width": 16, "depth": 1, "steps": 4, "batch": 4, "documents_run": 16,
                           "documents_pilot": 16, "easier": None}  # fmt: skip

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The tokens by id: specials, words `w0`, key tokens `k0`, value tokens `v0` and so on."""
        groups = (("w", self.words), ("k", self.keys), ("v", self.values))
        return SPECIAL + tuple(f"{letter}{i}" for letter, count in groups for i in range(count))

    def tokenizer(self) -> Any:
        """Return a tokenizer of the vocabulary."""
        return word_tokenizer(self.vocabulary, **ROLES)

    def new(self, seed: int, **changes: Any) -> Checkpoint:
        """Return an untrained Llama that reads the language; `changes` override arguments of `intaglio.new`."""
        context = max(self.length + 1, CONTEXT)
        sizes = {"width": self.width, "depth": self.depth, "context": context, "seed": seed % 2**32}
        return new("llama", **{**sizes, "tokenizer": self.tokenizer(), **changes})

    def recipe(self, seed: int) -> dict[str, Any]:
        """Return the keyword arguments of `intaglio.trainer.train` for this test bed."""
        return pretraining_recipe(self.steps, self.batch, self.learning_rate, seed)

    def keys_of(self, part: Part) -> tuple[tuple[int, ...], ...]:
        """Return the keys of a set, as numbers of key tokens."""
        check_part(part)
        return _keys(self.keys, self.key_tokens)[part]

    def training(self, seed: int, steps: int | None = None) -> Segments:
        """Return the documents of a training of `steps` (default: the test bed's); fewer are the first of more."""
        count = (self.steps if steps is None else steps) * self.batch
        return self.draw("train", count, seed).segments

    def load(self) -> Checkpoint:
        """Return the model trained on the answers, one shared object a process: copy it before changing it."""
        easier = self.easier
        return trained_model(
            "haystack",
            {"settings": {**asdict(self), "documents_run": None, "documents_pilot": None}},
            lambda: copied(easier.load()) if easier else self.new(0),
            lambda: self.finetuning(0, self.steps),
            self.recipe(0) | {"objective": InstructionTuning(length=self.length + 1, pack=False, chat=False)},
        )

    def finetuning(self, seed: int, steps: int) -> list[dict[str, Any]]:
        """Return pairs of a fine-tuning: filler with facts, and all questions with their answers."""
        ids_NT = self.draw("train", steps * self.batch, seed).segments.ids_NT
        vocabulary, end = self.vocabulary, ids_NT.shape[1] - self.questions * (1 + self.key_tokens + self.value_tokens)
        texts = [[vocabulary[token] for token in ids_T] for ids_T in ids_NT.tolist()]
        return [{"prompt": " ".join(words[:end]), "answer": " ".join(words[end:])} for words in texts]

    def documents(self, part: Part, base: int = 0) -> Needles:
        """Return the documents of a set that every run is measured on; see `draw`."""
        count = self.documents_run if part == "evaluation" else self.documents_pilot
        return self.draw(part, count, base)

    def draw(self, part: Part, count: int, seed: int) -> Needles:
        """Return documents of a set; each follows from the set, the seed and its index."""
        keys = self.keys_of(part)
        check_count("documents", count)
        names = tuple(f"{part}-{seed}-{index}" for index in range(count))
        ids_NT, depths_NQ = zip(*(self._document(name, keys) for name in names), strict=True)
        fact = self.key_tokens + self.value_tokens
        start_Q1 = self.length - torch.arange(self.questions, 0, -1)[:, None] * (1 + fact)
        positions_QA = start_Q1 + 1 + self.key_tokens + torch.arange(self.value_tokens)
        positions_NQA, depths = positions_QA.repeat(count, 1, 1), torch.tensor(depths_NQ, dtype=torch.float64)
        return Needles(Segments.of(torch.tensor(ids_NT)), positions_NQA, depths, names)

    def _filler(self) -> int:
        """Words of filler in a document."""
        fact = self.key_tokens + self.value_tokens
        needed = 1 + self.facts * fact + self.questions * (1 + fact)
        if self.length < needed:
            raise IntaglioError(f"length is {self.length}; facts and questions alone take {needed} tokens")
        return self.length - needed

    def _document(self, name: str, keys: Sequence[tuple[int, ...]]) -> tuple[list[int], list[float]]:
        """Tokens [T] of a document, and the share of the filler before each fact in question [Q]."""
        draws, filler = generator(f"haystack:{self.language}:{name}"), self._filler()
        queried = draws.permutation(self.facts)[: self.questions].tolist()
        values = draws.integers(self.values, size=(self.facts, self.value_tokens)).tolist()
        # Scaled uniform numbers, so that what follows does not depend on the length.
        gaps = [int(share * (filler + 1)) for share in draws.random(self.facts)]
        first_key, first_value = len(SPECIAL) + self.words, len(SPECIAL) + self.words + self.keys
        facts = [
            [*(first_key + token for token in key), *(first_value + token for token in value)]
            for key, value in zip(self._distinct_keys(draws, keys), values, strict=True)
        ]
        words, ids, placed = self._walk(draws.random(filler)), [BOS], 0
        for fact in sorted(range(self.facts), key=gaps.__getitem__):
            ids += words[placed : gaps[fact]] + facts[fact]
            placed = gaps[fact]
        ids += words[placed:] + [token for fact in queried for token in (QUESTION, *facts[fact])]
        return ids, [gaps[fact] / max(filler, 1) for fact in queried]

    def _distinct_keys(self, draws: np.random.Generator, keys: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """One key a fact, no two with the same token in the same place."""
        while True:
            chosen: list[tuple[int, ...]] = []
            used: set[tuple[int, int]] = set()
            for index in draws.permutation(len(keys)):
                tokens = set(enumerate(keys[index]))
                if used.isdisjoint(tokens):
                    chosen.append(keys[index])
                    used |= tokens
                if len(chosen) == self.facts:
                    return chosen

    def _walk(self, uniform_W: np.ndarray) -> list[int]:
        """Return the filler: a path of the Markov chain by uniform numbers."""
        bounds, steps = _transitions(self.words, self.language)
        path = []
        for number in uniform_W.tolist():
            word = bisect_right(bounds, number, hi=self.words - 1)
            path.append(len(SPECIAL) + word)
            bounds = steps[word]
        return path


@lru_cache(maxsize=8)
def _keys(keys: int, key_tokens: int) -> dict[Part, tuple[tuple[int, ...], ...]]:
    """Every key, by set."""
    by_part: dict[Part, list[tuple[int, ...]]] = {part: [] for part in BOUNDS}
    for key in itertools.product(range(keys), repeat=key_tokens):
        by_part[part_of(" ".join(f"k{token}" for token in key))].append(key)
    return {part: tuple(combinations) for part, combinations in by_part.items()}


@lru_cache(maxsize=8)
def _transitions(words: int, language: int) -> tuple[list[float], list[list[float]]]:
    """Cumulative probabilities of the first word [W] and of each word's successors [W, W]."""
    draws = generator(f"haystack language:{words}:{language}")
    step_WW = draws.dirichlet(np.full(words, CONCENTRATION), size=words)
    return np.full(words, 1 / words).cumsum().tolist(), step_WW.cumsum(1).tolist()
