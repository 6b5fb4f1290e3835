"""Hand-written notes on a method's page: when to use it, an example, and the meaning of its verdict.

A note is `docs/methods/notes/SLUG.md`, in Markdown, with sections from `SECTIONS` and at most one from `VERDICTS`. The
latter is shown only while the committed record has that verdict. Numbers come from the record, so a note has none.
"""

from __future__ import annotations

import re
from pathlib import Path

from generate.text import ROOT
from intaglio.evidence.engine.record import VERDICTS as KNOWN

NOTES = ROOT / "docs" / "methods" / "notes"
SECTIONS = ("Use it when", "Look elsewhere when", "Example")
VERDICTS = {f"Verdict: {verdict}": verdict for verdict in KNOWN}
# Names and patterns may contain digits (SmolLM2-135M, 2:4, arXiv ids in links, code); any other digit is a number.
_NAMES = re.compile(r"^```.*?^```|\]\([^)]*\)|`[^`]*`|\b\d+:\d+\b|\w*[A-Za-z][\w-]*", re.DOTALL | re.MULTILINE)
_WORDS = re.compile(
    r"\b(two|three|four|five|six|seven|eight|nine|ten|twelve|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety"
    r"|hundred|thousand|half|halves|third|quarter|twice|double|percent|per cent)\b",
    re.IGNORECASE,
)


def numbers(text: str) -> list[str]:
    """Return the numbers in a note's text, in digits or in words."""
    return re.findall(r"\d[\d.,]*|[%‰]", _NAMES.sub(" ", text)) + [match[0] for match in _WORDS.finditer(text)]


def read(slug: str, folder: Path = NOTES) -> dict[str, str]:
    """Return the sections of a method's note by heading; empty if it has none.

    Raises:
        ValueError: a heading is unknown, repeated or empty, there are two verdicts, or the text contains a number.
    """
    path = folder / f"{slug}.md"
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    before, *rest = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    headings, bodies = rest[::2], [body.strip() for body in rest[1::2]]
    known = {*SECTIONS, *VERDICTS}
    repeated = len(set(headings)) < len(headings) or len(VERDICTS.keys() & set(headings)) > 1
    if before.strip() or repeated or not set(headings) <= known or not all(bodies):
        accepted = f"accepted, each once: {', '.join(SECTIONS)}, and one of {', '.join(VERDICTS)}"
        raise ValueError(f"the note {path.name} has sections {headings}; {accepted}")
    if in_text := numbers(text):
        raise ValueError(f"the note {path.name} has the number {in_text[0]}; numbers come from the record")
    return dict(zip(headings, bodies, strict=True))


def verdict(note: dict[str, str]) -> str | None:
    """Return the verdict that a note explains, or None."""
    return next((VERDICTS[heading] for heading in note if heading in VERDICTS), None)
