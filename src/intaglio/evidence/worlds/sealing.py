"""What keeps a world's sets apart and its draws repeatable: everything follows from hashes, nothing from positions.

A set is a range of remainders: a name (a hash, or anything that says which example it is) belongs to the set in whose
range its SHA-256 modulo 1000 lies. Draws are ordered by the hash of "key:name": the order of two examples does not
depend on which others there are, and fewer are the first ones of more.

Dimension letters: N documents, T tokens of a window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from intaglio.data.segments import Segments
from intaglio.errors import IntaglioError, did_you_mean
from intaglio.evidence.experiment import Stage

Part = Literal["train", "validation", "pilot", "evaluation"]
"""Four sets that share nothing: what methods learn from, what their settings are chosen on, what pilots are measured
on, what runs are measured on."""
MEASURED: Mapping[Stage, Part] = {"tuning": "validation", "pilot": "pilot", "run": "evaluation"}
"""What a stage is measured on."""
Bounds = Mapping[Part, tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Windows:
    """One window of tokens out of each of some documents.

    Args:
        segments: token ids [N, T].
        names: the first 12 digits of each document's hash.
    """

    segments: Segments
    names: tuple[str, ...]


def keyed(key: str, name: str = "") -> int:
    """An integer of 64 bits that follows from two strings, the same in every process.

    Args:
        key: what is drawn, and the seed.
        name: for which example. Default "".
    """
    return int.from_bytes(hashlib.sha256(f"{key}:{name}".encode()).digest()[:8])


def generator(key: str) -> np.random.Generator:
    """A generator of random numbers that follows from a string: a stream of its own for every key.

    Args:
        key: what is drawn, the seed, and for which example.
    """
    # The key of Philox is the whole of its state, so that no two streams are parts of one another.
    key_2 = np.frombuffer(hashlib.sha256(key.encode()).digest()[:16], dtype="<u8")
    return np.random.Generator(np.random.Philox(key=key_2))


def part_of(name: str, bounds: Bounds) -> Part:
    """The set that a name is sealed into.

    Args:
        name: of an example; examples that must not be torn apart have one name.
        bounds: `{set: (low, high)}`, remainders modulo 1000, low inclusive; together they cover 0 to 999.
    """
    place = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 1000
    return next(part for part, (low, high) in bounds.items() if low <= place < high)


def check_part(part: str, bounds: Bounds) -> None:
    """Refuse a set that a world does not have.

    Args:
        part: its name.
        bounds: of the world.

    Raises:
        IntaglioError: there is none.
    """
    if part not in bounds:
        raise IntaglioError(f"there is no set {part!r}; {did_you_mean(part, bounds)}")


def check_count(what: str, count: int, have: int | None = None) -> None:
    """Refuse to draw fewer than one, or more than there are.

    Args:
        what: that is drawn, in the plural.
        count: how many.
        have: how many there are. Default None: without end.

    Raises:
        IntaglioError: the count is out of range.
    """
    if count < 1:
        raise IntaglioError(f"{count} {what} were asked for; at least 1 is accepted")
    if have is not None and count > have:
        raise IntaglioError(f"{count} {what} were asked for; there are {have}")


def draw(key: str, names: Sequence[str], count: int, what: str = "examples") -> list[int]:
    """Places of some of the names, in an order that the key decides.

    Args:
        key: what is drawn, and the seed.
        names: all different.
        count: how many.
        what: they are called in a sentence. Default `examples`.

    Raises:
        IntaglioError: there are fewer than that.
    """
    check_count(what, count, len(names))
    return sorted(range(len(names)), key=lambda place: keyed(key, names[place]))[:count]
