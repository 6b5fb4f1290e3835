"""Documents whose lines are all stated twice, so that a line in the middle follows from the text after it.

    n3 v7 ; n0 v2 ; n9 v7 ; ... n0 v2 ; n9 v7 ; n3 v7 ;

Names of a document differ, values are drawn at random, and the second half repeats the lines in another order. A line
of the first half can be filled in from the second half, and from nothing else.

Dimension letters: N documents, T tokens of a document.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.from_scratch import new, word_tokenizer
from intaglio.data.segments import Segments
from intaglio.evidence.testbeds.cached_models import pretraining_recipe
from intaglio.evidence.testbeds.haystack import ROLES
from intaglio.evidence.testbeds.splits import Part, Sized, Windows, check_part, generator

SPECIAL = (*ROLES.values(), ";")
"""The first tokens of the vocabulary, in the order of their ids."""
LINE_END = SPECIAL.index(";")
LINE = 3
"""Tokens of a line."""


@dataclass(frozen=True)
class RepeatedLines(Sized):
    """Sizes of the documents, of a small Llama that reads them, and of its training.

    `holes` are the lines in the middle of the first half.
    """

    lines: int = 3
    names: int = 8
    values: int = 8
    context: int = 64
    width: int = 64
    depth: int = 2
    steps: int = 6000
    batch: int = 32
    learning_rate: float = 3e-3
    documents_run: int = 500
    documents_pilot: int = 200
    MINIATURE: ClassVar = {"width": 16, "depth": 1, "steps": 6, "batch": 4, "documents_run": 16,
                           "documents_pilot": 16}  # fmt: skip

    def new(self, seed: int, **changes: Any) -> Checkpoint:
        """Return an untrained Llama that reads the documents; `changes` override arguments of `intaglio.new`."""
        words = [f"{letter}{n}" for letter, count in (("n", self.names), ("v", self.values)) for n in range(count)]
        sizes = {"width": self.width, "depth": self.depth, "context": self.context, "seed": seed % 2**32}
        return new("llama", **{**sizes, "tokenizer": word_tokenizer((*SPECIAL, *words), **ROLES), **changes})

    def recipe(self, seed: int) -> dict[str, Any]:
        """Return the keyword arguments of `intaglio.trainer.train` for this test bed."""
        return pretraining_recipe(self.steps, self.batch, self.learning_rate, seed)

    def training(self, seed: int, steps: int | None = None) -> Segments:
        """Return the documents of a training; fewer steps have the first of them."""
        return self._drawn(f"train:{seed}", (self.steps if steps is None else steps) * self.batch)

    def documents(self, part: Part, base: int = 0) -> Windows:
        """Return documents of a set."""
        check_part(part)
        count = self.documents_run if part == "evaluation" else self.documents_pilot
        return Windows(self._drawn(f"{part}:{base}", count), tuple(f"{number:04d}" for number in range(count)))

    def holes(self, part: Part, base: int = 0) -> list[tuple[list[int], list[int], list[int]]]:
        """Return the text before a line, the line without its end, and the rest, of every document of a set."""
        start = LINE * (self.lines // 2)
        rows = self.documents(part, base).segments.ids_NT.tolist()
        return [(row[:start], row[start : start + LINE - 1], row[start + LINE - 1 :]) for row in rows]

    def _drawn(self, key: str, count: int) -> Segments:
        # A row of numbers for each document, so that fewer documents are the first of more.
        uniform = generator(f"repeated lines:{key}").random((count, self.names + 2 * self.lines))
        names, values, order = np.split(uniform, (self.names, self.names + self.lines), 1)
        names_NL = np.argsort(names)[:, : self.lines]
        values_NL = self.names + (values * self.values).astype(np.int64)
        lines_NL3 = np.stack([names_NL, values_NL, np.full_like(names_NL, LINE_END - len(SPECIAL))], -1) + len(SPECIAL)
        again_NL3 = np.take_along_axis(lines_NL3, np.argsort(order)[..., None], 1)
        return Segments.of(torch.from_numpy(np.concatenate([lines_NL3, again_NL3], 1).reshape(count, -1)))
