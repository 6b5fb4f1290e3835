"""Write the pinned defaults, presets and estimates of all methods anew; `card` and `why` stay: `make pins`.

The conformance suite compares them, so a change of a default shows in the diff. A new field or preset needs the card's
value, or none if the card has none; `why` gives the rule where the two differ.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PINS = """\
# Defaults and presets of every published method, with the card's value beside each; a field without `card` is our own.
# `why` gives the rule where default and card differ. Written by `make pins`, which keeps `card` and `why`.
"""
COSTS = "# Estimates [flops, sorted elements, extra bytes] of every example, for the workload of `pins.py`.\n"


def flow(row: Any) -> str:
    """Return a row on one line."""
    return yaml.safe_dump(row, default_flow_style=True, sort_keys=False, width=10**6).strip()


def main() -> None:
    """Write both files."""
    from tests.examples import EXAMPLES
    from tests.pins import COSTS_FILE, PINS_FILE, costs, pins

    from intaglio.methods.registry import PUBLISHED, get_method

    known = yaml.safe_load(PINS_FILE.read_text(encoding="utf-8")) or {}
    lines, estimates = [], []
    for slug in PUBLISHED:
        lines.append(f"{slug}:")
        for name, row in pins(slug).items():
            kept = {key: value for key, value in known.get(slug, {}).get(name, {}).items() if key in ("card", "why")}
            lines.append(f"  {name}: {flow(row | kept)}")
        estimates.append(f"{slug}:")
        estimates += [f"  - {flow(costs(get_method(slug)(**fields)))}" for fields in EXAMPLES[slug]]
    PINS_FILE.write_text(PINS + "\n".join(lines) + "\n", encoding="utf-8")
    COSTS_FILE.write_text(COSTS + "\n".join(estimates) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
