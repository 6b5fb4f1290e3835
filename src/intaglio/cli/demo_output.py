"""The output directory of a demo."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from intaglio import atomic_io


@contextmanager
def demo_directory(output: str | os.PathLike[str], *names: str) -> Iterator[Path]:
    """Yield a temporary directory that becomes the output; it replaces nothing but the results of an earlier demo.

    Args:
        output: must not exist, be empty, or hold files of these names alone.
        names: of the results beside `report.html` and `report.json`.

    Raises:
        IntaglioError: the output holds anything else, or cannot be written.
    """
    output = Path(output)
    ours = output.is_dir() and {file.name for file in output.iterdir()} <= {"report.html", "report.json", *names}
    atomic_io.check_target(output, overwrite=ours)
    with atomic_io.directory(output, overwrite=ours) as temporary:
        yield temporary
