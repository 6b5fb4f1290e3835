"""A small log and recommenders that the tests of `bert4rec` and `sasrec` share."""

from __future__ import annotations

import random
from typing import Any

from intaglio.checkpoint import Checkpoint
from intaglio.data.interactions import Interactions
from intaglio.data.item_sequences import ItemSequences
from intaglio.methods.objectives.next_item import new_recommender

CYCLE = 12
"""Items of a cycle: users walk along it from a random start, so the next item is certain."""


def walks(users: int = 40, steps: int = 10, seed: int = 0) -> ItemSequences:
    """Return the sequences of users who walk along a cycle of items."""
    draw = random.Random(seed)
    rows = []
    for user in range(users):
        start = draw.randrange(CYCLE)
        rows += [(f"u{user}", f"i{(start + step) % CYCLE}", float(step)) for step in range(steps)]
    return ItemSequences.from_interactions(Interactions(*zip(*rows, strict=True)))  # type: ignore[arg-type]


def recommender(items: ItemSequences, family: str = "bert", **changes: Any) -> Checkpoint:
    """Return a tiny untrained recommender."""
    return new_recommender(items, family, **{"width": 16, "depth": 1, "context": 8, "dropout": 0.0, **changes})


def sequences(items: ItemSequences) -> list[dict[str, Any]]:
    """Return the training sequences as examples."""
    return [{"input_ids": list(ids)} for ids in items.training().values()]
