"""Accuracy against measured sparsity as SVG: a panel for each task and condition, a line for each method."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass

from intaglio.report.svg import SMALL_CHARACTER, WIDTH, add, canvas, text_of, write

HEIGHT, ACROSS = 250.0, 2
COLOURS = ("#9c4519", "#2f6473", "#7a6a17", "#6b3f77", "#3d6b35", "#8a2f45", "#5a5a5a", "#8c8c8c", "#1d1a17")
STYLE = """
.picture { font-family: system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif;
  background: #fdfcfa; } .picture text { fill: #1d1a17; font-size: 13px; } .picture .small { font-size: 11.5px;
  fill: #6a635b; } .picture .label { font-weight: 600; } .picture .grid { stroke: #e0dad0; }
.picture .dense { stroke: #6a635b; stroke-dasharray: 4 3; fill: none; } .picture .curve { fill: none;
  stroke-width: 1.8; } .picture .dot { fill: #9c4519; }
"""


@dataclass(frozen=True)
class Panel:
    """Accuracy of dense attention, and of each method by measured sparsity."""

    title: str
    dense: float
    lines: dict[str, list[tuple[float, float]]]


def sparsity_curves(title: str, panels: Sequence[Panel]) -> str:
    """Draw the panels, two in a row; axes go from 0 to 1, and a dashed line is dense attention."""
    rows = -(-len(panels) // ACROSS)
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    words = "; ".join(f"{panel.title}: dense {panel.dense:.2f}" for panel in panels)
    root = canvas(title, f"{words}.", 52 + rows * HEIGHT)
    add(root, "style", STYLE)
    x = 16.0
    for index, name in enumerate(names):
        add(root, "line", x1=x, x2=x + 18, y1=20, y2=20, stroke=_colour(index), stroke_width=3)
        write(root, name, x + 23, 24)
        x += 40 + SMALL_CHARACTER * len(name)
    add(root, "line", x1=x, x2=x + 18, y1=20, y2=20, class_="dense")
    write(root, "dense", x + 23, 24)
    for index, panel in enumerate(panels):
        left = 52 + (index % ACROSS) * WIDTH / ACROSS
        _panel(root, panel, names, left, 44 + (index // ACROSS) * HEIGHT)
    return text_of(root)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _panel(root: ET.Element, panel: Panel, names: Sequence[str], left: float, top: float) -> None:
    wide, ceiling, floor = WIDTH / ACROSS - 70, top + 22, top + HEIGHT - 52

    def place(sparsity: float, accuracy: float) -> tuple[float, float]:
        return left + wide * min(max(sparsity, 0.0), 1.0), floor - (floor - ceiling) * accuracy

    write(root, panel.title, left, top + 12, "label")
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = place(tick, tick)
        add(root, "line", x1=left, x2=left + wide, y1=y, y2=y, class_="grid")
        write(root, f"{tick:g}", left - 6, y + 4, anchor="end")
        write(root, f"{tick:.0%}", x, floor + 16, anchor="middle")
    write(root, "measured sparsity", left + wide / 2, floor + 32, anchor="middle")
    _, level = place(0, panel.dense)
    add(root, "line", x1=left, x2=left + wide, y1=level, y2=level, class_="dense")
    for name, points in panel.lines.items():
        colour = _colour(names.index(name))
        placed = [place(*point) for point in sorted(points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        add(root, "polyline", points=path, class_="curve", stroke=colour)
        for (x, y), (sparsity, accuracy) in zip(placed, sorted(points), strict=True):
            dot = add(root, "circle", cx=x, cy=y, r=3, fill=colour)
            add(dot, "title", f"{name}: {accuracy:.2f} at {sparsity:.0%}")
