"""Symbol tasks after training on source code: LookUp and Permutation, with symbols that the code is full of.

    LookUp        a:q\\nX:7\\nk:P\\n ... X:            -> 7
    Permutation   ab3>b3a\\nxQz>Qzx\\n ... k9T>        -> 9Tk

Symbols are the 62 ASCII letters and digits, drawn at random for each task, so nothing but the context gives an answer.

Dimension letters: N tasks, T tokens of a task, A tokens of an answer, S symbols.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from intaglio.evidence.testbeds.source_code import SourceCode
from intaglio.evidence.testbeds.splits import Part, check_part, generator

SYMBOLS = tuple((string.ascii_letters + string.digits).encode())
"""Token ids of the symbols."""
COLON, ARROW, NEWLINE = b":>\n"


@dataclass(frozen=True)
class SymbolTasks:
    """Prompts with their answers: `ids` int64 [N, T], of which the last A tokens are the answer.

    Args:
        ids: prompt and answer.
        answer_tokens: A.
    """

    ids: Tensor
    answer_tokens: int

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(f"{number:04d}" for number in range(len(self.ids)))

    def correct(self, logits_NTV: Tensor) -> Tensor:
        """Return which answers have every token as the likeliest symbol given those before, bool [N]."""
        choices_S = torch.tensor(SYMBOLS)
        scores_NAS = logits_NTV[:, -self.answer_tokens - 1 : -1, choices_S]
        return (choices_S[scores_NAS.argmax(-1)] == self.ids[:, -self.answer_tokens :]).all(-1)


@dataclass(frozen=True)
class SymbolicCode(SourceCode):
    """Source code to train on, and symbol tasks to measure on; tasks of a set follow from the set and its base.

    Args:
        pairs: pairs of a LookUp task. Default 8.
        demonstrations: reordered words before a Permutation task's last. Default 4.
        word: symbols of a word. Default 3.
        tasks_run: tasks of a kind that a run is measured on. Default 500.
        tasks_pilot: the same in a probe. Default 200.
    """

    pairs: int = 8
    demonstrations: int = 4
    word: int = 3
    tasks_run: int = 500
    tasks_pilot: int = 200
    MINIATURE: ClassVar = {**SourceCode.MINIATURE, "tasks_run": 8, "tasks_pilot": 8}

    def lookup(self, part: Part, base: int = 0) -> SymbolTasks:
        """Return LookUp tasks: pairs with distinct keys, one of which is asked again."""
        rng, rows = self._draws("lookup", part, base), []
        for _ in range(self._count(part)):
            keys = rng.permutation(len(SYMBOLS))[: self.pairs]
            values = rng.integers(len(SYMBOLS), size=self.pairs)
            chosen = int(rng.integers(self.pairs))
            pairs = [(SYMBOLS[a], COLON, SYMBOLS[b]) for a, b in zip(keys, values, strict=True)]
            rows.append([token for pair in pairs for token in (*pair, NEWLINE)] + list(pairs[chosen]))
        return SymbolTasks(torch.tensor(rows), 1)

    def permutation(self, part: Part, base: int = 0) -> SymbolTasks:
        """Return Permutation tasks: words and their reordering, and a new word to reorder in the same way."""
        rng, rows = self._draws("permutation", part, base), []
        for _ in range(self._count(part)):
            order = rng.permutation(self.word)
            words = rng.permuted(torch.tensor(SYMBOLS).repeat(self.demonstrations + 1, 1).numpy(), axis=1)
            lines = [[*word[: self.word], ARROW, *word[order]] for word in words]
            rows.append([int(token) for line in lines for token in (*line, NEWLINE)][:-1])
        return SymbolTasks(torch.tensor(rows), self.word)

    def _count(self, part: Part) -> int:
        return self.tasks_run if part == "evaluation" else self.tasks_pilot

    def _draws(self, kind: str, part: Part, base: int) -> np.random.Generator:
        check_part(part)
        return generator(f"symbols {kind}:{part}:{base}")
