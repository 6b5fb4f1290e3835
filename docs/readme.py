"""Write the catalogue table of README.md; with `--check` only test whether it is current."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from generate.cards import by_area
from generate.evidence import load_evidence, short
from generate.text import cell

from intaglio import atomic_io
from intaglio.methods.registry import AREAS

README = Path(__file__).resolve().parent.parent / "README.md"
START, END = "<!-- catalogue: written by `make readme` -->", "<!-- end of catalogue -->"


def catalogue_table() -> str:
    """Return the methods of each area as a Markdown table, with the verdicts of the committed records."""
    parts = []
    for area, entries in by_area().items():
        rows = ["| method | what it does | verdict |", "| --- | --- | --- |"]
        for entry in entries:
            name = f"`{entry.slug}`, [{source(entry.citation)}]({entry.url})"
            rows.append(f"| {name} | {cell(entry.summary)} | {cell(short(load_evidence(entry.slug)))} |")
        parts.append(f"**{area.capitalize()}**: {AREAS[area]}\n\n" + "\n".join(rows))
    return "\n\n".join(parts)


def source(citation: str) -> str:
    """Return the authors and the year of a citation."""
    authors, _, rest = citation.partition(",")
    return f"{authors} {re.findall(r'(?:19|20)[0-9]{2}(?![0-9.])', rest)[-1]}"


def renewed(text: str) -> str:
    """Return the README with its generated part replaced."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{catalogue_table()}\n{END}{after}"


def main() -> int:
    """Write or check the file; with `--check` the exit code is 1 if it is out of date."""
    text = README.read_text(encoding="utf-8")
    new = renewed(text)
    if "--check" in sys.argv:
        return int(new != text)
    atomic_io.write_text(README, new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
