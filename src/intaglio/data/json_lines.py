"""Files with one JSON value a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from intaglio.errors import IntaglioError


def json_lines(path: str | os.PathLike[str], what: str, needed: str) -> Iterator[tuple[str, Any]]:
    """Yield the place (for error messages) and the value of each line that is not blank.

    Args:
        path: the file.
        what: the name of its contents in error messages, a plural.
        needed: what a line has to hold.

    Raises:
        IntaglioError: it cannot be read, holds nothing, or a line is not JSON.
    """
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise IntaglioError(f"cannot read the {what} {file}: {reason}") from None
    if not any(line.strip() for line in lines):
        raise IntaglioError(f"the {what} {file} are empty; one JSON object a line with {needed} is needed")
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"line {number} of {file}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise IntaglioError(f"{place} is not JSON: {error}") from None
            yield place, value
