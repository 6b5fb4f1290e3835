"""A language of facts, most stated in both orders and some in one: what a model recalls in the order it never read.

    <s> f0 a7 b3 is c1 d9 </s>        a name (a7 b3) before its description (c1 d9), in one of three wordings
    <s> r2 c1 d9 is a7 b3 </s>        the other order

Names and descriptions are two tokens that many facts share, so that no token gives a fact away. The facts of a unit
follow from its seed.

Dimension letters: N documents, Q questions, T tokens of a document, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.from_scratch import new, word_tokenizer
from intaglio.data.segments import Segments
from intaglio.errors import IntaglioError
from intaglio.evidence.testbeds.cached_models import pretraining_recipe
from intaglio.evidence.testbeds.haystack import BOS, EOS, ROLES
from intaglio.evidence.testbeds.splits import Sized, generator

SPECIAL = (*ROLES.values(), "is")
"""The first tokens of the vocabulary, in the order of their ids."""
IS = SPECIAL.index("is")
WORDINGS = 3
"""Of each order."""
ANSWER = slice(5, 7)
"""Places of the answer in a document."""

Fact = tuple[int, int, int, int]
"""Two tokens of the name and two of the description, as numbers of symbols."""


@dataclass(frozen=True)
class TwoWayFacts(Sized):
    """Sizes of the language, of a Llama that reads it, and of its training."""

    symbols: int = 60
    both: int = 300
    forward_only: int = 60
    width: int = 128
    depth: int = 4
    steps: int = 1500
    batch: int = 64
    learning_rate: float = 1e-3
    MINIATURE: ClassVar = {"symbols": 8, "both": 12, "forward_only": 6, "width": 16, "depth": 1, "steps": 6, "batch": 8}

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The tokens by id: specials, wordings, then the symbols of the four places."""
        wordings = [f"{letter}{number}" for letter in "fr" for number in range(WORDINGS)]
        return (*SPECIAL, *wordings, *(f"{letter}{i}" for letter in "abcd" for i in range(self.symbols)))

    def new(self, seed: int, **changes: Any) -> Checkpoint:
        """Return an untrained Llama that reads the language; `changes` override arguments of `intaglio.new`."""
        sizes = {"width": self.width, "depth": self.depth, "context": 16, "seed": seed % 2**32}
        return new("llama", **{**sizes, "tokenizer": word_tokenizer(self.vocabulary, **ROLES), **changes})

    def recipe(self, seed: int) -> dict[str, Any]:
        """Return the keyword arguments of `intaglio.trainer.train` for this test bed."""
        return pretraining_recipe(self.steps, self.batch, self.learning_rate, seed)

    def facts(self, seed: int) -> tuple[list[Fact], list[Fact]]:
        """Return the facts of a seed that are stated in both orders, and those stated in one."""
        count = self.both + self.forward_only
        if count > self.symbols**2:
            raise IntaglioError(f"{count} facts are wanted; {self.symbols} symbols give {self.symbols**2} names")
        draws = generator(f"two-way facts:{seed}")
        names, descriptions = (draws.permutation(self.symbols**2)[:count].tolist() for _ in range(2))
        pairs = zip(names, descriptions, strict=True)
        facts = [(*divmod(name, self.symbols), *divmod(description, self.symbols)) for name, description in pairs]
        return facts[: self.both], facts[self.both :]

    def training(self, seed: int, steps: int | None = None) -> Segments:
        """Return the documents of a training: every document once, in random order, again and again."""
        both, forward_only = self.facts(seed)
        pool = [self.document(fact, wording, False) for fact in (*both, *forward_only) for wording in range(WORDINGS)]
        pool += [self.document(fact, wording, True) for fact in both for wording in range(WORDINGS)]
        count, draws = (self.steps if steps is None else steps) * self.batch, generator(f"two-way facts order:{seed}")
        order: list[int] = []
        while len(order) < count:
            order += draws.permutation(len(pool)).tolist()
        return Segments.of(torch.tensor([pool[index] for index in order[:count]]))

    def document(self, fact: Fact, wording: int, reverse: bool) -> list[int]:
        """Return a fact in one of the wordings of an order."""
        first = len(SPECIAL) + 2 * WORDINGS
        ids = [first + place * self.symbols + symbol for place, symbol in enumerate(fact)]
        halves = (ids[2:], ids[:2]) if reverse else (ids[:2], ids[2:])
        return [BOS, len(SPECIAL) + WORDINGS * reverse + wording, *halves[0], IS, *halves[1], EOS]

    def questions(self, facts: Sequence[Fact], reverse: bool) -> Tensor:
        """Return documents that ask for the second half of facts, int64 [Q, T], in every wording."""
        return torch.tensor([self.document(fact, wording, reverse) for fact in facts for wording in range(WORDINGS)])


@torch.no_grad()
def recalled(model: nn.Module, questions_QT: Tensor) -> tuple[Tensor, Tensor]:
    """Return which questions greedy decoding answers exactly, bool [Q], and the answers' log-probabilities [Q]."""
    device = next(model.parameters()).device
    logits_QTV = model(input_ids=questions_QT.to(device)).logits[:, ANSWER.start - 1 : ANSWER.stop - 1].float().cpu()
    answers_QA = questions_QT[:, ANSWER]
    scores_QA = logits_QTV.log_softmax(-1).gather(2, answers_QA[..., None])[..., 0]
    return (logits_QTV.argmax(-1) == answers_QA).all(-1), scores_QA.sum(-1)
