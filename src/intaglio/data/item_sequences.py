"""Item sequences for recommenders: users' interactions in order of time, as ids, the last two held out.

Ids: 0 is padding, items have 1 to N by descending frequency in training, N + 1 is the mask token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from intaglio.data.interactions import Interactions
from intaglio.errors import IntaglioError

PAD = 0
"""The id of padding."""
LEAST = 5
"""Default least number of interactions of a user and of an item."""
HELD_OUT: Final = 2
"""Interactions at the end of a sequence that are never trained on by default: validation and test."""


@dataclass(frozen=True)
class Question:
    """A history of item ids in the order of time, and the item that follows it."""

    user: str
    history: tuple[int, ...]
    target: int


@dataclass(frozen=True)
class ItemSequences:
    """Item ids of each user in the order of time, held-out items included, and training interactions of each item."""

    sequences: Mapping[str, tuple[int, ...]]
    names: tuple[str, ...]
    titles: tuple[str, ...]
    counts: tuple[int, ...]
    digest: str

    @classmethod
    def from_interactions(cls, interactions: Interactions, least: int = LEAST, name: str = "the log") -> ItemSequences:
        """Prepare a log: repeated items of a user count once, and rare users and items are dropped.

        Args:
            interactions: users, items and times.
            least: users and items with fewer interactions are dropped until none is left. Default 5.
            name: of the log, for error messages.

        Returns:
            The sequences; equally frequent items are ordered by name.

        Raises:
            IntaglioError: every user has one interaction, or nothing is left.
        """
        by_user = interactions.by_user()
        if by_user and all(len(set(items)) == 1 for items in by_user.values()):
            raise IntaglioError(
                f"{name} has one item a user, so nothing follows it; a user needs {HELD_OUT + 1} or more"
            )
        sequences = dense(by_user, max(least, HELD_OUT + 1))
        if not sequences:
            raise IntaglioError(f"{name} has no users and items with {least} interactions each; nothing is left")
        learned = Counter(item for items in sequences.values() for item in items[:-HELD_OUT])
        everything = {item for items in sequences.values() for item in items}
        # Equally frequent items by name, shorter first so that numbers are in their order.
        ordered = sorted(everything, key=lambda item: (-learned[item], len(item), item))
        return cls._numbered(sequences, ordered, learned, interactions)

    @classmethod
    def with_vocabulary(
        cls, interactions: Interactions, names: tuple[str, ...], least: int = LEAST, name: str = "the log"
    ) -> ItemSequences:
        """Prepare a log for a model that has an item vocabulary; `names` are its items in the order of their ids.

        Raises:
            IntaglioError: as `from_interactions`, or the log has an item that the model does not know.
        """
        own = cls.from_interactions(interactions, least, name)
        unknown = set(own.names[1:]) - set(names)
        if unknown:
            raise IntaglioError(
                f"{name} has {len(unknown)} items that the model does not know, such as {min(unknown)!r}; train a new"
                " model, or leave them out"
            )
        sequences = {user: tuple(own.names[item] for item in items) for user, items in own.sequences.items()}
        learned = Counter(dict(zip(own.names[1:], own.counts[1:], strict=True)))
        return cls._numbered(sequences, list(names), learned, interactions)

    @classmethod
    def _numbered(
        cls,
        sequences: Mapping[str, tuple[str, ...]],
        ordered: list[str],
        learned: Counter[str],
        interactions: Interactions,
    ) -> ItemSequences:
        ids = {item: index for index, item in enumerate(ordered, 1)}
        return cls(
            sequences={user: tuple(ids[item] for item in items) for user, items in sequences.items()},
            names=("", *ordered),
            titles=("", *(interactions.titles.get(item, "") for item in ordered)),
            counts=(0, *(learned[item] for item in ordered)),
            digest=interactions.digest,
        )

    @property
    def items(self) -> int:
        """Number of items."""
        return len(self.names) - 1

    @property
    def mask(self) -> int:
        """The id of the mask token."""
        return len(self.names)

    @property
    def vocabulary(self) -> int:
        """Rows that an embedding table needs: padding, items, mask."""
        return len(self.names) + 1

    def training(self, held_out: int = HELD_OUT) -> dict[str, tuple[int, ...]]:
        """Return the items of each user without the last ones: 2 (validation and test), 1 (test) or 0."""
        return {user: items[: len(items) - held_out] for user, items in self.sequences.items()}

    def validation(self) -> tuple[Question, ...]:
        """Return every user's last item but one, with what came before it."""
        return tuple(Question(user, items[:-2], items[-2]) for user, items in self.sequences.items())

    def test(self) -> tuple[Question, ...]:
        """Return every user's last item, with what came before it."""
        return tuple(Question(user, items[:-1], items[-1]) for user, items in self.sequences.items())


def dense(sequences: Mapping[str, tuple[str, ...]], least: int) -> dict[str, tuple[str, ...]]:
    """Return the largest part where every user and item has that many interactions; repeated items count once."""
    current = {user: tuple(dict.fromkeys(items)) for user, items in sequences.items()}
    while True:
        counts = Counter(item for items in current.values() for item in items)
        kept = {user: tuple(item for item in items if counts[item] >= least) for user, items in current.items()}
        kept = {user: items for user, items in kept.items() if len(items) >= least}
        if kept == current:
            return current
        current = kept
