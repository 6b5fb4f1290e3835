"""Splits by hash and draws by key: no draw depends on positions, file order or which other examples exist.

A name (any string that identifies an example) belongs to the set whose range holds its SHA-256 modulo 1000. Draws are
ordered by the hash of "key:name", so a smaller draw is the beginning of a larger one.

Dimension letters: N documents, T tokens of a window, S tokens of a stream.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch

from intaglio.data.segments import Segments
from intaglio.errors import IntaglioError, did_you_mean

Part = Literal["train", "validation", "pilot", "evaluation"]
"""Disjoint sets: for training, for choosing settings, for probes, for measuring."""
Bounds = Mapping[Part, tuple[int, int]]
"""`{set: (low, high)}`: remainders modulo 1000, low inclusive; together they cover 0 to 999."""
BOUNDS: Bounds = {"train": (0, 600), "validation": (600, 700), "pilot": (700, 800), "evaluation": (800, 1000)}
"""The split of most test beds."""


@dataclass(frozen=True, eq=False)
class Windows:
    """One window of tokens from each of several documents, named by the first 12 digits of the document's hash."""

    segments: Segments
    names: tuple[str, ...]


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, its kind, and its source; prompts of a source are not independent."""

    kind: str
    source: str
    ids: tuple[int, ...]


class Sized:
    """Base of test beds: frozen dataclasses of sizes, of which `MINIATURE` holds those of the miniature."""

    MINIATURE: ClassVar[Mapping[str, Any]]

    def toy(self, **changes: Any) -> Self:
        """Return the test bed in miniature."""
        return dataclasses.replace(self, **{**self.MINIATURE, **changes})  # type: ignore[type-var]

    def settings(self, *names: str) -> dict[str, Any]:
        """Return some fields, as the key of what they decide."""
        fields = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {name: fields[name] for name in names}


def keyed(key: str, name: str = "") -> int:
    """Return a 64-bit integer derived from a key and a name, the same in every process."""
    return int.from_bytes(hashlib.sha256(f"{key}:{name}".encode()).digest()[:8])


def generator(key: str) -> np.random.Generator:
    """Return a random generator with a stream of its own for every key."""
    # The key of Philox is its whole state, so no two streams overlap.
    key_2 = np.frombuffer(hashlib.sha256(key.encode()).digest()[:16], dtype="<u8")
    return np.random.Generator(np.random.Philox(key=key_2))


def remainder(digest: str) -> int:
    """Return a hexadecimal hash modulo 1000, the number that `Bounds` splits by."""
    return int(digest[:8], 16) % 1000


def part_of(name: str, bounds: Bounds = BOUNDS) -> Part:
    """Return the set that a name belongs to; examples that must stay together share a name."""
    place = remainder(hashlib.sha256(name.encode()).hexdigest())
    return next(part for part, (low, high) in bounds.items() if low <= place < high)


def check_part(part: str, bounds: Bounds = BOUNDS) -> None:
    """Raise an IntaglioError if there is no set of that name."""
    if part not in bounds:
        raise IntaglioError(f"there is no set {part!r}; {did_you_mean(part, bounds)}")


def check_count(what: str, count: int, available: int | None = None) -> None:
    """Raise an IntaglioError if a requested number is below 1 or above the number available."""
    if count < 1:
        raise IntaglioError(f"{count} {what} were requested; at least 1 is accepted")
    if available is not None and count > available:
        raise IntaglioError(f"{count} {what} were requested; there are {available}")


def draw(key: str, names: Sequence[str], count: int, what: str = "examples") -> list[int]:
    """Return the indices of `count` distinct names, in an order that the key decides."""
    check_count(what, count, len(names))
    return sorted(range(len(names)), key=lambda index: keyed(key, names[index]))[:count]


def draw_windows(
    key: str, documents: Mapping[str, Sequence[int]], count: int, length: int, what: str
) -> dict[str, list[int]]:
    """Return one window of `length` tokens at a random place of each of `count` random documents, by name."""
    names = [name for name, ids in documents.items() if len(ids) >= length]
    windows = {}
    for index in draw(key, names, count, what):
        name = names[index]
        start = keyed(f"{key}:place", name) % (len(documents[name]) - length + 1)
        windows[name] = list(documents[name][start : start + length])
    return windows


def token_stream(tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    """Return all texts in a row, each followed by the end-of-text token, uint16 [S]."""
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return np.concatenate([np.array([*row, tokenizer.eos_token_id], dtype=np.uint16) for row in rows])


def random_windows(key: str, stream_S: np.ndarray, count: int, length: int, unit: str = "tokens") -> Segments:
    """Return `count` windows at random places of a stream: training data, of which fewer are the first of more."""
    starts = len(stream_S) - length + 1
    if starts < 1:
        raise IntaglioError(f"the training files have {len(stream_S)} {unit}; a window of {length} is needed")
    starts_N = np.array([keyed(key, str(window)) % starts for window in range(count)])
    windows_NT = np.lib.stride_tricks.sliding_window_view(stream_S, length)[starts_N]
    return Segments.of(torch.from_numpy(windows_NT.astype(np.int64)))
