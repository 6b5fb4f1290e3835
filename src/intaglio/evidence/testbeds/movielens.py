"""MovieLens-100K as sequences: the films that each user watched, in order of time, the last two held out.

As in BERT4Rec and RecBole: every rating counts as an interaction whatever its stars; items and users with fewer than
five are dropped until none is left; each user's last item is the test, the one before it the validation. All users are
trained on; their tests are split by the user's hash.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from intaglio.checkpoint import Checkpoint
from intaglio.data.interactions import Interactions, load_interactions
from intaglio.data.item_sequences import ItemSequences, Question
from intaglio.evidence.testbeds.splits import Bounds, Part, Sized, check_part, draw, generator, part_of
from intaglio.methods.objectives.next_item import new_recommender

CYCLE = "cycle"
"""Source of the miniature: users who walk along a cycle of items, with a jump now and then."""

BOUNDS: Bounds = {"pilot": (0, 200), "evaluation": (200, 1000)}
"""Split of the users' tests; the validation items are those of all users."""


@dataclass(frozen=True)
class MovieLens(Sized):
    """MovieLens or another log where all users and items have `least` interactions, and the size of a recommender."""

    source: str = "movielens"
    least: int = 5
    users_run: int = 600
    users_pilot: int = 150
    width: int = 64
    depth: int = 2
    heads: int = 2
    context: int = 50
    dropout: float = 0.2
    steps: int = 500
    batch: int = 64
    learning_rate: float = 1e-3
    MINIATURE: ClassVar = {"source": CYCLE, "users_run": 8, "users_pilot": 4, "width": 16, "depth": 1, "context": 8,
                           "dropout": 0.0, "steps": 4, "batch": 8}  # fmt: skip

    def new(self, seed: int, family: str = "bert", **changes: Any) -> Checkpoint:
        """Return an untrained recommender; `changes` override arguments of `new_recommender`."""
        sizes = self.settings("width", "depth", "heads", "context", "dropout")
        return new_recommender(self.load(), family, seed=seed % 2**32, **{**sizes, **changes})

    def recipe(self, seed: int) -> dict[str, Any]:
        """Return the keyword arguments of `intaglio.trainer.train` for this test bed."""
        return {"steps": self.steps, "batch_size": self.batch, "learning_rate": self.learning_rate, "warmup": 0.1,
                "seed": seed % 2**32}  # fmt: skip

    def load(self) -> ItemSequences:
        """Return the prepared data, one shared object a process; ids are contiguous, more frequent items first."""
        return _prepared(self.source, self.least)

    def training(self, with_validation: bool = False) -> dict[str, tuple[int, ...]]:
        """Return the items of each user in order of time, without the test item and by default the validation item."""
        return self.load().training(1 if with_validation else 2)

    def questions(self, part: Part, base: int = 0) -> tuple[Question, ...]:
        """Return the questions of a set: every user's last item but one (`validation`), or some users' last item."""
        if part == "validation":
            return self.load().validation()
        check_part(part, BOUNDS)
        tests = {question.user: question for question in self.load().test()}
        users = [user for user in tests if part_of(f"user {user}", BOUNDS) == part]
        count = self.users_pilot if part == "pilot" else self.users_run
        return tuple(tests[users[i]] for i in draw(f"movielens {part}:{base}", users, count, f"{part} users"))


@lru_cache(maxsize=4)
def _prepared(source: str, least: int) -> ItemSequences:
    log = _cycle() if source == CYCLE else load_interactions(source)
    return ItemSequences.from_interactions(log, least, f"the interactions {source!r}")


def _cycle(users: int = 60, items: int = 24, steps: int = 10) -> Interactions:
    draws = generator(CYCLE)
    rows: list[tuple[str, str, float]] = []
    for user in range(users):
        item = int(draws.integers(items))
        for step in range(steps):
            rows.append((f"u{user}", f"i{item}", float(step)))
            item = (item + (1 if draws.random() < 0.8 else int(draws.integers(items)))) % items
    names, walked, times = zip(*rows, strict=True)
    return Interactions(names, walked, times)
