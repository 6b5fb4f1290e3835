"""Inline SVG for the reports (heatmap, horizontal bars, before/after pairs), and bars for the terminal.

Each drawing function returns one `<svg>` element as text, with `role="img"`, a `<title>` and a `<desc>`. Colours and
fonts come from the classes of the page's style sheet, so that a picture follows its light, dark and print palettes.
Numbers appear as text: nothing relies on colour alone.
"""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

Anchor = Literal["start", "middle", "end"]
WIDTH = 900.0
# Mean advance of a character at the pictures' two text sizes: SVG has no layout, so margins are estimated.
LABEL_CHARACTER = 7.7
SMALL_CHARACTER = 6.8
LONGEST_LABEL = 34
# The darkest cell is still light enough for the ink of a number on it, in both palettes.
HEAT_OPACITY = 0.72
# Limits of an axis; values beyond are drawn at its end.
LEAST, MOST = 1e-12, 1e15
# XML forbids control characters and surrogates, even escaped.
_FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def clean_text(text: str) -> str:
    """Return `text` with characters invalid in XML (control characters, lone surrogates) replaced by U+FFFD."""
    return _FORBIDDEN.sub("\ufffd", text)


def _shorten(text: str, longest: int = LONGEST_LABEL) -> str:
    text = clean_text(text)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def add(parent: ET.Element, tag: str, text: str | None = None, **attributes: float | str) -> ET.Element:
    """Add an element and return it."""
    named = {
        key.rstrip("_").replace("_", "-"): value if isinstance(value, str) else _number(value)
        for key, value in attributes.items()
    }
    child = ET.SubElement(parent, tag, named)
    child.text = None if text is None else clean_text(text)
    return child


def write(
    parent: ET.Element,
    text: str,
    x: float,
    y: float,
    kind: str = "small",
    anchor: Anchor = "start",
) -> None:
    """Add a text."""
    add(parent, "text", text, x=x, y=y, class_=kind, text_anchor=anchor)


def canvas(title: str, description: str, height: float, width: float = WIDTH) -> ET.Element:
    """Return an empty picture."""
    # Ids must differ between the pictures of a page, and be reproducible.
    key = sha256(f"{title}\n{description}".encode("utf-8", "replace")).hexdigest()[:10]
    root = ET.Element(
        "svg",
        {
            "viewBox": f"0 0 {_number(width)} {_number(height)}",
            "role": "img",
            "aria-labelledby": f"t{key} d{key}",
            "class": "picture",
        },
    )
    add(root, "title", title, id=f"t{key}")
    add(root, "desc", description, id=f"d{key}")
    return root


def text_of(root: ET.Element) -> str:
    """Return the picture as text."""
    return ET.tostring(root, encoding="unicode")


def heatmap(
    title: str,
    description: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Mapping[tuple[str, str], float],
    *,
    column_title: str,
    summaries: Mapping[str, str] | None = None,
) -> str:
    """Draw shares as a grid of cells, darker for larger ones, with a scale below.

    A cell shows its number where it is wide enough, and always has a tooltip; a missing cell is blank.
    """
    left = 16 + LABEL_CHARACTER * max((len(_shorten(row)) for row in rows), default=0)
    right = 16 + LABEL_CHARACTER * max((len(text) for text in (summaries or {}).values()), default=0)
    cell = min((WIDTH - left - right) / max(1, len(columns)), 92.0)
    tall = min(max(cell, 18.0), 26.0)
    gap = 2.0 if cell > 8 else 0.5
    top = 40.0
    root = canvas(title, description, top + tall * len(rows) + 54)
    write(root, column_title, left, 14)
    longest = max((len(column) for column in columns), default=1)
    needed = SMALL_CHARACTER * min(longest, 16) + 4
    stride = next((n for n in (1, 2, 5, 10, 20, 50) if n * cell >= needed), 100)
    for position, column in enumerate(columns):
        if position % stride == 0:
            middle = left + cell * (position + 0.5)
            write(root, _shorten(column, 16), middle, 32, anchor="middle")
    for line, row in enumerate(rows):
        y = top + tall * line
        write(root, _shorten(row), left - 8, y + tall / 2 + 4, "code", "end")
        for position, column in enumerate(columns):
            if (row, column) in values:
                share = min(max(values[row, column], 0.0), 1.0)
                _cell(root, left + cell * position, y, cell - gap, tall - gap, share, f"{column_title} {column}, {row}")
        if summaries and row in summaries:
            x = left + cell * len(columns) + 8
            write(root, summaries[row], x, y + tall / 2 + 4, "label")
    _scale(root, left, top + tall * len(rows) + 18)
    return text_of(root)


def _cell(root: ET.Element, x: float, y: float, wide: float, tall: float, share: float, name: str) -> None:
    rectangle = add(
        root, "rect", x=x, y=y, width=wide, height=tall, rx=2, class_="cell", fill_opacity=f"{HEAT_OPACITY * share:.3f}"
    )
    add(rectangle, "title", f"{name}: {100 * share:.2f} %")
    if wide >= 46:
        write(root, f"{100 * share:.1f} %", x + wide / 2, y + tall / 2 + 4, "small on", "middle")


def _scale(root: ET.Element, x: float, y: float) -> None:
    for step in range(5):
        left = x + 58.0 * step
        shade = f"{HEAT_OPACITY * step / 4:.3f}"
        add(root, "rect", x=left, y=y, width=14, height=14, rx=2, class_="cell", fill_opacity=shade)
        write(root, f"{25 * step} %", left + 19, y + 11)


_LAYER = re.compile(r"(?:^|.*?\.)layers?\.(\d+)\.(.+)")


def layer_grid(zero_fraction: Mapping[str, float]) -> tuple[list[str], list[str], dict[tuple[str, str], float]]:
    """Arrange measurements by layer name as `(projections, layers, {(projection, layer): share})`."""
    values: dict[tuple[str, str], float] = {}
    for name, share in zero_fraction.items():
        match = _LAYER.fullmatch(clean_text(name))
        if match is not None:
            values[match[2], match[1]] = share
    projections = list(dict.fromkeys(row for row, _ in values))
    layers = sorted({column for _, column in values}, key=int)
    return projections, layers, values


@dataclass(frozen=True)
class Bar:
    """A horizontal bar; a value of None draws only the text.

    A heading is drawn where `group` changes. `strong` uses the accent colour; the text must say why.
    """

    label: str
    value: float | None
    text: str
    group: str = ""
    strong: bool = False


def nice_range(values: Sequence[float]) -> tuple[float, float]:
    """Return the nearest of 1, 2, 5 times a power of ten strictly below and at or above positive values."""
    if not values:
        return 1.0, 10.0
    low, high = min(values), max(values)

    def ladder(value: float) -> list[float]:
        # Parsed from decimal text, so that a rung equals its label.
        decade = math.floor(math.log10(value))
        return [float(f"{m}e{e}") for e in (decade - 1, decade, decade + 1) for m in (1, 2, 5)]

    return max(rung for rung in ladder(low) if rung < low), min(rung for rung in ladder(high) if rung >= high)


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Return round numbers from at or below `low` to at or above `high`, at steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9)), 10 * power)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Return round numbers from `low` to `high` for a log axis: 1, 2, 5 per decade, fewer over a long range."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    choices: list[tuple[tuple[int, ...], int]] = [((1, 2, 5), 1), ((1,), 1), ((1,), 2), ((1,), 5)]
    for multiples, stride in [*choices, ((1,), max(1, (last - first) // 4))]:
        ticks = [float(f"{m}e{e}") for e in range(first, last + 1, stride) for m in multiples]
        ticks = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
        if len(ticks) <= most:
            return ticks
    return ticks[:most]


def bars(
    title: str,
    description: str,
    items: Sequence[Bar],
    *,
    axis: str,
    scale: Literal["log", "linear"] = "linear",
    ticks: Sequence[tuple[float, str]] | None = None,
    reference: tuple[float, str] | None = None,
) -> str:
    """Draw horizontal bars over an axis."""
    if ticks is None:
        values = [bar.value for bar in items if bar.value is not None] + ([reference[0]] if reference else [])
        low, high = nice_range([value for value in values if LEAST <= value <= MOST])
        ticks = [(t, f"{t:,g}" if t < 1e6 else f"{t:.0e}".replace("e+0", "e")) for t in log_ticks(low, high)]
        if scale == "linear":
            ticks = [(high * step / 5, f"{high * step / 5:,g}") for step in range(6)]
            low = 0.0
    else:
        low, high = ticks[0][0], ticks[-1][0]
    left = 16 + LABEL_CHARACTER * max((len(_shorten(bar.label)) for bar in items), default=0)
    right = 22 + LABEL_CHARACTER * max((len(bar.text) for bar in items), default=0)
    span = WIDTH - left - right

    def x_of(value: float) -> float:
        clamped = min(max(value, low), high)
        share = (clamped - low) / (high - low) if scale == "linear" else math.log(clamped / low) / math.log(high / low)
        return left + span * share

    line, head, top = 26.0, 26.0, 30.0
    groups = len([1 for k, bar in enumerate(items) if bar.group and (k == 0 or items[k - 1].group != bar.group)])
    bottom = top + line * len(items) + head * groups
    root = canvas(title, description, bottom + 46)
    for value, text in ticks:
        add(root, "line", x1=x_of(value), x2=x_of(value), y1=top - 4, y2=bottom + 2, class_="grid")
        write(root, text, x_of(value), bottom + 18, anchor="middle")
    write(root, axis, left, bottom + 38)
    y = top
    for position, bar in enumerate(items):
        if bar.group and (position == 0 or items[position - 1].group != bar.group):
            write(root, _shorten(bar.group), 0, y + 18, "heading")
            y += head
        end = left if bar.value is None or bar.value <= 0 else x_of(bar.value)
        write(root, _shorten(bar.label), left - 8, y + 16, "label", "end")
        if end > left:
            kind = "bar strong" if bar.strong else "bar"
            add(root, "rect", x=left, y=y + 4, width=end - left, height=line - 8, rx=2, class_=kind)
        write(root, bar.text, end + 8, y + 16, "label strong" if bar.strong else "label")
        y += line
    if reference is not None:
        x_reference = x_of(reference[0])
        add(root, "line", x1=x_reference, x2=x_reference, y1=top - 6, y2=bottom + 2, class_="reference")
        write(root, reference[1], x_reference, top - 12, anchor="start" if x_reference < left + 60 else "middle")
    return text_of(root)


@dataclass(frozen=True)
class Point:
    """A labelled point of a scatter plot; `x` is positive."""

    label: str
    x: float
    y: float


def scatter(title: str, description: str, points: Sequence[Point], *, x_axis: str, y_axis: str) -> str:
    """Draw labelled points over a log x axis and a linear y axis from zero."""
    low, high = nice_range([min(max(point.x, LEAST), MOST) for point in points])
    marks = ticks(0.0, max((point.y for point in points), default=0.0) or 1.0, 5)
    left, right, top, height = 64.0, 24.0, 34.0, 240.0
    span = WIDTH - left - right
    root = canvas(title, description, top + height + 50)
    write(root, y_axis, left, 16)
    for mark in marks:
        y = top + height * (1 - mark / marks[-1])
        add(root, "line", x1=left, x2=WIDTH - right, y1=y, y2=y, class_="grid")
        write(root, f"{mark:g}", left - 8, y + 4, anchor="end")
    for mark in log_ticks(low, high):
        write(
            root,
            f"{mark:,g}",
            left + span * math.log(mark / low) / math.log(high / low),
            top + height + 18,
            anchor="middle",
        )
    write(root, x_axis, left, top + height + 40)
    placed: list[tuple[float, float, float]] = []
    for point in sorted(points, key=lambda point: (-point.y, point.x)):
        x = left + span * math.log(min(max(point.x, low), high) / low) / math.log(high / low)
        y = top + height * (1 - min(max(point.y, 0.0), marks[-1]) / marks[-1])
        dot = add(root, "circle", cx=x, cy=y, r=5, class_="dot")
        add(dot, "title", f"{point.label}: {point.y:.3f} at {point.x:,.3g}")
        wide = LABEL_CHARACTER * len(_shorten(point.label))
        middle = min(max(x, left + wide / 2), WIDTH - wide / 2)
        label = y - 10
        while any(abs(label - other) < 16 and abs(middle - at) < (wide + width) / 2 for at, other, width in placed):
            label += 16 if label > y else 28  # below the dot
        placed.append((middle, label, wide))
        write(root, _shorten(point.label), middle, label, "label", "middle")
    return text_of(root)


@dataclass(frozen=True)
class Pair:
    """A quantity before and after; a value of None draws no bar. The label holds the direction ("lower is better")."""

    label: str
    before: float | None
    after: float | None
    before_text: str
    after_text: str


def pairs(title: str, description: str, items: Sequence[Pair], names: tuple[str, str] = ("before", "after")) -> str:
    """Draw a pair of bars for each quantity, each pair on a scale of its own from zero."""
    left = 24 + LABEL_CHARACTER * max((len(_shorten(item.label)) for item in items), default=0)
    name = 8 + SMALL_CHARACTER * max(len(text) for text in names)
    right = 22 + LABEL_CHARACTER * max((len(text) for i in items for text in (i.before_text, i.after_text)), default=0)
    span = WIDTH - left - name - right
    root = canvas(title, description, 54.0 * len(items) + 8)
    for position, item in enumerate(items):
        y = 54.0 * position + 8
        longest = max(item.before or 0.0, item.after or 0.0)
        write(root, _shorten(item.label), left - 16, y + 26, "label", "end")
        sides = ((item.before, item.before_text, "bar"), (item.after, item.after_text, "bar strong"))
        for line, (value, text, kind) in enumerate(sides):
            at = y + 20 * line
            long = span * min(max(value or 0.0, 0.0) / longest, 1.0) if longest > 0 else 0.0
            write(root, names[line], left + name - 8, at + 14, anchor="end")
            if long > 0:
                add(root, "rect", x=left + name, y=at + 2, width=long, height=16, rx=2, class_=kind)
            write(root, text, left + name + long + 8, at + 14, "label")
    return text_of(root)


@dataclass(frozen=True)
class TerminalBars:
    """Bars of text on a log scale from `low` to `high`; made of `#` where the terminal has no block characters."""

    title: str
    items: tuple[Bar, ...]
    low: float
    high: float

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield a line per bar, fitted to the width of the console."""
        block = "#" if options.ascii_only else "█"
        names = max((len(bar.label) for bar in self.items), default=0)
        names = min(names, max(8, options.max_width // 2))
        texts = max((len(bar.text) for bar in self.items), default=0)
        max_length = max(1, min(60, options.max_width - names - texts - 3))
        yield Text(self.title, style="bold")
        for position, bar in enumerate(self.items):
            if position and bar.group != self.items[position - 1].group:
                yield Text("")
            length = 0
            if bar.value is not None and bar.value > self.low:
                share = math.log(bar.value / self.low) / math.log(self.high / self.low)
                length = max(1, round(max_length * min(share, 1.0)))
            line = Text(f"{bar.label[:names]:<{names}} ")
            line.append(block * length, style="cyan" if bar.strong else "bright_black")
            line.append(f" {bar.text}", style="bold" if bar.strong else "")
            yield line
