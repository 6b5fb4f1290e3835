"""The effects of a record with their intervals, as one SVG that can stand alone or in a page.

Classes are those of the reports' style sheet; standing alone it brings their colours with it, light and dark.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass

from intaglio.evidence.record import Record
from intaglio.report.svg import LABEL_CHARACTER, WIDTH, clean_text, ticks

ROW = 30.0
LONGEST = 46
_STYLE = """
.picture { --ink: #1d1a17; --muted: #6a635b; --rule: #e0dad0; --accent: #9c4519; --bar: #b9b0a4; --paper: #fdfcfa;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; background: var(--paper); }
@media screen and (prefers-color-scheme: dark) { .picture { --ink: #ece7e0; --muted: #a79e93; --rule: #3a352f;
  --accent: #eba06f; --bar: #6b635a; --paper: #161412; } }
.picture text { fill: var(--ink); } .picture .label { font-size: 13px; } .picture .strong { font-weight: 600; }
.picture .small { font-size: 11.5px; fill: var(--muted); }
.picture .grid { stroke: var(--rule); stroke-width: 1; }
.picture .reference { stroke: var(--ink); stroke-width: 1.25; stroke-dasharray: 4 3; }
"""
# Marks of this picture alone, so they travel with it also into a page.
_MARKS = """
.picture .reach { stroke: var(--bar); stroke-width: 5; stroke-linecap: round; }
.picture .reach.strong { stroke: var(--accent); }
.picture .zero { stroke: var(--muted); stroke-width: 1; }
.picture .at { fill: var(--ink); }
"""


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _add(parent: ET.Element, tag: str, text: str | None = None, **attributes: float | str) -> None:
    named = {k.rstrip("_").replace("_", "-"): v if isinstance(v, str) else _number(v) for k, v in attributes.items()}
    ET.SubElement(parent, tag, named).text = None if text is None else clean_text(text)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


@dataclass(frozen=True)
class _Row:
    """An effect with its interval."""

    name: str
    effect: float
    low: float
    high: float
    strong: bool = False


def effects(record: Record, alone: bool = True) -> str:
    """Draw the primary effect, and under it the secondaries of the same metric, each with its 95 % interval.

    They have an axis each: a secondary effect is often far larger than the one that is asked about.

    Args:
        record: of a run.
        alone: whether the picture brings colours with it. Default True; in a page they are the page's.

    Returns:
        An SVG element.
    """
    primary = _Row(f"{record.method} against {record.baseline}", record.effect, *record.interval, strong=True)
    others = [_Row(s.name, s.effect, *s.interval) for s in record.secondaries if s.metric == record.metric]
    margin = record.delta if record.kind == "better" else -record.delta
    left = 28 + LABEL_CHARACTER * max(len(_short(row.name)) for row in [primary, *others])
    title = f"{record.slug}: {record.verdict}"
    description = (
        f"Effect on {record.metric} in {record.unit}, larger is better for the method: {record.effect:.4g}, 95 %"
        f" interval {record.interval[0]:.4g} to {record.interval[1]:.4g}; {record.delta:g} is the least that matters."
    )
    root = ET.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "role": "img",
            "aria-label": f"{title}. {description}",
            "class": "picture",
        },
    )
    _add(root, "title", title)
    _add(root, "desc", description)
    _add(root, "style", (_STYLE if alone else "") + _MARKS)
    unit = f"effect on {record.metric}, {record.unit}, larger is better; 95 % intervals"
    bottom = _panel(root, [primary], left, 34.0, unit, (margin, f"{margin:g} must be passed"))
    if others:
        bottom = _panel(root, others, left, bottom + 30, "secondary comparisons, the same unit on another scale")
    root.set("viewBox", f"0 0 {_number(WIDTH)} {_number(bottom + 12)}")
    return ET.tostring(root, encoding="unicode")


def _panel(
    root: ET.Element, rows: list[_Row], left: float, top: float, axis: str, reference: tuple[float, str] | None = None
) -> float:
    """Rows on one axis with 0 in it; gives back where the panel ends."""
    ends = [0.0, *(end for row in rows for end in (row.low, row.high)), *([reference[0]] if reference else [])]
    reach = (max(ends) - min(ends)) or 1.0
    marks = ticks(min(ends), min(ends) + reach)
    right = 130.0
    span, bottom = WIDTH - left - right, top + ROW * len(rows)

    def place(value: float) -> float:
        return left + span * (value - marks[0]) / (marks[-1] - marks[0])

    for mark in marks:
        line = "zero" if mark == 0 else "grid"
        _add(root, "line", x1=place(mark), x2=place(mark), y1=top - 4, y2=bottom + 2, class_=line)
        _add(root, "text", f"{mark:g}", x=place(mark), y=bottom + 18, class_="small", text_anchor="middle")
    _add(root, "text", axis, x=left, y=bottom + 40, class_="small")
    if reference is not None:
        at = place(reference[0])
        _add(root, "line", x1=at, x2=at, y1=top - 8, y2=bottom + 2, class_="reference")
        _add(root, "text", reference[1], x=at, y=top - 14, class_="small", text_anchor="middle")
    for number, row in enumerate(rows):
        y = top + ROW * number + ROW / 2
        more = " strong" if row.strong else ""
        _add(root, "text", _short(row.name), x=left - 10, y=y + 4, class_=f"label{more}", text_anchor="end")
        _add(root, "line", x1=place(row.low), x2=place(row.high) + 0.01, y1=y, y2=y, class_=f"reach{more}")
        _add(root, "circle", cx=place(row.effect), cy=y, r=4, class_="at")
        _add(root, "text", f"{row.effect:+.4f}", x=WIDTH - right + 14, y=y + 4, class_=f"label{more}")
    return bottom + 40
