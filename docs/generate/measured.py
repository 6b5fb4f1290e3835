"""Tables of measured figures that are no evidence for a claim: `docs/methods/measured/SLUG.json`, from a benchmark."""

from __future__ import annotations

import json
from typing import Any

from generate.text import ROOT

MEASURED = ROOT / "docs" / "methods" / "measured"


def read(slug: str) -> dict[str, Any] | None:
    """Return a method's table (title, text, columns, rows, command, processor, versions), or None."""
    path = MEASURED / f"{slug}.json"
    table: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return table
