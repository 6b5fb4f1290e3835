"""The units of a run, written one by one as they finish, so that a killed run goes on where it was.

One JSON object a line: a header that says what the run is, then a line for each arm of each run. A line counts when its
newline is on the disk; a torn last line is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from intaglio import atomic_io
from intaglio.errors import IntaglioError, shorten
from intaglio.evidence.experiment import Stage
from intaglio.evidence.record import Run, first_problem

NAME = "runs.jsonl"
Key = tuple[Stage, int, str]


@dataclass
class Journal:
    """An open journal; see `open_journal`.

    Args:
        path: of the file.
        runs: what has finished, by stage, index and arm.
    """

    path: Path
    _file: IO[bytes]
    runs: dict[Key, Run] = field(default_factory=dict)

    def add(self, run: Run) -> None:
        """Append a finished arm of a run; when this returns it is on the disk.

        Args:
            run: what finished.
        """
        self._append(run.model_dump())
        self.runs[run.key] = run

    def _append(self, value: dict[str, Any]) -> None:
        line = json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
        atomic_io.append(self._file, self.path, line)


@contextmanager
def open_journal(directory: Path, header: dict[str, Any]) -> Iterator[Journal]:
    """Open or begin the journal of a run; only one process at a time has it.

    Args:
        directory: of the run; made if it is not there.
        header: what the run is: JSON. A journal with another header is refused.

    Raises:
        IntaglioError: another process has it, it is of another run, damaged, or cannot be written.
    """
    path = directory / NAME
    with atomic_io.locked(path, f"another process is running the experiment in {directory}") as file:
        file.seek(0)
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            file.truncate(len(whole))
        journal = Journal(path, file)
        if whole:
            _take_in(journal, whole, header)
        else:
            journal._append({"header": header})
        yield journal


def _take_in(journal: Journal, content: bytes, header: dict[str, Any]) -> None:
    first, *lines = content.decode("utf-8", "replace").split("\n")[:-1]
    _check_header(journal.path, first, header)
    for number, line in enumerate(lines, 2):
        try:
            run = Run.model_validate_json(line)
        except ValidationError as error:
            raise IntaglioError(
                f"line {number} of {journal.path} is damaged: {first_problem(error)}; remove that directory to start"
                " over"
            ) from error
        journal.runs[run.key] = run


def _check_header(path: Path, line: str, header: dict[str, Any]) -> None:
    try:
        found = json.loads(line)["header"]
        different = sorted(key for key in found.keys() | header.keys() if found.get(key) != header.get(key))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise IntaglioError(f"{path} is no journal of an experiment; name another directory") from None
    if different:
        key = different[0]
        then, now = found.get(key), header.get(key)
        if isinstance(then, dict) and isinstance(now, dict):
            names = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
            then, now = ({name: value.get(name) for name in names} for value in (then, now))
        raise IntaglioError(
            f"{path} was begun with other {key.replace('_', ' ')} ({_said(then)}, now {_said(now)}); remove that"
            " directory to start over, or name another one"
        )


def _said(value: Any) -> str:
    return shorten(json.dumps(value, ensure_ascii=False), 120)
