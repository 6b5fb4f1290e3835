"""Journal of a run: one JSON line for each finished arm of a unit, so that a killed run resumes, also elsewhere.

The header names the claim's version, digest and seed base, nothing of the code: the library may be edited meanwhile.
A line counts when its newline is on the disk; a torn last line is dropped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from intaglio import atomic_io
from intaglio.errors import IntaglioError
from intaglio.evidence.engine.claim import Claim, Cost, Result, Settings, Stage

Key = tuple[Stage, int, str, str]


def entry_key(stage: Stage, index: int, arm: str, settings: Settings) -> Key:
    """Return the identity of an entry within a journal."""
    return stage, index, arm, json.dumps(settings, sort_keys=True)


@dataclass(frozen=True)
class Entry:
    """A finished arm of a unit: its settings, `{metric: {inner unit: value}}` (None: diverged), cost and CPU time.

    `core_seconds` leaves out `bed_seconds`, preparations of the test bed that the arm was the first to need.
    """

    stage: Stage
    index: int
    arm: str
    settings: Settings
    values: Mapping[str, Mapping[str, float | None]]
    cost: Cost
    parity: Mapping[str, str]
    core_seconds: float
    bed_seconds: float
    machine: str

    @property
    def diverged(self) -> bool:
        """Whether the run ended without a result."""
        return not self.parity and all(values == {"": None} for values in self.values.values())

    @property
    def key(self) -> Key:
        """Identity within a journal."""
        return entry_key(self.stage, self.index, self.arm, self.settings)


def clean_values(result: Result) -> dict[str, dict[str, float | None]]:
    """Return the values of a result: None where not finite, and inner unit "" for a lone value."""
    return {
        metric: {
            name: None if value is None or not math.isfinite(value) else float(value)
            for name, value in (of_units if isinstance(of_units, Mapping) else {"": of_units}).items()
        }
        for metric, of_units in result.values.items()
    }


@dataclass
class Journal:
    """Open journal; see `open_journal`."""

    path: Path
    file: IO[bytes]
    entries: dict[Key, Entry] = field(default_factory=dict)

    def add(self, entry: Entry) -> None:
        """Append a finished arm of a unit; it is on the disk when this returns."""
        self.append(asdict(entry))
        self.entries[entry.key] = entry

    def append(self, line: dict[str, Any]) -> None:
        """Append one line."""
        text = json.dumps(line, ensure_ascii=False, allow_nan=False)
        atomic_io.append(self.file, self.path, text.encode() + b"\n")


@contextmanager
def open_journal(path: Path, claim: Claim, seed_base: int) -> Iterator[Journal]:
    """Open or begin the journal of a claim; only one process at a time has it."""
    header = {"slug": claim.slug, "version": claim.version, "digest": claim.digest, "seed_base": seed_base}
    with atomic_io.locked(path, f"another process is running {claim.slug} ({path})") as file:
        file.seek(0)
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            file.truncate(len(whole))
        journal = Journal(path, file)
        if not whole:
            journal.append(header)
        else:
            first, *lines = whole.decode("utf-8", "replace").split("\n")[:-1]
            _check_header(path, first, header)
            for number, line in enumerate(lines, 2):
                try:
                    document = json.loads(line)
                    entry = Entry(**document | {"cost": Cost(**document["cost"])})
                    journal.entries[entry.key] = entry
                except (ValueError, TypeError, KeyError):
                    raise IntaglioError(f"line {number} of the journal {path} is damaged; remove that line") from None
        yield journal


def _check_header(path: Path, line: str, header: Mapping[str, Any]) -> None:
    try:
        then = json.loads(line)
    except ValueError:
        then = None
    if not isinstance(then, dict) or then.keys() != header.keys():
        raise IntaglioError(f"{path} is not a journal of a claim; move it away")
    if then["digest"] != header["digest"] and then["version"] == header["version"]:
        raise IntaglioError(
            f"the claim of {header['slug']} was edited after its run began (digest {then['digest']}, now"
            f" {header['digest']}): restore it, or raise its version; the journal is {path}"
        )
    if then != header:
        raise IntaglioError(f"{path} is the journal of another claim, version or seed base; name another directory")
