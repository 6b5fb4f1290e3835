"""Documents as tables and bars for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from rich import box
from rich.table import Table
from rich.text import Text

from intaglio.report import svg
from intaglio.report.formatting import BY_KEY, Cell, Change, cell_of, percent, plain_number, rows
from intaglio.report.schema import (
    LIVE,
    TIE,
    ZEROS,
    Document,
    about_zeros,
    checked,
    finite,
    has_left_out,
    is_best,
    value_of,
    variant_name,
)

VERDICT_STYLE = {"better": "green", "worse": "red", "": ""}


def _table(title: str, caption: str, columns: Sequence[tuple[str, Literal["left", "right"]]]) -> Table:
    table = Table(
        title=Text(title, style="bold"),
        caption=Text(caption, style="dim"),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for name, justify in columns:
        table.add_column(Text(name), justify=justify, overflow="fold")
    return table


def _cell_text(cell: Cell) -> Text:
    return Text(cell.text) if not cell.why else Text(f"{cell.text} {cell.why}", style="dim")


def _change_text(change: Change) -> Text:
    return Text(f"{change.text} {change.verdict}".rstrip(), style=VERDICT_STYLE[change.verdict])


def _two_sides(
    title: str, caption: str, names: Sequence[str], before: Document, after: Document, baked: bool = False
) -> Table:
    table = _table(title, caption, [("measure", "left"), *((name, "right") for name in names)])
    for row in rows(before, after, baked):
        table.add_row(Text(row.measure.name), _cell_text(row.before), _cell_text(row.after), _change_text(row.change))
    return table


def carve_table(document: Document) -> Table:
    """Return the table measure | before | after | change of a carve document."""
    document = checked(document, "carve")
    caption = " ".join([about_zeros(document["after"]), LIVE if document["kind"] == "runtime" else ""]).strip()
    names, baked = ("before", "after", "change"), document["kind"] == "standalone"
    return _two_sides(document["title"], caption, names, document["before"], document["after"], baked)


def compare_table(document: Document) -> Table:
    """Return the table measure | A | B | B against A of a compare document."""
    document = checked(document, "compare")
    a, b = document["a"], document["b"]
    title = f"{document['title']}\nA: {a.get('model', 'not named')}\nB: {b.get('model', 'not named')}"
    return _two_sides(title, ZEROS, ("A", "B", "B against A"), a, b)


DEMO_COLUMNS = ("perplexity", "top1_agreement", "kl_mean", "cosine", "zero_fraction", "bytes", "decode_tokens_per_s")
# Headings with the unit, on two lines, so that a row fits into 80 characters.
NARROW = {
    "kl_mean": ("KL,\nnats", " nats"),
    "top1_agreement": ("same\nchoice", ""),
    "bytes": ("size", ""),
    "decode_tokens_per_s": ("decode,\ntok/s", " tok/s"),
}


def demo_table(document: Document) -> Table:
    """Return the table of a demo document: the dense model, then a row per variant, the best of each amount starred.

    Columns without a number are dropped; a size that all rows share, or all but some of one other size, is in the
    caption. Variants that skip inputs show that share instead of zeros.
    """
    document = checked(document, "demo")
    dense, variants = document["dense"], document["variants"]
    used = [key for key in DEMO_COLUMNS if any(value_of(side, key) is not None for side in (dense, *variants))]
    narrow = NARROW | ({"zero_fraction": ("zeros or\nleft out", "")} if has_left_out(variants) else {})
    caption = f"* the best of its amount, all within {percent(TIE)} of the lowest perplexity. "
    others = {variant_name(v): v for v in variants if value_of(v, "bytes") != value_of(dense, "bytes")}
    if len({value_of(side, "bytes") for side in others.values()}) <= 1 and "bytes" in used:
        used.remove("bytes")
        size = BY_KEY["bytes"]
        sizes = f"Size on disk of each: {cell_of(dense, size, False, False).text}"
        sizes += "".join(f"; of {name}: {cell_of(side, size, False, False).text}" for name, side in others.items())
        caption += f"{sizes}. "
    table = _table(document["title"], caption + ZEROS, [("variant", "left")])
    for key in used:
        heading, _ = narrow.get(key, (BY_KEY[key].name.lower(), ""))
        table.add_column(Text(heading), justify="right", no_wrap=True)
    table.add_column(Text("took,\ns"), justify="right", no_wrap=True)

    def cells(side: Document) -> list[Text]:
        left = value_of(side, "activation_sparsity")
        values = ((key, left if key == "zero_fraction" and left is not None else value_of(side, key)) for key in used)
        words = (("-" if v is None else BY_KEY[k].show(v)).removesuffix(NARROW.get(k, ("", ""))[1]) for k, v in values)
        seconds = finite(side.get("seconds"))
        took = "-" if seconds is None else f"{seconds:,.{1 if seconds < 10 else 0}f}"
        return [*map(Text, words), Text(took)]

    table.add_row(Text("dense"), *cells(dense), end_section=True)
    for position, variant in enumerate(variants):
        best = is_best(document, variant)
        name = Text(f"{variant_name(variant)}{' *' if best else ''}", style="bold" if best else "")
        last = position + 1 < len(variants) and variants[position + 1].get("amount") != variant.get("amount")
        table.add_row(name, *cells(variant), end_section=last)
    return table


def variant_bars(document: Document, key: str, name: Callable[[Document], str], mark: bool) -> list[svg.Bar]:
    """Return a metric of every variant of a demo as bars."""
    bars = []
    for variant in document["variants"]:
        value, best = value_of(variant, key), mark and is_best(document, variant)
        text = "not finite or not measured" if value is None else f"{BY_KEY[key].show(value)}{' best' if best else ''}"
        bars.append(svg.Bar(name(variant), value, text, str(variant.get("amount", "")), best))
    return bars


def demo_chart(document: Document) -> svg.TerminalBars:
    """Return the perplexities of a demo document as terminal bars on a log scale, readable without colour."""
    document = checked(document, "demo")
    dense = value_of(document["dense"], "perplexity")
    text = "not finite or not measured" if dense is None else plain_number(dense)
    items = (
        svg.Bar("dense", dense, text, "dense"),
        *variant_bars(document, "perplexity", variant_name, mark=True),
    )
    values = [bar.value for bar in items if bar.value is not None and svg.LEAST <= bar.value <= svg.MOST]
    low, high = svg.nice_range(values)
    return svg.TerminalBars(f"Perplexity, log scale from {low:,g} (lower is better)", items, low, high)
