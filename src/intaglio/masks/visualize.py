"""Mask visualisation: what each layer sees, as a picture and as data, for `intaglio inspect MODEL --masks`.

Layers with the same mask are shown once. The picture is self-contained, with light and dark colours.

Dimension letters: N layers, H heads, Q query positions, K key positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

import torch
from rich.text import Text
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from intaglio.masks.registry import describe
from intaglio.masks.rules import Rule
from intaglio.masks.visibility import get_visibility, stock_masks
from intaglio.modeling.anatomy import anatomy
from intaglio.report.svg import clean_text

LENGTH = 32
"""Tokens shown by default; a longer window needs more."""
WIDTH, SIDE, GAP, ACROSS = 900, 190, 34, 4
STRIP = 26
MOST_CELLS = 96
"""Rows and columns of a panel; of longer masks a cell is the share of the pairs in it."""
_SHADES = ("var(--a)", "var(--b)", "var(--c)", "var(--d)", "var(--e)", "var(--f)")
_STYLE = """
.masks { --ink: #1d1a17; --muted: #6a635b; --rule: #e0dad0; --paper: #fdfcfa; --bare: #f1ece4;
  --a: #9c4519; --b: #2f6473; --c: #7a6a17; --d: #6b3f77; --e: #3d6b35; --f: #8a2f45;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; background: var(--paper); }
@media screen and (prefers-color-scheme: dark) { .masks { --ink: #ece7e0; --muted: #a79e93; --rule: #3a352f;
  --paper: #161412; --bare: #24201c;
  --a: #eba06f; --b: #7fb9c9; --c: #d2bf62; --d: #c49bd0; --e: #93c389; --f: #e28aa0; } }
.masks text { fill: var(--ink); font-size: 13px; } .masks .small { font-size: 11.5px; fill: var(--muted); }
.masks .strong { font-weight: 600; font-size: 15px; }
.masks .frame { fill: none; stroke: var(--rule); } .masks .bare { fill: var(--bare); }
.masks .diagonal { stroke: var(--muted); stroke-width: 0.75; stroke-dasharray: 3 3; }
"""


@dataclass(frozen=True, eq=False)
class Group:
    """Layers with the same mask: their indices, rule (None: the model's own), sliding window, and mask.

    The mask has H = 1 where all heads agree. A `label` replaces the description and the share;
    then cells may be shares.
    """

    layers: tuple[int, ...]
    rule: Rule | None
    window: int | None
    seen_HQK: Tensor
    label: str = ""

    @property
    def name(self) -> str:
        """Description of the mask."""
        if self.label:
            return self.label
        if self.rule is not None:
            words = describe(self.rule)
            wide = self.rule.ignores_window
        else:
            right, left = self.is_noncausal, bool(self.seen_HQK.tril(-1).any())
            words, wide = "both ways" if right and left else "causal" if left else "itself", False
            if not bool(self.seen_HQK.any()):
                return "no attention mask (a recurrent or convolution layer)"
        window = f", window {self.window}" if self.window is not None and not wide else ""
        return f"{words}{window}" + (" (stock)" if self.rule is None else "")

    @property
    def is_noncausal(self) -> bool:
        """Whether a query sees a later key, among the positions shown."""
        return bool(self.seen_HQK.triu(1).any())

    @property
    def share(self) -> float:
        """The visible share of all pairs of positions."""
        return float(self.seen_HQK.float().mean())

    @property
    def where(self) -> str:
        """The layers as short text: `0–3, 8`."""
        runs: list[list[int]] = []
        for layer in self.layers:
            if runs and layer == runs[-1][-1] + 1:
                runs[-1].append(layer)
            else:
                runs.append([layer])
        return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def groups(model: nn.Module, length: int = LENGTH) -> list[Group]:
    """Return the groups of layers with the same mask, in the order of their first layer."""
    windows, rules = anatomy(model).windows, get_visibility(model)
    result: list[Group] = []
    none_HQK = torch.zeros((1, length, length), dtype=torch.bool)
    for layer, seen in enumerate(stock_masks(model, length)):
        seen_HQK = none_HQK if seen is None else seen
        small_HQK = seen_HQK[:1] if bool((seen_HQK == seen_HQK[:1]).all()) else seen_HQK
        rule, window = rules.get(layer), windows[layer]
        for index, group in enumerate(result):
            same = (group.rule, group.window) == (rule, window) and torch.equal(group.seen_HQK, small_HQK)
            if same:
                result[index] = Group((*group.layers, layer), rule, window, small_HQK)
                break
        else:
            result.append(Group((layer,), rule, window, small_HQK))
    return result


def as_json(groups: list[Group]) -> list[dict[str, Any]]:
    """Return the groups as plain data: layers, rule, window, and rows of 0 and 1 for each head (or all heads)."""
    return [
        {
            "layers": list(group.layers),
            "name": group.name,
            "rule": None if group.rule is None else group.rule.to_dict(),
            "window": group.window,
            "is_noncausal": group.is_noncausal,
            "share": group.share,
            "visible": [["".join("01"[int(cell)] for cell in row) for row in head] for head in group.seen_HQK.tolist()],
        }
        for group in groups
    ]


def drawing(group: Group, most: int = 24) -> Text:
    """Return a small drawing for the terminal: one character per key, two queries per line, heads overlaid."""
    seen_QK = group.seen_HQK.any(0)[:most, :most]
    rows = []
    for upper, lower in zip(seen_QK[::2], seen_QK[1::2], strict=False):
        cells = zip(upper.tolist(), lower.tolist(), strict=True)
        rows.append("".join("█" if a and b else "▀" if a else "▄" if b else "·" for a, b in cells))
    return Text("\n".join(rows))


def svg(title: str, groups: list[Group], axes: str = "queries down and keys across") -> str:
    """Draw the masks as SVG: a strip of all layers, and a panel for each group, queries down, keys across.

    Where heads differ, a cell's darkness is the share of heads that see it. `axes` names other axes.
    """
    depth = sum(len(group.layers) for group in groups)
    rows = -(-len(groups) // ACROSS)
    top = 110
    height = top + rows * (SIDE + 78) + 16
    length = groups[0].seen_HQK.shape[-1]
    title = clean_text(title)
    description = "; ".join(f"layers {group.where}: {group.name}" for group in groups)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" class="masks" '
        f'aria-label="{escape(f"What each layer of {title} sees: {description}", quote=True)}">',
        f"<title>{escape(f'What each layer of {title} sees')}</title><desc>{escape(description)}</desc>",
        f"<style>{_STYLE}</style>",
        _text(16, 28, _truncate(title, 90), "strong"),
        _text(
            16,
            48,
            f"Layers from the input (left) to the output; below, {axes}, of {length} tokens.",
            "small",
        ),
    ]
    wide = (WIDTH - 32) / depth
    shades = [_SHADES[0 if group.label else n % len(_SHADES)] for n, group in enumerate(groups)]
    shade = {layer: colour for group, colour in zip(groups, shades, strict=True) for layer in group.layers}
    for layer in range(depth):
        x = 16 + layer * wide
        parts.append(
            f'<rect x="{x:.1f}" y="60" width="{max(wide - 2, 1):.1f}" height="{STRIP}" rx="2" fill="{shade[layer]}">'
            f"<title>layer {layer}</title></rect>"
        )
        if wide > 18 or layer % 5 == 0:
            parts.append(_text(x, 60 + STRIP + 14, str(layer), "small"))
    for number, group in enumerate(groups):
        x = 16 + (number % ACROSS) * (SIDE + GAP)
        y = top + 46 + (number // ACROSS) * (SIDE + 78)
        parts += _panel(x, y, group, shades[number])
    return "".join([*parts, "</svg>\n"])


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(text)}</text>'


def _truncate(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _panel(x: float, y: float, group: Group, colour: str) -> list[str]:
    seen_QK = group.seen_HQK.float().mean(0)
    square = seen_QK.shape[0] == seen_QK.shape[1]
    if max(seen_QK.shape) > MOST_CELLS:
        rows, columns = (min(side, MOST_CELLS) for side in seen_QK.shape)
        seen_QK = adaptive_avg_pool2d(seen_QK[None], (rows, columns))[0]
    rows, columns = seen_QK.shape
    label = f"layer{'s' if len(group.layers) > 1 else ''} {group.where}"
    parts = [
        _text(x, y - 24, _truncate(label, 26)),
        f"<g><title>{escape(group.name)}</title>{_text(x, y - 8, _truncate(group.name, 32), 'small')}</g>",
        f'<rect x="{x}" y="{y}" width="{SIDE}" height="{SIDE}" class="bare"/>',
        f'<g shape-rendering="crispEdges" fill="{colour}" '
        f'transform="translate({x} {y}) scale({SIDE / columns:.5g} {SIDE / rows:.5g})">',
    ]
    parts += [f'<path fill-opacity="{level:.2f}" d="{runs}"/>' for level, runs in _runs(seen_QK)]
    parts.append("</g>")
    if square:
        parts.append(f'<line x1="{x}" y1="{y}" x2="{x + SIDE}" y2="{y + SIDE}" class="diagonal"/>')
    parts.append(f'<rect x="{x}" y="{y}" width="{SIDE}" height="{SIDE}" class="frame"/>')
    if not group.label:
        parts.append(_text(x, y + SIDE + 15, f"{group.share:.0%} of all pairs", "small"))
    return parts


def _runs(seen_QK: Tensor) -> list[tuple[float, str]]:
    """Return a path of unit cells for each share above 0, in steps of a hundredth: the runs of equal cells of a row."""
    paths: dict[float, list[str]] = {}
    for query, row in enumerate((100 * seen_QK).round().tolist()):
        key = 0
        for share, cells in groupby(row):
            width = len(list(cells))
            if share:
                paths.setdefault(share / 100, []).append(f"M{key} {query}h{width}v1h-{width}z")
            key += width
    return [(share, "".join(runs)) for share, runs in sorted(paths.items())]
