"""MovieLens-100K as sequences: what each user watched, in order of time, with the last two films held out.

As in BERT4Rec and RecBole: every rating counts as an interaction whatever its stars; items and users with fewer than
five are dropped until none is left; the last item of each user is the test, the one before it the validation. Users
are sealed by their hash for the tests: all of them are learned from, and each is a test of pilots or of runs, not of
both.

Dimension letters: N users, T items of a history.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from intaglio.data.interactions import load_interactions
from intaglio.errors import IntaglioError
from intaglio.evidence.experiment import Stage
from intaglio.evidence.worlds.sealing import MEASURED, Bounds, draw, part_of

PAD = 0
"""The id of padding; items have 1 to `items`, the mask token `items + 1`."""
BOUNDS: Bounds = {"pilot": (0, 200), "evaluation": (200, 1000)}
"""Which remainders of a user's hash are tested in which stage; the validation items are those of all users."""
FEWEST = 3
"""Items that a user needs: one to learn from, one to choose settings on, one for the test."""


@dataclass(frozen=True)
class Question:
    """Which item comes next for a user?

    Args:
        user: their name in the data.
        history: ids of what they watched before, in the order of time.
        target: the id of what they watched then; never in the history.
    """

    user: str
    history: tuple[int, ...]
    target: int


@dataclass(frozen=True)
class Catalogue:
    """The prepared data.

    Args:
        sequences: `{user: item ids in the order of time}`, all of them: the last two are held out.
        names: of the items in the data, by id; names[0] is padding.
        titles: of the items, by id; "" where there is none.
        counts: how often each item was watched in what is learned from (without the held-out items), by id.
        digest: of the data that it was made from.
    """

    sequences: Mapping[str, tuple[int, ...]]
    names: tuple[str, ...]
    titles: tuple[str, ...]
    counts: tuple[int, ...]
    digest: str

    @property
    def items(self) -> int:
        """How many there are."""
        return len(self.names) - 1

    @property
    def mask(self) -> int:
        """The id of the mask token."""
        return len(self.names)

    @property
    def vocabulary(self) -> int:
        """Rows that an embedding table needs: padding, items, mask."""
        return len(self.names) + 1


@dataclass(frozen=True)
class MovieLens:
    """The world: what is dropped, and how much is measured on.

    Args:
        source: the bundled `movielens`, or a directory of the same form. Default `movielens`.
        least: interactions that every user and every item has. Default 5.
        users_run: users of a run's test. Default 600 of about 750.
        users_pilot: of the pilot's. Default 150 of about 190.
    """

    source: str = "movielens"
    least: int = 5
    users_run: int = 600
    users_pilot: int = 150

    @property
    def digest(self) -> str:
        """SHA-256 of the data."""
        return self.load().digest

    def load(self) -> Catalogue:
        """The prepared data, one object a process.

        Ids are contiguous, more frequent items first (as counted in what is learned from).

        Raises:
            IntaglioError: the asset has not been fetched (`intaglio assets`), the data are malformed, or nothing is
                left of them.
        """
        if self.least < FEWEST:
            raise IntaglioError(f"least is {self.least}; at least {FEWEST} is accepted, because two items are held out")
        return _prepared(self.source, self.least)

    def training(self, with_validation: bool = False) -> dict[str, tuple[int, ...]]:
        """What is learned from: `{user: item ids in the order of time}`, less the held-out items.

        Args:
            with_validation: also learn from the validation items, as BERT4Rec's last fit does; only once every setting
                has been chosen. Default False.
        """
        held_out = 1 if with_validation else 2
        return {user: items[:-held_out] for user, items in self.load().sequences.items()}

    def validation(self) -> tuple[Question, ...]:
        """Every user's last item but one, after what they are learned from."""
        return tuple(Question(user, items[:-2], items[-2]) for user, items in self.load().sequences.items())

    def questions(self, stage: Stage, base: int = 0) -> tuple[Question, ...]:
        """What every run of a stage is measured on: the last item of some users, after all of the others; while tuning,
        the questions of `validation`.

        Args:
            stage: pilots have users of their own.
            base: another seed base gives other users of the set.

        Raises:
            IntaglioError: there are fewer users than are asked for.
        """
        if stage == "tuning":
            return self.validation()
        sequences = self.load().sequences
        part = MEASURED[stage]
        users = [user for user in sequences if part_of(f"user {user}", BOUNDS) == part]
        count = self.users_pilot if stage == "pilot" else self.users_run
        chosen = [users[place] for place in draw(f"movielens {part}:{base}", users, count, f"{part} users")]
        return tuple(Question(user, sequences[user][:-1], sequences[user][-1]) for user in chosen)


@lru_cache(maxsize=4)
def _prepared(source: str, least: int) -> Catalogue:
    found = load_interactions(source)
    sequences = _dense(found.by_user(), least)
    if not sequences:
        raise IntaglioError(
            f"the interactions {source!r} have no users and items with {least} interactions each; nothing is left"
        )
    learned = Counter(item for items in sequences.values() for item in items[:-2])
    everything = {item for items in sequences.values() for item in items}
    # The name decides between equally frequent ones, shorter first so that numbers are in their order.
    ordered = sorted(everything, key=lambda item: (-learned[item], len(item), item))
    ids = {item: place for place, item in enumerate(ordered, 1)}
    return Catalogue(
        sequences={user: tuple(ids[item] for item in items) for user, items in sequences.items()},
        names=("", *ordered),
        titles=("", *(found.titles.get(item, "") for item in ordered)),
        counts=(0, *(learned[item] for item in ordered)),
        digest=found.digest,
    )


def _dense(sequences: Mapping[str, tuple[str, ...]], least: int) -> dict[str, tuple[str, ...]]:
    """The largest part in which every user and every item has that many interactions; a repeated item counts once."""
    current = {user: tuple(dict.fromkeys(items)) for user, items in sequences.items()}
    while True:
        counts = Counter(item for items in current.values() for item in items)
        kept = {user: tuple(item for item in items if counts[item] >= least) for user, items in current.items()}
        kept = {user: items for user, items in kept.items() if len(items) >= least}
        if kept == current:
            return current
        current = kept
