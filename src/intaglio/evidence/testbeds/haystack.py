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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.from_scratch import new
from intaglio.data.segments import Segments
from intaglio.errors import IntaglioError
from intaglio.evidence.testbeds.cached_models import pretraining_recipe, trained_model
from intaglio.evidence.testbeds.splits import BOUNDS, Part, Sized, check_count, check_part, generator, part_of

SPECIAL = ("<pad>", "<s>", "</s>", "<mask>", "<unk>", "?")
"""The first tokens of the vocabulary, in the order of their ids."""
PAD, BOS, EOS, MASK, UNKNOWN, QUESTION = range(len(SPECIAL))
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


def word_tokenizer(vocabulary: Sequence[str]) -> Any:
    """Return a tokenizer of words, `SPECIAL` first: they are separated by white space, and nothing is added."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {token: i for i, token in enumerate(vocabulary)}
    backend = Tokenizer(models.WordLevel(ids, unk_token=SPECIAL[UNKNOWN]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad": PAD, "bos": BOS, "eos": EOS, "mask": MASK, "unk": UNKNOWN}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{f"{name}_token": SPECIAL[index] for name, index in names.items()}
    )


@dataclass(frozen=True)
class Haystack(Sized):
    """One language, the number of documents, and the size of a small Llama that reads them.

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
    MINIATURE: ClassVar = {"length": 32, "width": 16, "depth": 1, "steps": 4, "batch": 4, "documents_run": 16,
                           "documents_pilot": 16}  # fmt: skip

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The tokens by id: specials, words `w0`, key tokens `k0`, value tokens `v0` and so on."""
        groups = (("w", self.words), ("k", self.keys), ("v", self.values))
        return SPECIAL + tuple(f"{letter}{i}" for letter, count in groups for i in range(count))

    def tokenizer(self) -> Any:
        """Return a tokenizer of the vocabulary."""
        return word_tokenizer(self.vocabulary)

    def new(self, seed: int, **changes: Any) -> Checkpoint:
        """Return an untrained Llama that reads the language; `changes` override arguments of `intaglio.new`."""
        sizes = {"width": self.width, "depth": self.depth, "context": self.length, "seed": seed % 2**32}
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
        """Return the trained model, one shared object a process: copy it before changing it."""
        measured = ("documents_run", "documents_pilot")
        settings = {name: value for name, value in asdict(self).items() if name not in measured}
        choices = {"settings": settings}
        return trained_model("haystack", choices, lambda: self.new(0), lambda: self.training(0), self.recipe(0))

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
        filler = self._filler()
        names = tuple(f"{part}-{seed}-{index}" for index in range(count))
        drawn = [self._draw_document(name, keys, filler) for name in names]
        queried_NQ, gaps_NF, facts_NFL, uniform_NW = (np.stack(field) for field in zip(*drawn, strict=True))
        ids_NT, positions_NQA = self._assemble(self._walk(uniform_NW), gaps_NF, facts_NFL, queried_NQ)
        depths_NQ = np.take_along_axis(gaps_NF, queried_NQ, 1) / max(filler, 1)
        return Needles(
            Segments.of(torch.from_numpy(ids_NT)), torch.from_numpy(positions_NQA), torch.from_numpy(depths_NQ), names
        )

    def _filler(self) -> int:
        """Words of filler in a document."""
        fact = self.key_tokens + self.value_tokens
        needed = 1 + self.facts * fact + self.questions * (1 + fact)
        if self.length < needed:
            raise IntaglioError(f"length is {self.length}; facts and questions alone take {needed} tokens")
        return self.length - needed

    def _draw_document(
        self, name: str, keys: Sequence[tuple[int, ...]], filler: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Facts in question [Q], words before each fact [F], facts' tokens [F, L], a number for each word [W]."""
        draws = generator(f"haystack:{self.language}:{name}")
        queried_Q = draws.permutation(self.facts)[: self.questions]
        value_FA = draws.integers(self.values, size=(self.facts, self.value_tokens))
        # Scaled uniform numbers, so that what follows does not depend on the length.
        gaps_F = np.floor(draws.random(self.facts) * (filler + 1)).astype(np.int64)
        key_FK = np.array(self._distinct_keys(draws, keys))
        first_key, first_value = len(SPECIAL) + self.words, len(SPECIAL) + self.words + self.keys
        facts_FL = np.concatenate([first_key + key_FK, first_value + value_FA], axis=1)
        return queried_Q, gaps_F, facts_FL, draws.random(filler)

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

    def _walk(self, uniform_NW: np.ndarray) -> np.ndarray:
        """Return the filler: a path of the Markov chain for each row of uniform numbers."""
        start_W, step_WW = _transitions(self.words, self.language)
        path_NW = np.empty(uniform_NW.shape, dtype=np.int64)
        for w in range(uniform_NW.shape[1]):
            bounds = start_W[None] if w == 0 else step_WW[path_NW[:, w - 1]]
            path_NW[:, w] = (uniform_NW[:, w, None] >= bounds[:, :-1]).sum(1)
        return len(SPECIAL) + path_NW

    def _assemble(
        self, filler_NW: np.ndarray, gaps_NF: np.ndarray, facts_NFL: np.ndarray, queried_NQ: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the documents [N, T] and the positions of their answers [N, Q, A]."""
        count, n_facts, fact = facts_NFL.shape
        rows = np.arange(count)
        rank_NF = np.argsort(np.argsort(gaps_NF, axis=1, kind="stable"), axis=1, kind="stable")
        body = 1 + filler_NW.shape[1] + n_facts * fact
        ids_NT = np.full((count, body + self.questions * (1 + fact)), BOS, dtype=np.int64)
        is_filler_NT = np.ones(ids_NT.shape, dtype=bool)
        position_NFL = (1 + gaps_NF + fact * rank_NF)[:, :, None] + np.arange(fact)
        is_filler_NT[rows[:, None, None], position_NFL] = False
        is_filler_NT[:, 0] = False
        is_filler_NT[:, body:] = False
        ids_NT[is_filler_NT] = filler_NW.ravel()  # every row has the same number of words
        ids_NT[rows[:, None, None], position_NFL] = facts_NFL
        queried_NQL = facts_NFL[rows[:, None], queried_NQ]
        question_NQL = np.concatenate([np.full((*queried_NQ.shape, 1), QUESTION), queried_NQL], axis=2)
        ids_NT[:, body:] = question_NQL.reshape(count, -1)
        answer_Q = body + (1 + fact) * np.arange(self.questions) + 1 + self.key_tokens
        positions_QA = answer_Q[:, None] + np.arange(self.value_tokens)
        return ids_NT, np.broadcast_to(positions_QA, (count, *positions_QA.shape)).copy()


@lru_cache(maxsize=8)
def _keys(keys: int, key_tokens: int) -> dict[Part, tuple[tuple[int, ...], ...]]:
    """Every key, by set."""
    by_part: dict[Part, list[tuple[int, ...]]] = {part: [] for part in BOUNDS}
    for key in itertools.product(range(keys), repeat=key_tokens):
        by_part[part_of(" ".join(f"k{token}" for token in key))].append(key)
    return {part: tuple(combinations) for part, combinations in by_part.items()}


@lru_cache(maxsize=8)
def _transitions(words: int, language: int) -> tuple[np.ndarray, np.ndarray]:
    """Cumulative probabilities of the first word [W] and of each word's successors [W, W]."""
    draws = generator(f"haystack language:{words}:{language}")
    step_WW = draws.dirichlet(np.full(words, CONCENTRATION), size=words)
    return np.full(words, 1 / words).cumsum(), step_WW.cumsum(1)
