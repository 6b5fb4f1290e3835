"""Interactions of users with items over time, in RecBole's format.

Tables are tab-separated UTF-8 with a header of `name:type`. `*.inter` has at least `user_id`, `item_id` and
`timestamp`; the optional `*.item` has `item_id` and texts.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from intaglio.data import assets
from intaglio.errors import IntaglioError, shorten

PAD = 0
"""The id of padding in a `Catalogue`."""
_TITLES = ("movie_title", "title", "item_name", "name")


@dataclass(frozen=True)
class Interactions:
    """Users, items and times (seconds since 1970) in the order of the file, and the items' titles, if any."""

    users: tuple[str, ...]
    items: tuple[str, ...]
    times: tuple[float, ...]
    titles: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over interactions and titles in their order."""
        total = hashlib.sha256()
        for row in zip(self.users, self.items, self.times, strict=True):
            total.update(repr(row).encode())
        total.update(repr(sorted(self.titles.items())).encode())
        return total.hexdigest()

    def by_user(self) -> dict[str, tuple[str, ...]]:
        """Return each user's items by time, ties in the order of the file; users in order of first appearance."""
        rows: dict[str, list[tuple[float, int, str]]] = {}
        for index, (user, item, time) in enumerate(zip(self.users, self.items, self.times, strict=True)):
            rows.setdefault(user, []).append((time, index, item))
        return {user: tuple(item for *_, item in sorted(row)) for user, row in rows.items()}


@dataclass(frozen=True)
class Catalogue:
    """Item ids of each user in the order of time, held-out items included, and training interactions of each item.

    Id 0 is padding, items have 1 to `items`, the mask token `items + 1`.
    """

    sequences: Mapping[str, tuple[int, ...]]
    names: tuple[str, ...]
    titles: tuple[str, ...]
    counts: tuple[int, ...]
    digest: str

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

    @classmethod
    def from_interactions(cls, interactions: Interactions, least: int, name: str = "the interactions") -> Catalogue:
        """Return the largest part where all users and items have `least` interactions; frequent items come first.

        The last two items of each user, test and validation, do not count for the order.

        Raises:
            IntaglioError: nothing is left.
        """
        sequences = dense(interactions.by_user(), least)
        if not sequences:
            raise IntaglioError(f"{name} have no users and items with {least} interactions each; nothing is left")
        learned = Counter(item for items in sequences.values() for item in items[:-2])
        everything = {item for items in sequences.values() for item in items}
        # Equally frequent items by name, shorter first so that numbers are in their order.
        ordered = sorted(everything, key=lambda item: (-learned[item], len(item), item))
        ids = {item: index for index, item in enumerate(ordered, 1)}
        return cls(
            sequences={user: tuple(ids[item] for item in items) for user, items in sequences.items()},
            names=("", *ordered),
            titles=("", *(interactions.titles.get(item, "") for item in ordered)),
            counts=(0, *(learned[item] for item in ordered)),
            digest=interactions.digest,
        )


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


def load_interactions(source: str | os.PathLike[str]) -> Interactions:
    """Read a directory of interactions."""
    name = os.fspath(source)
    bundled = any(asset.name == name and asset.kind == "interactions" for asset in assets.ASSETS.values())
    folder = assets.path(name) if bundled else Path(name).expanduser()
    if not folder.is_dir():
        raise IntaglioError(f"the interactions {shorten(name)!r} are neither a bundled name nor a directory")
    inter, item = _only(folder, "*.inter"), _only(folder, "*.item")
    if inter is None:
        raise IntaglioError(f"{folder} has no interactions: one file *.inter is needed")
    columns = _table(inter, ("user_id", "item_id", "timestamp"))
    times = tuple(_number(inter, line, text) for line, text in enumerate(columns["timestamp"], 2))
    titles: dict[str, str] = {}
    if item is not None:
        table = _table(item, ("item_id",))
        title = next((table[column] for column in _TITLES if column in table), ())
        titles = dict(zip(table["item_id"], title, strict=False))
    return Interactions(tuple(columns["user_id"]), tuple(columns["item_id"]), times, titles)


def _only(folder: Path, pattern: str) -> Path | None:
    files = sorted(folder.glob(pattern))
    if len(files) > 1:
        raise IntaglioError(f"{folder} has {len(files)} files {pattern}; one is accepted")
    return files[0] if files else None


def _table(path: Path, needed: Sequence[str]) -> dict[str, list[str]]:
    """Return the columns by name."""
    try:
        # Not splitlines(): it also splits at separators that a title may contain.
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except OSError as error:
        raise IntaglioError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise IntaglioError(f"{path} is not UTF-8 (byte offset {error.start})") from None
    names = [name.partition(":")[0] for name in lines[0].split("\t")]
    missing = [name for name in needed if name not in names]
    if missing:
        raise IntaglioError(f"{path} has no column {missing[0]!r}; it has: {shorten(', '.join(names)) or 'nothing'}")
    columns: list[list[str]] = [[] for _ in names]
    for number, line in enumerate(lines[1:], 2):
        cells = line.split("\t")
        if len(cells) != len(names):
            raise IntaglioError(f"line {number} of {path} has {len(cells)} columns; {len(names)} are named at the top")
        for column, cell in zip(columns, cells, strict=True):
            column.append(cell)
    return dict(zip(names, columns, strict=True))


def _number(path: Path, line: int, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise IntaglioError(f"line {line} of {path} has the timestamp {shorten(text)!r}; a number is needed") from None
