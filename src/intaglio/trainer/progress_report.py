"""An early report: how a run goes, while it goes, as a page in its directory."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from intaglio import atomic_io, report
from intaglio.report.formatting import duration
from intaglio.report.training_curves import is_columns
from intaglio.trainer.history import columns, history

PAGE = "progress.html"
SECONDS = 20.0
"""At least so long between two pages, so that writing them costs nothing."""


class ProgressReport:
    """Writes `progress.html` into the directory of a run: first after its first two log lines, then now and then.

    Args:
        directory: of the run.
        source: what is trained.
        arguments: of the run; those that are set are shown.
    """

    def __init__(self, directory: Path, source: str, arguments: Mapping[str, Any]) -> None:
        self._path, self._source = directory / PAGE, source
        self._notes = {name: str(value) for name, value in arguments.items() if value not in (None, [], False)}
        self._next = 0.0

    def update(self, log: Sequence[dict[str, Any]], done: int, total: int, tokens: int, seconds: float) -> None:
        """Write the page anew, unless that was done just now.

        Args:
            log: Trainer's.
            done: optimizer steps.
            total: of them.
            tokens: that have passed.
            seconds: the run has taken.
        """
        found = columns(history(log))
        if not is_columns(found) or (time.monotonic() < self._next and done < total):
            return
        left = f", about {duration(seconds / done * (total - done))} to go" if done < total else ""
        told = (
            f"Step {done:,} of {total:,} after {duration(seconds)}{left}; {tokens:,} tokens, "
            f"{tokens / max(seconds, 1e-9):,.0f} a second; loss {found['loss'][-1]:.4g}."
        )
        page = report.training_page(f"Training of {self._source or 'a model'}", told, found, self._notes)
        atomic_io.write_text(self._path, page)
        self._next = time.monotonic() + SECONDS
