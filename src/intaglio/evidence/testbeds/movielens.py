"""MovieLens-100K as sequences: the films that each user watched, in order of time, the last two held out.

As in BERT4Rec and RecBole: every rating counts as an interaction whatever its stars; items and users with fewer than
five are dropped until none is left; each user's last item is the test, the one before it the validation. All users are
trained on; their tests are split by the user's hash.

Dimension letters: N users, T items of a history.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from intaglio.data.interactions import Catalogue, load_interactions
from intaglio.evidence.testbeds.splits import Bounds, Part, check_part, draw, part_of

BOUNDS: Bounds = {"pilot": (0, 200), "evaluation": (200, 1000)}
"""Split of the users' tests; the validation items are those of all users."""


@dataclass(frozen=True)
class Question:
    """A history of item ids in the order of time, and the item that follows it."""

    user: str
    history: tuple[int, ...]
    target: int


@dataclass(frozen=True)
class MovieLens:
    """MovieLens or a directory of the same form, where all users and items have `least` interactions."""

    source: str = "movielens"
    least: int = 5
    users_run: int = 600
    users_pilot: int = 150

    def load(self) -> Catalogue:
        """Return the prepared data, one shared object a process; ids are contiguous, more frequent items first."""
        return _prepared(self.source, self.least)

    def training(self, with_validation: bool = False) -> dict[str, tuple[int, ...]]:
        """Return the items of each user in order of time, without the test item and by default the validation item."""
        held_out = 1 if with_validation else 2
        return {user: items[:-held_out] for user, items in self.load().sequences.items()}

    def questions(self, part: Part, base: int = 0) -> tuple[Question, ...]:
        """Return the questions of a set: every user's last item but one (`validation`), or some users' last item."""
        sequences = self.load().sequences
        if part == "validation":
            return tuple(Question(user, items[:-2], items[-2]) for user, items in sequences.items())
        check_part(part, BOUNDS)
        users = [user for user in sequences if part_of(f"user {user}", BOUNDS) == part]
        count = self.users_pilot if part == "pilot" else self.users_run
        chosen = [users[index] for index in draw(f"movielens {part}:{base}", users, count, f"{part} users")]
        return tuple(Question(user, sequences[user][:-1], sequences[user][-1]) for user in chosen)


@lru_cache(maxsize=4)
def _prepared(source: str, least: int) -> Catalogue:
    return Catalogue.from_interactions(load_interactions(source), least, f"the interactions {source!r}")
