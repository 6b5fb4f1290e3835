"""Effect of a record with its interval on one axis, with baseline, delta and ceiling marked, as SVG.

Classes are those of the reports' style sheet; standing alone the picture brings their colours with it, light and dark.
"""

from __future__ import annotations

from intaglio.evidence.engine.record import Record
from intaglio.report.svg import WIDTH, Anchor, add, canvas, text_of, ticks, write

_STYLE = """
.picture { --ink: #1d1a17; --muted: #6a635b; --rule: #e0dad0; --accent: #9c4519; --paper: #fdfcfa;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; background: var(--paper); }
@media screen and (prefers-color-scheme: dark) { .picture { --ink: #ece7e0; --muted: #a79e93; --rule: #3a352f;
  --accent: #eba06f; --paper: #161412; } }
.picture text { fill: var(--ink); } .picture .small { font-size: 11.5px; fill: var(--muted); }
.picture .grid { stroke: var(--rule); stroke-width: 1; }
.picture .reference { stroke: var(--ink); stroke-width: 1.25; stroke-dasharray: 4 3; }
"""
_MARKS = """
.picture .reach { stroke: var(--accent); stroke-width: 5; stroke-linecap: round; }
.picture .at { fill: var(--ink); }
"""
LEFT, RIGHT, TOP, BOTTOM = 44.0, 44.0, 74.0, 108.0
FAR = 8.0
"""Deltas beyond the interval from which on a ceiling is named at the edge instead of stretching the axis."""


def effects(record: Record, alone: bool = True) -> str:
    """Draw the effect of a record as an SVG element; `alone` brings colours with it, in a page they are the page's."""
    unit, level = record.metric.unit or record.metric.name, f"{100 * record.level:g} % interval"
    title = f"{record.slug}: {record.reading}"
    low, high = record.interval or (0.0, 0.0)
    description = f"Larger is better for the method; {record.margin:g} must be passed."
    if record.effect is not None:
        description = f"Effect {record.effect:.4g} {unit}, {level} {low:.4g} to {high:.4g}. {description}"
    root = canvas(title, description, BOTTOM + 52)
    root.set("xmlns", "http://www.w3.org/2000/svg")
    add(root, "style", (_STYLE if alone else "") + _MARKS)
    marks = [(0.0, record.baseline), (record.margin, f"{record.margin:+g} to pass")]
    edge = max(high, record.margin) + FAR * record.delta
    if record.ceiling and record.headroom is not None:
        far = f" ({record.headroom:+.3g}) →" if record.headroom > edge else ""
        marks.append((min(record.headroom, edge), record.ceiling + far))
    axis = ticks(min(low, *(at for at, _ in marks)), max(high, *(at for at, _ in marks)))
    scale = (WIDTH - LEFT - RIGHT) / (axis[-1] - axis[0])

    def x(value: float) -> float:
        return LEFT + scale * (value - axis[0])

    for tick in axis:
        add(root, "line", x1=x(tick), x2=x(tick), y1=TOP - 8, y2=BOTTOM, class_="grid")
        write(root, f"{tick:g}", x(tick), BOTTOM + 18, anchor="middle")
    for number, (at, name) in enumerate(sorted(marks)):
        y = TOP - 14 - 18 * number  # a row each: neighbours may be close
        anchor: Anchor = "end" if x(at) > 0.85 * WIDTH else "start" if x(at) < 0.15 * WIDTH else "middle"
        add(root, "line", x1=x(at), x2=x(at), y1=y + 4, y2=BOTTOM, class_="reference")
        write(root, name, x(at), y, anchor=anchor)
    if record.effect is not None:
        y = (TOP + BOTTOM) / 2
        add(root, "line", x1=x(low), x2=x(high) + 0.01, y1=y, y2=y, class_="reach")
        add(root, "circle", cx=x(record.effect), cy=y, r=4.5, class_="at")
    caption = f"effect of {record.method} on {record.metric.name}, {unit}; larger is better; {level}"
    write(root, caption, LEFT, BOTTOM + 40)
    return text_of(root)
