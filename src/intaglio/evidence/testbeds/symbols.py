"""A language of symbols to train on, and tasks in new contexts: LookUp and Permutation with the same symbols.

    training      a Markov chain of order 1 whose symbols have two or three likely successors each
    LookUp        a q x f k p ... x          -> f
    Permutation   a b c > b c a | x q z > q z x | ... k n t >          -> n t k

The chain is one for all sets and seeds, so a model may learn the symbols. Those of a task are drawn at random, so
nothing but the context gives an answer.

Dimension letters: N sequences or tasks, T symbols of a sequence, A symbols of an answer, S symbols.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.from_scratch import new, word_tokenizer
from intaglio.data.segments import Segments
from intaglio.evidence.testbeds.cached_models import pretraining_recipe
from intaglio.evidence.testbeds.splits import Part, Sized, Windows, check_part, generator

SPECIAL = ("<pad>", "<unk>")
SYMBOLS = 32
"""Symbols of the language, whose ids follow those of the special tokens."""
ARROW, BAR = len(SPECIAL) + SYMBOLS - 2, len(SPECIAL) + SYMBOLS - 1
"""The two symbols that tasks use as signs."""
FREE = np.arange(len(SPECIAL), ARROW)
"""Ids of the other symbols, from which tasks are drawn."""
CONCENTRATION = 0.1
"""Of the Dirichlet distribution of the chain's transitions."""


@dataclass(frozen=True)
class SymbolTasks:
    """Prompts with their answers: `ids` int64 [N, T], of which the last A tokens are the answer.

    Args:
        ids: prompt and answer.
        answer_tokens: A.
    """

    ids: Tensor
    answer_tokens: int

    def correct(self, logits_NTV: Tensor) -> Tensor:
        """Return which answers have every token as the likeliest symbol given those before, bool [N]."""
        choices_S = torch.from_numpy(FREE)
        scores_NAS = logits_NTV[:, -self.answer_tokens - 1 : -1, choices_S]
        return (choices_S[scores_NAS.argmax(-1)] == self.ids[:, -self.answer_tokens :]).all(-1)


@dataclass(frozen=True)
class SymbolLanguage(Sized):
    """Sizes of a small Llama, its training, and the tasks it is measured on.

    Args:
        pairs: pairs of a LookUp task. Default 8.
        demonstrations: reordered words before a Permutation task's last. Default 4.
        word: symbols of a word. Default 3.
        tasks_run: tasks of a kind that a run is measured on, and sequences of the language. Default 500.
        tasks_pilot: the same in a probe. Default 200.
    """

    length: int = 128
    width: int = 64
    depth: int = 2
    steps: int = 1500
    batch: int = 16
    learning_rate: float = 3e-3
    pairs: int = 8
    demonstrations: int = 4
    word: int = 3
    tasks_run: int = 500
    tasks_pilot: int = 200
    MINIATURE: ClassVar = {"length": 32, "width": 16, "depth": 1, "steps": 8, "batch": 4, "tasks_run": 8,
                           "tasks_pilot": 8}  # fmt: skip

    def new(self, seed: int, **changes: Any) -> Checkpoint:
        """Return an untrained Llama that reads the language; `changes` override arguments of `intaglio.new`."""
        tokenizer = word_tokenizer((*SPECIAL, *(f"s{n}" for n in range(SYMBOLS))), pad_token="<pad>", unk_token="<unk>")
        sizes = {"width": self.width, "depth": self.depth, "context": max(self.length, 64), "seed": seed % 2**32}
        return new("llama", **{**sizes, "tokenizer": tokenizer, **changes})

    def recipe(self, seed: int) -> dict[str, Any]:
        """Return the keyword arguments of `intaglio.trainer.train` for this test bed."""
        return pretraining_recipe(self.steps, self.batch, self.learning_rate, seed)

    def training(self, seed: int, steps: int | None = None) -> Segments:
        """Return the sequences of a training; fewer steps have the first of them."""
        count = (self.steps if steps is None else steps) * self.batch
        return Segments.of(self._walks(f"train:{seed}", count))

    def documents(self, part: Part, base: int = 0) -> Windows:
        """Return sequences of a set."""
        ids_NT = self._walks(f"{part}:{base}", self._count(part))
        return Windows(Segments.of(ids_NT), tuple(f"{number:04d}" for number in range(len(ids_NT))))

    def lookup(self, part: Part, base: int = 0) -> SymbolTasks:
        """Return LookUp tasks: pairs of symbols, all different, of which one is asked again."""
        rng, rows = self._draws("lookup", part, base), []
        for _ in range(self._count(part)):
            pairs = rng.permutation(FREE)[: 2 * self.pairs].reshape(self.pairs, 2)
            rows.append([*pairs.flatten().tolist(), *pairs[rng.integers(self.pairs)].tolist()])
        return SymbolTasks(torch.tensor(rows), 1)

    def permutation(self, part: Part, base: int = 0) -> SymbolTasks:
        """Return Permutation tasks: words and their reordering, and a new word to reorder in the same way."""
        rng, rows = self._draws("permutation", part, base), []
        for _ in range(self._count(part)):
            order = rng.permutation(self.word)
            words = [rng.permutation(FREE)[: self.word] for _ in range(self.demonstrations + 1)]
            lines = [[*word.tolist(), ARROW, *word[order].tolist()] for word in words]
            rows.append([token for line in lines for token in (*line, BAR)][:-1])
        return SymbolTasks(torch.tensor(rows), self.word)

    def _walks(self, key: str, count: int) -> Tensor:
        """Return paths of the chain, int64 [N, T]; each follows from the key and its index."""
        uniform_NT = generator(f"symbol language:{key}").random((count, self.length))
        steps_SS = _transitions()
        at_N = (uniform_NT[:, 0] * SYMBOLS).astype(np.int64)
        path = [at_N]
        for uniform_N in uniform_NT.T[1:]:
            at_N = (steps_SS[at_N] < uniform_N[:, None]).sum(1).clip(max=SYMBOLS - 1)
            path.append(at_N)
        return torch.from_numpy(np.stack(path, 1) + len(SPECIAL))

    def _count(self, part: Part) -> int:
        check_part(part)
        return self.tasks_run if part == "evaluation" else self.tasks_pilot

    def _draws(self, kind: str, part: Part, base: int) -> np.random.Generator:
        return generator(f"symbols {kind}:{part}:{base}")


@lru_cache(maxsize=1)
def _transitions() -> np.ndarray:
    """Return the cumulative probabilities of each symbol's successors [S, S]."""
    draws = generator("symbol language")
    return draws.dirichlet(np.full(SYMBOLS, CONCENTRATION), size=SYMBOLS).cumsum(1)
