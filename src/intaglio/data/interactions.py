"""Who did what when: tables of interactions between users and items, as the bundled `movielens` has them.

The form is RecBole's: tab-separated, UTF-8, a first line of `name:type`. `*.inter` has at least `user_id`, `item_id`
and `timestamp`; `*.item`, which may be absent, has `item_id` and texts about it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from intaglio.data import assets
from intaglio.errors import IntaglioError, shorten

_TITLES = ("movie_title", "title", "item_name", "name")


@dataclass(frozen=True)
class Interactions:
    """Interactions in the order of the file.

    Args:
        users: name of each interaction's user.
        items: name of each interaction's item.
        times: seconds since 1970.
        titles: `{item: text}`; empty where the data have none.
    """

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
        """Each user's items in the order of time; at equal times, in the order of the file.

        Users are in the order in which they first appear.
        """
        rows: dict[str, list[tuple[float, int, str]]] = {}
        for place, (user, item, time) in enumerate(zip(self.users, self.items, self.times, strict=True)):
            rows.setdefault(user, []).append((time, place, item))
        return {user: tuple(item for *_, item in sorted(row)) for user, row in rows.items()}


def load_interactions(source: str | os.PathLike[str]) -> Interactions:
    """Read a directory of interactions.

    Args:
        source: a bundled name (`movielens`; see `intaglio assets`), or a directory with one `*.inter` file and, with
            titles, one `*.item` file.

    Raises:
        IntaglioError: the asset has not been fetched, the directory or a column is missing, or a line is malformed.
    """
    name = os.fspath(source)
    bundled = any(asset.name == name and asset.kind == "interactions" for asset in assets.ASSETS.values())
    folder = assets.path(name) if bundled else Path(name).expanduser()
    if not folder.is_dir():
        raise IntaglioError(f"the interactions {shorten(name)!r} are no bundled name and no directory")
    inter, item = _only(folder, "*.inter"), _only(folder, "*.item")
    if inter is None:
        raise IntaglioError(f"{folder} has no interactions: one file *.inter is needed")
    columns = _table(inter, ("user_id", "item_id", "timestamp"))
    times = tuple(_number(inter, line, text) for line, text in enumerate(columns["timestamp"], 2))
    titles: dict[str, str] = {}
    if item is not None:
        about = _table(item, ("item_id",))
        title = next((about[column] for column in _TITLES if column in about), ())
        titles = dict(zip(about["item_id"], title, strict=False))
    return Interactions(tuple(columns["user_id"]), tuple(columns["item_id"]), times, titles)


def _only(folder: Path, pattern: str) -> Path | None:
    found = sorted(folder.glob(pattern))
    if len(found) > 1:
        raise IntaglioError(f"{folder} has {len(found)} files {pattern}; one is accepted")
    return found[0] if found else None


def _table(path: Path, needed: Sequence[str]) -> dict[str, list[str]]:
    """The columns by name."""
    try:
        # Not splitlines(): it also cuts at separators that a title may hold.
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
