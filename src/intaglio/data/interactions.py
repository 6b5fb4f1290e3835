"""Interactions of users with items over time, from a CSV file or in RecBole's format.

A CSV file (`.tsv`: tab-separated) has the columns user, item and time, or user_id, item_id and timestamp, and perhaps
the item's title. A directory has RecBole's tables: tab-separated UTF-8 with a header of `name:type`. `*.inter` has at
least `user_id`, `item_id` and `timestamp`; the optional `*.item` has `item_id` and texts.
"""

from __future__ import annotations

import csv
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from intaglio.data import assets
from intaglio.errors import IntaglioError, shorten

_TITLES = ("movie_title", "title", "item_name", "name")
_COLUMNS = {"user_id": ("user", "userid"), "item_id": ("item", "itemid"), "timestamp": ("time",)}
"""Other names of the needed columns, in lower case."""


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


def load_interactions(source: str | os.PathLike[str]) -> Interactions:
    """Read interactions.

    Args:
        source: a bundled name, a CSV or TSV file, or a directory in RecBole's format.

    Returns:
        The interactions in the order of the file.

    Raises:
        IntaglioError: there is no such file, a column is missing, or a row is malformed.
    """
    name = os.fspath(source)
    bundled = any(asset.name == name and asset.kind == "interactions" for asset in assets.ASSETS.values())
    path = assets.path(name) if bundled else Path(name).expanduser()
    if path.is_file():
        columns = _csv(path, ("user_id", "item_id", "timestamp"))
        return _interactions(path, columns, columns)
    if not path.is_dir():
        raise IntaglioError(f"the interactions {shorten(name)!r} are neither a bundled name nor a file or directory")
    inter, item = _only(path, "*.inter"), _only(path, "*.item")
    if inter is None:
        raise IntaglioError(f"{path} has no interactions: one file *.inter is needed")
    columns = _table(inter, ("user_id", "item_id", "timestamp"))
    return _interactions(inter, columns, {} if item is None else _table(item, ("item_id",)))


def _interactions(path: Path, columns: Mapping[str, list[str]], items: Mapping[str, list[str]]) -> Interactions:
    times = tuple(_time(path, line, text) for line, text in enumerate(columns["timestamp"], 2))
    title = next((items[column] for column in _TITLES if column in items), ())
    titles = dict(zip(items.get("item_id", ()), title, strict=False))
    return Interactions(tuple(columns["user_id"]), tuple(columns["item_id"]), times, titles)


def _only(folder: Path, pattern: str) -> Path | None:
    files = sorted(folder.glob(pattern))
    if len(files) > 1:
        raise IntaglioError(f"{folder} has {len(files)} files {pattern}; one is accepted")
    return files[0] if files else None


def _lines(path: Path) -> list[str]:
    try:
        # Not splitlines(): it also splits at separators that a title may contain.
        return path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    except OSError as error:
        raise IntaglioError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise IntaglioError(f"{path} is not UTF-8 (byte offset {error.start})") from None


def _csv(path: Path, needed: Sequence[str]) -> dict[str, list[str]]:
    """Return the columns of a CSV or TSV file by name."""
    text = [f"{line}\n" for line in _lines(path)]
    try:
        rows = list(csv.reader(text, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True))
    except csv.Error as error:
        raise IntaglioError(f"{path} is not a CSV file: {error}") from None
    names = [_column_name(name) for name in rows[0]]
    return _columns(path, names, [row for row in rows[1:] if row], needed)


def _column_name(given: str) -> str:
    name = given.strip().lower()
    return next((column for column, others in _COLUMNS.items() if name in others), name)


def _table(path: Path, needed: Sequence[str]) -> dict[str, list[str]]:
    """Return the columns of one of RecBole's tables by name."""
    header, *lines = _lines(path)
    names = [name.partition(":")[0] for name in header.split("\t")]
    return _columns(path, names, [line.split("\t") for line in lines], needed)


def _columns(path: Path, names: list[str], rows: list[list[str]], needed: Sequence[str]) -> dict[str, list[str]]:
    missing = [name for name in needed if name not in names]
    if missing:
        raise IntaglioError(f"{path} has no column {missing[0]!r}; it has: {shorten(', '.join(names)) or 'nothing'}")
    for number, row in enumerate(rows, 2):
        if len(row) != len(names):
            raise IntaglioError(f"line {number} of {path} has {len(row)} columns; {len(names)} are named at the top")
        for column in needed:
            if not row[names.index(column)].strip():
                raise IntaglioError(f"line {number} of {path} has no {column}; a value is needed")
    return {name: [row[column] for row in rows] for column, name in enumerate(names)}


def _time(path: Path, line: int, text: str) -> float:
    """Return seconds since 1970, from a number or an ISO 8601 date."""
    try:
        seconds = float(text)
    except ValueError:
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            raise IntaglioError(
                f"line {line} of {path} has the timestamp {shorten(text)!r}; a number or a date such as 2024-01-31 is"
                " needed"
            ) from None
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if not math.isfinite(seconds):
        raise IntaglioError(f"line {line} of {path} has the timestamp {shorten(text)!r}; a finite number is needed")
    return seconds
