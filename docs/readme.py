"""Write the generated parts of README.md: the catalogue table. `--check` only says whether they are current."""

from __future__ import annotations

import sys
from pathlib import Path

from generate.evidence import of, short
from generate.text import cell
from intaglio.methods.registry import PUBLISHED

from intaglio import atomic_io

README = Path(__file__).resolve().parent.parent / "README.md"
START, END = "<!-- catalogue: written by `make readme` -->", "<!-- end of catalogue -->"


def catalogue_table() -> str:
    """The catalogue as a Markdown table, with the verdicts of the committed records.

    Whether a record is stale is not said here: a changed file would make the README one too.
    """
    rows = ["| method | room | what it does | source | verdict |", "| --- | --- | --- | --- | --- |"]
    rows += [
        f"| `{e.slug}` | {e.area} | {cell(e.summary)} | [{cell(e.citation)}]({e.url}) | {cell(short(of(e.slug)))} |"
        for e in PUBLISHED.values()
    ]
    return "\n".join(rows)


def renewed(text: str) -> str:
    """The README with its generated parts written anew."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{catalogue_table()}\n{END}{after}"


def main() -> int:
    """Write or check; the exit code says whether the file was current."""
    text = README.read_text(encoding="utf-8")
    new = renewed(text)
    if "--check" in sys.argv:
        return int(new != text)
    atomic_io.write_text(README, new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
