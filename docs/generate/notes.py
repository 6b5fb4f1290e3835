"""The sentences on a card that are written by hand: when to use a method, and what a verdict means.

A note is `docs/methods/notes/SLUG.md`: sections under the headings below, in plain Markdown. What a verdict means is
shown with that verdict only, so it cannot outlive it. Numbers are the record's business, so a note has none.
"""

from __future__ import annotations

import re
from pathlib import Path

from generate.text import ROOT

NOTES = ROOT / "docs" / "methods" / "notes"
ALWAYS = ("Use it when", "Look elsewhere when")
OF_VERDICTS = {
    verdict: f"If the verdict is {verdict}" for verdict in ("holds", "fails", "underpowered", "inconclusive")
}
# Names and patterns may have digits in them (SmolLM2-135M, 2:4, arXiv ids in links); what is left is a number.
_NAMES = re.compile(r"\]\([^)]*\)|`[^`]*`|\b\d+:\d+\b|\w*[A-Za-z][\w-]*")
_WORDS = re.compile(
    r"\b(two|three|four|five|six|seven|eight|nine|ten|twelve|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety"
    r"|hundred|thousand|half|halves|third|quarter|twice|double|percent|per cent)\b",
    re.IGNORECASE,
)


def numbers(text: str) -> list[str]:
    """The numbers that a note must not have, in digits or in words.

    Args:
        text: of the note.
    """
    return re.findall(r"\d[\d.,]*|[%‰]", _NAMES.sub(" ", text)) + [found[0] for found in _WORDS.finditer(text)]


def read(slug: str, folder: Path = NOTES) -> dict[str, str]:
    """A method's note by heading; empty if it has none.

    Args:
        slug: of the method.
        folder: where notes lie.

    Raises:
        ValueError: a heading is unknown, stands twice or has nothing below it, or there is a number.
    """
    path = folder / f"{slug}.md"
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    known = (*ALWAYS, *OF_VERDICTS.values())
    before, *rest = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    headings, bodies = rest[::2], [body.strip() for body in rest[1::2]]
    if before.strip() or not set(headings) <= set(known) or len(set(headings)) < len(headings) or not all(bodies):
        raise ValueError(f"the note {path.name} has sections {headings}; accepted, each once: {', '.join(known)}")
    if found := numbers(text):
        raise ValueError(f"the note {path.name} has the number {found[0]}; numbers come from the record")
    return dict(zip(headings, bodies, strict=True))
