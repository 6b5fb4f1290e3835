"""Write the catalogue table of README.md; with `--check` only test whether it is current."""

from __future__ import annotations

import sys
from pathlib import Path

from generate.evidence import load_evidence, short
from generate.text import cell

from intaglio import atomic_io
from intaglio.methods.registry import PUBLISHED

README = Path(__file__).resolve().parent.parent / "README.md"
START, END = "<!-- catalogue: written by `make readme` -->", "<!-- end of catalogue -->"


def catalogue_table() -> str:
    """Return the catalogue as a Markdown table, with the verdicts of the committed records."""
    rows = ["| method | area | what it does | source | verdict |", "| --- | --- | --- | --- | --- |"]
    rows += [
        f"| `{e.slug}` | {e.area} | {cell(e.summary)} | [{cell(e.citation)}]({e.url}) "
        f"| {cell(short(load_evidence(e.slug)))} |"
        for e in PUBLISHED.values()
    ]
    return "\n".join(rows)


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
