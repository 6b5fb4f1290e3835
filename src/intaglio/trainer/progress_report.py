"""Live progress page in the directory of a run."""

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
"""Least time between two pages, so that writing them costs nothing."""


class ProgressReport:
    """Writer of `progress.html`, from the second log line on."""

    def __init__(self, directory: Path, source: str, arguments: Mapping[str, Any]) -> None:
        self._path, self._source = directory / PAGE, source
        self._notes = {name: str(value) for name, value in arguments.items() if value not in (None, [], False)}
        self._next = 0.0

    def update(self, log: Sequence[dict[str, Any]], done: int, total: int, tokens: int, seconds: float) -> None:
        """Write the page, unless that was done in the last seconds."""
        curves = columns(history(log))
        if not is_columns(curves) or (time.monotonic() < self._next and done < total):
            return
        left = f", about {duration(seconds / done * (total - done))} to go" if done < total else ""
        summary = (
            f"Step {done:,} of {total:,} after {duration(seconds)}{left}; {tokens:,} tokens, "
            f"{tokens / max(seconds, 1e-9):,.0f} a second; loss {curves['loss'][-1]:.4g}."
        )
        page = report.training_page(f"Training of {self._source or 'a model'}", summary, curves, self._notes)
        atomic_io.write_text(self._path, page)
        self._next = time.monotonic() + SECONDS
