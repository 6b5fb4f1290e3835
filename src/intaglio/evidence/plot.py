"""The effects of a record with their intervals against delta, as one SVG that can stand alone or in a page.

Classes are those of the reports' style sheet; standing alone it brings their colours with it, light and dark.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET

from intaglio.evidence.record import Record
from intaglio.pictures import LABEL_CHARACTER, WIDTH, clean_text, ticks

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
.picture .at { fill: var(--ink); }
"""


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _add(parent: ET.Element, tag: str, text: str | None = None, **attributes: float | str) -> None:
    named = {k.rstrip("_").replace("_", "-"): v if isinstance(v, str) else _number(v) for k, v in attributes.items()}
    ET.SubElement(parent, tag, named).text = None if text is None else clean_text(text)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def effects(record: Record, alone: bool = True) -> str:
    """Draw the primary effect, and under it the secondaries of the same metric, each with its 95 % interval.

    Args:
        record: of a run.
        alone: whether the picture brings colours with it. Default True; in a page they are the page's.

    Returns:
        An SVG element.
    """
    rows = [(f"{record.method} against {record.baseline}", record.effect, *record.interval, True)]
    rows += [(s.name, s.effect, *s.interval, False) for s in record.secondaries if s.metric == record.metric]
    margin = record.delta if record.kind == "better" else -record.delta
    marks = ticks(min(0.0, margin, *(row[2] for row in rows)), max(0.0, margin, *(row[3] for row in rows)))
    low, high = marks[0], marks[-1]
    left = 28 + LABEL_CHARACTER * max(len(_short(row[0])) for row in rows)
    right = 130.0
    span = WIDTH - left - right

    def place(value: float) -> float:
        return left + span * (value - low) / (high - low)

    top, bottom = 34.0, 34.0 + ROW * len(rows)
    title = f"{record.slug}: {record.verdict}"
    description = (
        f"Effect on {record.metric} in {record.unit}, larger is better for the method: {record.effect:.4g}, 95 %"
        f" interval {record.interval[0]:.4g} to {record.interval[1]:.4g}; {record.delta:g} is the least that matters."
    )
    root = ET.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {_number(WIDTH)} {_number(bottom + 52)}",
            "role": "img",
            "aria-label": f"{title}. {description}",
            "class": "picture",
        },
    )
    _add(root, "title", title)
    _add(root, "desc", description)
    _add(root, "style", (_STYLE if alone else "") + _MARKS)
    for mark in marks:
        _add(root, "line", x1=place(mark), x2=place(mark), y1=top - 4, y2=bottom + 2, class_="grid")
        _add(root, "text", f"{mark:g}", x=place(mark), y=bottom + 18, class_="small", text_anchor="middle")
    axis = f"effect on {record.metric}, {record.unit}, larger is better; 95 % intervals"
    _add(root, "text", axis, x=left, y=bottom + 40, class_="small")
    at = place(margin)
    _add(root, "line", x1=at, x2=at, y1=top - 8, y2=bottom + 2, class_="reference")
    _add(root, "text", f"{margin:g} must be passed", x=at, y=top - 14, class_="small", text_anchor="middle")
    for line, (name, effect, start, end, strong) in enumerate(rows):
        y = top + ROW * line + ROW / 2
        more = " strong" if strong else ""
        _add(root, "text", _short(name), x=left - 10, y=y + 4, class_=f"label{more}", text_anchor="end")
        _add(root, "line", x1=place(start), x2=place(end) + 0.01, y1=y, y2=y, class_=f"reach{more}")
        _add(root, "circle", cx=place(effect), cy=y, r=4, class_="at")
        _add(root, "text", f"{effect:+.4f}", x=WIDTH - right + 14, y=y + 4, class_=f"label{more}")
    return ET.tostring(root, encoding="unicode")
