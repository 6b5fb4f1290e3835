"""Accuracy under sparse attention as SVG: against measured sparsity, and against the operations it takes."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from intaglio.report.svg import SMALL_CHARACTER, WIDTH, add, canvas, log_ticks, nice_range, text_of, write

HEIGHT, ACROSS = 264.0, 2
COLOURS = ("#9c4519", "#2f6473", "#7a6a17", "#6b3f77", "#3d6b35", "#8a2f45", "#5a5a5a", "#8c8c8c", "#1d1a17")
DENSE = "#b9a38a"
CORNERS = (24, 4, 3)
"""Corners of the marks of the first, second and third model."""
STYLE = """
.picture { font-family: system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif;
  background: #fdfcfa; } .picture text { fill: #1d1a17; font-size: 13px; } .picture .small { font-size: 11.5px;
  fill: #6a635b; } .picture .label { font-weight: 600; } .picture .grid { stroke: #e0dad0; }
.picture .dense { stroke: #b9a38a; stroke-dasharray: 4 3; fill: none; } .picture .curve { fill: none;
  stroke-width: 1.8; } .picture .best { fill: none; stroke: #1d1a17; stroke-width: 1.2; }
"""


@dataclass(frozen=True)
class Series:
    """Points `(x, accuracy)` of a method with a model."""

    method: str
    model: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Panel:
    """Series of a panel; the accuracy of dense attention is a line, and points of `best` are encircled."""

    title: str
    subtitle: str
    series: tuple[Series, ...]
    dense: float | None = None
    best: tuple[tuple[float, float], ...] = field(default=())


@dataclass(frozen=True)
class _Axis:
    """Name of an axis, its marks, and the share of its length at which a value lies."""

    name: str
    marks: Sequence[tuple[float, str]]
    share: Callable[[float], float]


def sparsity_curves(title: str, panels: Sequence[Panel]) -> str:
    """Draw a line for each method over the measured sparsity; the dashed line is dense attention."""
    marks = [(mark, f"{mark:.0%}") for mark in (0.0, 0.25, 0.5, 0.75, 1.0)]
    axis = _Axis("measured sparsity", marks, lambda value: min(max(value, 0.0), 1.0))
    return _figure(title, panels, lambda panel: axis, lines=True)


def operation_dots(title: str, panels: Sequence[Panel]) -> str:
    """Draw a dot for each point over its operations, on a log scale; models differ by the shape of their dots."""

    def axis(panel: Panel) -> _Axis:
        low, high = nice_range([x for series in panel.series for x, _ in series.points])
        marks = [(mark, f"{mark:.0e}".replace("e+", "e")) for mark in log_ticks(low, high, 5)]
        return _Axis("operations", marks, lambda value: math.log(value / low) / math.log(high / low))

    return _figure(title, panels, axis, lines=False)


def _figure(title: str, panels: Sequence[Panel], axis: Callable[[Panel], _Axis], *, lines: bool) -> str:
    methods = list(dict.fromkeys(series.method for panel in panels for series in panel.series))
    models = list(dict.fromkeys(series.model for panel in panels for series in panel.series))
    names = [*methods, *(["dense"] if lines else []), *(models if not lines and len(models) > 1 else [])]
    places, x, row = [], 16.0, 0
    for name in names:
        wide = 40 + SMALL_CHARACTER * len(name)
        if x > 16 and x + wide > WIDTH:
            x, row = 16.0, row + 1
        places.append((x, 20.0 + 18 * row))
        x += wide
    top = 44.0 + 18 * row
    words = "; ".join(
        f"{panel.title}, {panel.subtitle}" + ("" if panel.dense is None else f": dense {panel.dense:.2f}")
        for panel in panels
    )
    root = canvas(title, f"{words}.", top + 8 + -(-len(panels) // ACROSS) * HEIGHT)
    add(root, "style", STYLE)
    for name, (left, y) in zip(names, places, strict=True):
        if name in models:
            _mark(root, left + 9, y, 5, CORNERS[models.index(name) % len(CORNERS)], class_="best")
        elif name in methods:
            add(root, "line", x1=left, x2=left + 18, y1=y, y2=y, stroke=_colour(name, methods), stroke_width=3)
        else:
            add(root, "line", x1=left, x2=left + 18, y1=y, y2=y, class_="dense")
        write(root, name, left + 23, y + 4)
    for index, panel in enumerate(panels):
        left, at = 52 + (index % ACROSS) * WIDTH / ACROSS, top + (index // ACROSS) * HEIGHT
        _panel(root, panel, axis(panel), methods, models, left, at, lines=lines)
    return text_of(root)


def _colour(method: str, methods: Sequence[str]) -> str:
    if method == "dense":
        return DENSE
    return COLOURS[[name for name in methods if name != "dense"].index(method) % len(COLOURS)]


def _mark(parent: ET.Element, x: float, y: float, radius: float, corners: int, **attributes: str) -> ET.Element:
    angles: Iterable[float] = (math.pi * (2 * corner / corners - 0.5) for corner in range(corners))
    points = " ".join(f"{x + radius * math.cos(a):.1f},{y + radius * math.sin(a):.1f}" for a in angles)
    return add(parent, "polygon", points=points, **attributes)


def _panel(
    root: ET.Element,
    panel: Panel,
    axis: _Axis,
    methods: Sequence[str],
    models: Sequence[str],
    left: float,
    top: float,
    *,
    lines: bool,
) -> None:
    wide, ceiling, floor = WIDTH / ACROSS - 70, top + 36, top + HEIGHT - 52

    def place(value: float, accuracy: float) -> tuple[float, float]:
        return left + wide * axis.share(value), floor - (floor - ceiling) * accuracy

    write(root, panel.title, left, top + 12, "label")
    write(root, panel.subtitle, left, top + 27)
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = floor - (floor - ceiling) * tick
        add(root, "line", x1=left, x2=left + wide, y1=y, y2=y, class_="grid")
        write(root, f"{tick:g}", left - 6, y + 4, anchor="end")
    for value, text in axis.marks:
        write(root, text, left + wide * axis.share(value), floor + 16, anchor="middle")
    write(root, axis.name, left + wide / 2, floor + 32, anchor="middle")
    if panel.dense is not None:
        _, level = place(axis.marks[0][0], panel.dense)
        add(root, "line", x1=left, x2=left + wide, y1=level, y2=level, class_="dense")
    for series in panel.series:
        colour, points = _colour(series.method, methods), sorted(series.points)
        if lines:
            path = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in points)
            add(root, "polyline", points=path, class_="curve", stroke=colour)
        corners = CORNERS[models.index(series.model) % len(CORNERS)]
        for value, accuracy in points:
            dot = _mark(root, *place(value, accuracy), 3.5, corners, fill=colour)
            at = f"{value:.0%}" if lines else f"{value:.2g} operations"
            add(dot, "title", f"{series.model} {series.method}: {accuracy:.2f} at {at}")
    for point in panel.best:
        _mark(root, *place(*point), 7, CORNERS[0], class_="best")
