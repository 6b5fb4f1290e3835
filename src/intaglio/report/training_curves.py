"""Training curves as SVG, and their columns.

Columns are a dict of lists of equal length: `step`, `loss`, `learning_rate`, `gradient_norm`, `part/NAME` for each part
of the loss and `evaluation/NAME` for each evaluated value; None where a log line lacks the value.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from typing import Any

from intaglio.report.svg import SMALL_CHARACTER, WIDTH, add, canvas, text_of, ticks, write

Columns = Mapping[str, Sequence[float | None]]
HEIGHT = 190.0
"""Height of a panel, its axis included."""

EVALUATION, PART = "evaluation/", "part/"


def is_columns(value: Any) -> bool:
    """Return whether a value read from a file is a run's columns with at least two lines."""
    return (
        isinstance(value, Mapping)
        and all(isinstance(column, list) for column in value.values())
        and len({len(column) for column in value.values()}) == 1
        and len(value.get("step", ())) > 1
    )


def _inside(low: float, high: float, most: int = 5) -> list[float]:
    return [tick for tick in ticks(low, high, most) if low <= tick <= high]


def curves(columns: Columns) -> str:
    """Draw the curves of a run, a panel per quantity, steps from left to right.

    The training loss and an evaluated loss share a panel; each part of the loss and each other evaluated value has its
    own. The learning rate is last.
    """
    panels = _panels(columns)
    steps = [float(step or 0) for step in columns["step"]]
    words = "; ".join(f"{name}: {_told(points)}" for _, lines in panels for name, points in lines)
    root = canvas("Training curves", f"{words}.", HEIGHT * len(panels) + 22)
    first, last = min(steps), max(steps)
    left, right = 16 + 9 * SMALL_CHARACTER, max(12.0, SMALL_CHARACTER * len(f"{last:,g}") / 2)
    for number, (title, lines) in enumerate(panels):
        _panel(root, title, lines, (left, WIDTH - right), HEIGHT * number, (first, last))
    bottom = HEIGHT * len(panels) - 24
    span = WIDTH - right - left
    for tick in filter(float.is_integer, _inside(first, last) if last > first else [first]):
        write(root, f"{tick:,g}", left + span * (tick - first) / max(last - first, 1e-9), bottom + 16, anchor="middle")
    write(root, "optimizer step", left, bottom + 36)
    return text_of(root)


Line = tuple[str, list[tuple[float, float]]]


def _points(columns: Columns, name: str) -> list[tuple[float, float]]:
    pairs = zip(columns["step"], columns[name], strict=True)
    return [(float(x), float(y)) for x, y in pairs if x is not None and y is not None and math.isfinite(y)]


def _panels(columns: Columns) -> list[tuple[str, list[Line]]]:
    loss = [("training batches", _points(columns, "loss"))]
    if f"{EVALUATION}loss" in columns:
        loss.append(("held out", _points(columns, f"{EVALUATION}loss")))
    panels = [("loss", loss)]
    for name in columns:
        if name.startswith(PART):
            title = name.removeprefix(PART)
            panels.append((title, [(title, _points(columns, name))]))
        elif name.startswith(EVALUATION) and name != f"{EVALUATION}loss":
            title = name.removeprefix(EVALUATION)
            panels.append((f"{title}, evaluated", [(title, _points(columns, name))]))
    if "learning_rate" in columns:
        panels.append(("learning rate", [("learning rate", _points(columns, "learning_rate"))]))
    return [(title, lines) for title, lines in panels if any(points for _, points in lines)]


def _told(points: Sequence[tuple[float, float]]) -> str:
    if not points:
        return "no value"
    return f"{points[0][1]:.4g} at step {points[0][0]:,g}, {points[-1][1]:.4g} at step {points[-1][0]:,g}"


def _panel(
    root: ET.Element,
    title: str,
    lines: Sequence[Line],
    across: tuple[float, float],
    top: float,
    steps: tuple[float, float],
) -> None:
    values = [y for _, points in lines for _, y in points]
    low, high = min(values), max(values)
    margin = (high - low) * 0.06 or abs(high) * 0.06 or 1.0
    low, high = low - margin if low < 0 else max(0.0, low - margin), high + margin
    ceiling, floor = top + 30, top + HEIGHT - 24

    def x(step: float) -> float:
        return across[0] + (across[1] - across[0]) * (step - steps[0]) / max(steps[1] - steps[0], 1e-9)

    def y(value: float) -> float:
        return floor - (floor - ceiling) * (value - low) / (high - low)

    for tick in _inside(low, high, 4):
        add(root, "line", x1=across[0], x2=across[1], y1=y(tick), y2=y(tick), class_="grid")
        write(root, f"{tick:.4g}", across[0] - 8, y(tick) + 4, anchor="end")
    legend = ", ".join(f"{name} {'●' if number else '―'}" for number, (name, _) in enumerate(lines))
    write(root, title if len(lines) == 1 else f"{title}: {legend}", across[0], top + 18, "label")
    for number, (name, points) in enumerate(lines):
        kind = "line strong" if number else "line"
        path = " ".join(f"{x(step):.2f},{y(value):.2f}" for step, value in points)
        drawn = add(root, "polyline", points=path, class_=kind)
        add(drawn, "title", f"{name}: {_told(points)}")
        for step, value in points if number or len(points) == 1 else ():
            add(root, "circle", cx=x(step), cy=y(value), r=3, class_="dot")
