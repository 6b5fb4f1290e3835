"""Measurement documents -> one self-contained HTML page, tables for the terminal, one sentence.

A document is a plain dict, the same that is written as `report.json`. There are three: `carve` (`before`, `after`,
`steps`), `compare` (`a`, `b`) and `demo` (`dense`, `variants`). A SIDE is what was measured on one checkpoint:
`perplexity`, `bits_per_byte`, `kl_mean` (nats a token, against the original), `top1_agreement`, `cosine` (encoders),
`zero_fraction` (layer to share), `bytes`, `prefill_tokens_per_s`, `decode_tokens_per_s`, `peak_memory_bytes`,
`parameters`. A number that is null, missing or not finite is shown as a dash, with the reason where it is known.

A step or variant may bring `defaults` (field to default value): the parameters that differ from them are shown, the
others are folded away. Without `defaults`, those that are not null are shown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich import box
from rich.table import Table
from rich.text import Text

from intaglio import pictures
from intaglio.errors import IntaglioError

Document = Mapping[str, Any]
Kind = Literal["carve", "compare", "demo"]

FORMAT = 1
# Layers whose shares of zeros differ by less are said to have the same.
EVEN = 0.001
ZEROS = (
    "Zeros alone change neither bytes nor speed: a zero is stored and multiplied like any other number. "
    "What would: dropping whole blocks or units, packed N:M storage with kernels that use it, or fewer bits."
)
LIVE = (
    "A live checkpoint: part of it is put in place when it is loaded. "
    "The stock loader refuses it; intaglio.load is needed."
)
BAKED = "A baked checkpoint: plain tensors that the stock loader of transformers reads; nothing of Intaglio is needed."
NEEDED: dict[Kind, tuple[str, ...]] = {
    "carve": ("title", "model", "kind", "steps", "before", "after"),
    "compare": ("title", "a", "b"),
    "demo": ("title", "model", "dense", "variants", "best"),
}


# ---- numbers in words ----


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _plain(value: float) -> str:
    if not math.isfinite(value):
        return "beyond measure"
    size = abs(value)
    if 0 < size < 0.0005 or size >= 1e6:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    if not value:
        return "0"
    digits = 3 if size < 1 else 2 if size < 100 else 1 if size < 1000 else 0
    return f"{value:,.{digits}f}"


def _nats(value: float) -> str:
    return f"{_plain(value)} nats"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if abs(value) < 100 else f"{_plain(100 * value)} %"


def _size(value: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        # The rounded number decides, so that 999,999,999 is 1.00 GB and not 1,000 MB.
        if round(value / scale, 2 if unit != "MB" else 0) >= 1:
            scaled = value / scale
            return f"{scaled:,.{2 if scaled < 10 else 1 if scaled < 100 else 0}f} {unit}"
    return f"{value:,.0f} bytes"


def _count(value: float) -> str:
    for unit, scale in (("billion", 1e9), ("million", 1e6)):
        if value >= scale:
            return f"{value / scale:,.1f} {unit}"
    return f"{value:,.0f}"


def _speed(value: float) -> str:
    return f"{value:,.{1 if value < 100 else 0}f} tok/s"


def _duration(value: Any) -> str:
    seconds = _finite(value)
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


# ---- what is measured ----


@dataclass(frozen=True)
class Measure:
    """One number of a SIDE and how it is told.

    Args:
        key: its field.
        name: what it is called.
        hint: what it means, in a few words.
        show: the value in words, with its unit.
        better: which way is better; None for neither.
        noise: a relative change below this is called noise. Default 0: the number is exact.
        points: the change is a difference of shares, not a ratio.
        text: a property of text generation, which an encoder lacks.
    """

    key: str
    name: str
    hint: str
    show: Callable[[float], str]
    better: Literal["lower", "higher"] | None
    noise: float = 0.0
    points: bool = False
    text: bool = False


MEASURES = (
    Measure("perplexity", "Perplexity", "surprise at held-out text; lower is better", _plain, "lower", text=True),
    Measure("bits_per_byte", "Bits per byte", "the same, whatever the tokenizer", _plain, "lower", text=True),
    Measure("kl_mean", "KL divergence", "distance from the original, a token", _nats, "lower", text=True),
    Measure(
        "top1_agreement", "Same choice", "of next tokens, as the original", _percent, "higher", points=True, text=True
    ),
    Measure("cosine", "Cosine", "of embeddings to the original's; 1 is the same", _plain, "higher"),
    Measure("zero_fraction", "Zeros", "in the linears of the blocks, mean over layers", _percent, None, points=True),
    Measure("bytes", "Size on disk", "all weights, as stored", _size, "lower"),
    Measure("prefill_tokens_per_s", "Prefill", "reading a prompt", _speed, "higher", noise=0.05),
    Measure("decode_tokens_per_s", "Decode", "writing, one token at a time", _speed, "higher", noise=0.05, text=True),
    Measure("peak_memory_bytes", "Peak memory", "while it was measured", _size, "lower", noise=0.05),
    Measure("parameters", "Parameters", "zeros counted", _count, None),
)
BY_KEY = {measure.key: measure for measure in MEASURES}


@dataclass(frozen=True)
class Cell:
    """A value in words, or a dash and the reason.

    Args:
        text: the value; `-` when there is none.
        why: why there is none; empty when there is one, or when nobody knows.
    """

    text: str
    why: str = ""


@dataclass(frozen=True)
class Change:
    """What became of a value.

    Args:
        text: the difference in words.
        verdict: `better`, `worse`, or empty.
        rises: whether the value went up; None when it did not move.
    """

    text: str
    verdict: Literal["better", "worse", ""] = ""
    rises: bool | None = None


@dataclass(frozen=True)
class Row:
    """One measure on two checkpoints."""

    measure: Measure
    before: Cell
    after: Cell
    change: Change


def _value(side: Document, key: str) -> float | None:
    if key == "zero_fraction":
        shares = _shares(side)
        return math.fsum(shares) / len(shares) if shares else None
    return _finite(side.get(key))


def _fractions(side: Document) -> dict[str, float]:
    found = side.get("zero_fraction")
    items = found.items() if isinstance(found, Mapping) else ()
    return {name: share for name, value in items for share in [_finite(value)] if share is not None}


def _shares(side: Document) -> list[float]:
    return list(_fractions(side).values())


def _is_encoder(sides: Iterable[Document]) -> bool:
    return any(_value(side, "cosine") is not None for side in sides)


def _lower(name: str) -> str:
    return name if name[1].isupper() else name[0].lower() + name[1:]


def _cell(side: Document, measure: Measure, encoder: bool, original: bool) -> Cell:
    value = _value(side, measure.key)
    if value is not None:
        return Cell(measure.show(value))
    if encoder and measure.text:
        return Cell("-", f"no {_lower(measure.name)}: an encoder")
    if original and measure.key in ("kl_mean", "top1_agreement", "cosine"):
        return Cell("-", "the original")
    if measure.key == "zero_fraction":
        return Cell("-", "no layer was measured")
    return Cell("-", "not finite, or not measured" if measure.text and "token" not in measure.key else "not measured")


def _change(measure: Measure, before: float | None, after: float | None) -> Change:
    if before is None or after is None:
        return Change("-")
    if before == after:
        return Change("unchanged")
    rises = after > before
    sign = "+" if rises else "-"
    if measure.points:
        points = 100 * abs(after - before)
        text = f"{sign}{points:,.1f} points" if points >= 0.05 else f"{sign}under 0.1 points"
    elif before <= 0 or after < 0 or not math.isfinite(after / before):
        text = f"{sign}{measure.show(abs(after - before))}"
    elif after / before >= 10:
        text = f"x {_plain(after / before)}"
    else:
        share = 100 * abs(after / before - 1)
        text = f"{sign}{share:.1f} %" if share >= 0.05 else f"{sign}under 0.1 %"
    if measure.noise and before > 0 and abs(after / before - 1) < measure.noise:
        return Change(f"{text}, within noise", rises=rises)
    if measure.better is None:
        return Change(text, rises=rises)
    return Change(text, "better" if rises == (measure.better == "higher") else "worse", rises)


def _measures(sides: Sequence[Document]) -> list[Measure]:
    encoder = _is_encoder(sides)
    return [measure for measure in MEASURES if encoder or measure.key != "cosine"]


def rows(before: Document, after: Document) -> list[Row]:
    """Return every measure of two SIDEs, in order, with what changed; `cosine` only for encoders.

    Args:
        before: the SIDE that is the reference.
        after: the other.
    """
    encoder = _is_encoder((before, after))
    found = []
    for measure in _measures((before, after)):
        old, new = _cell(before, measure, encoder, original=True), _cell(after, measure, encoder, original=False)
        if old.why and old.why == new.why:
            found.append(Row(measure, Cell("-"), Cell("-"), Change(old.why)))
        else:
            change = _change(measure, _value(before, measure.key), _value(after, measure.key))
            found.append(Row(measure, old, new, change))
    return found


# ---- documents ----


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return pictures.clean_text(value)
    if isinstance(value, Mapping):
        return {pictures.clean_text(str(key)): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _checked(document: Document, kind: Kind) -> dict[str, Any]:
    if not isinstance(document, Mapping):
        raise IntaglioError(
            f"the {kind} report is a {type(document).__name__}; accepted: what report.json holds, an object"
        )
    if document.get("format") != FORMAT:
        raise IntaglioError(f"the {kind} report has format {document.get('format')!r}; accepted: {FORMAT}")
    for field in NEEDED[kind]:
        if document.get(field) is None:
            raise IntaglioError(f"the {kind} report lacks {field}; accepted: a document with {', '.join(NEEDED[kind])}")
    cleaned: dict[str, Any] = _clean(document)
    return cleaned


def _kind(document: Document) -> Kind:
    if "variants" in document:
        return "demo"
    return "compare" if "a" in document else "carve"


def _zeros_words(side: Document) -> str:
    shares = _shares(side)
    if not shares:
        return "no layer's zeros were counted"
    low, high = min(shares), max(shares)
    mean = math.fsum(shares) / len(shares)
    if high - low < EVEN:
        return f"{_percent(mean)} of the block weights are zero"
    return f"the linears of the blocks are {_percent(mean)} zero on average ({_percent(low)} to {_percent(high)})"


def _quality_words(before: Document, after: Document, reference: str) -> list[str]:
    parts = []
    cosine = _value(after, "cosine")
    old, new = _value(before, "perplexity"), _value(after, "perplexity")
    if cosine is not None:
        parts.append(f"embeddings have a mean cosine of {_plain(cosine)} to {reference}'s")
    elif old is not None and new is not None:
        parts.append(f"perplexity {_plain(old)} -> {_plain(new)}")
    else:
        parts.append("perplexity not finite or not measured")
    agreement = _value(after, "top1_agreement")
    if agreement is not None:
        same = "unchanged" if reference == "the original" else f"the same as {reference}'s"
        parts.append(f"{_percent(agreement)} of next-token choices {same}")
    return parts


def _reference(a: Document) -> str:
    """What B of a comparison was held against: A, unless A itself is at a distance from an original."""
    return "the original" if _value(a, "kl_mean") or (_value(a, "cosine") or 1.0) < 1.0 else "A"


def _best(document: Document) -> list[dict[str, Any]]:
    found = []
    for amount, slug in document["best"].items():
        found += [v for v in document["variants"] if v.get("amount") == amount and v.get("slug") == slug][:1]
    return found


def summary(document: Document) -> str:
    """Say a document in one plain sentence, ASCII but for what the document itself holds.

    Args:
        document: a carve, compare or demo document.

    Raises:
        IntaglioError: another format, or a field is missing.
    """
    kind = _kind(document)
    document = _checked(document, kind)
    if kind == "demo":
        dense = _value(document["dense"], "perplexity")
        parts = [f"perplexity {_plain(dense)} before" if dense is not None else "perplexity before not measured"]
        for variant in _best(document):
            value = _value(variant, "perplexity")
            words = _plain(value) if value is not None else "not finite"
            parts.append(f"at {variant['amount']} {_short_name(variant)} does least harm ({words})")
        parts.append("the zeros alone change neither bytes nor speed")
    elif kind == "compare":
        parts = _quality_words(document["a"], document["b"], _reference(document["a"]))
        zeros = [_cell(document[side], BY_KEY["zero_fraction"], False, False).text for side in ("a", "b")]
        parts.append(
            f"zeros ({zeros[0]} of the blocks' linears in A, {zeros[1]} in B) alone change neither bytes nor speed"
        )
    else:
        parts = _quality_words(document["before"], document["after"], "the original")
        parts.append(f"{_zeros_words(document['after'])}, which alone changes neither bytes nor speed")
        if document["kind"] == "live":
            parts.append("the checkpoint is live and needs intaglio.load")
    sentence = "; ".join(parts) + "."
    return sentence[0].upper() + sentence[1:]


# ---- the terminal ----

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


def _two_sides(title: str, caption: str, names: Sequence[str], before: Document, after: Document) -> Table:
    table = _table(title, caption, [("measure", "left"), *((name, "right") for name in names)])
    for row in rows(before, after):
        table.add_row(Text(row.measure.name), _cell_text(row.before), _cell_text(row.after), _change_text(row.change))
    return table


def carve_table(document: Document) -> Table:
    """Return the table measure | before | after | change of a carve document.

    Args:
        document: see the module.

    Raises:
        IntaglioError: another format, or a field is missing.
    """
    document = _checked(document, "carve")
    caption = f"{ZEROS} {LIVE}" if document["kind"] == "live" else ZEROS
    return _two_sides(document["title"], caption, ("before", "after", "change"), document["before"], document["after"])


def compare_table(document: Document) -> Table:
    """Return the table measure | A | B | B against A of a compare document.

    Args:
        document: see the module.

    Raises:
        IntaglioError: another format, or a field is missing.
    """
    document = _checked(document, "compare")
    a, b = document["a"], document["b"]
    title = f"{document['title']}\nA: {a.get('model', 'not named')}\nB: {b.get('model', 'not named')}"
    return _two_sides(title, ZEROS, ("A", "B", "B against A"), a, b)


DEMO_COLUMNS = ("perplexity", "top1_agreement", "kl_mean", "cosine", "zero_fraction", "bytes", "decode_tokens_per_s")
# Headings that carry the unit and break in two, so that a row fits into 80 characters.
NARROW = {
    "kl_mean": ("KL,\nnats", " nats"),
    "top1_agreement": ("same\nchoice", ""),
    "bytes": ("size", ""),
    "decode_tokens_per_s": ("decode,\ntok/s", " tok/s"),
}


def _name(variant: Document) -> str:
    return str(variant.get("name", variant.get("slug", "not named")))


def _short_name(variant: Document) -> str:
    return _name(variant).removesuffix(f", {variant.get('amount')}")


def _is_best(document: Document, variant: Document) -> bool:
    return variant.get("slug") is not None and document["best"].get(variant.get("amount")) == variant["slug"]


def demo_table(document: Document) -> Table:
    """Return the table of a demo document: the dense model first, a row a variant, the best of each amount marked.

    Columns that no row has a number for are left out; a size that all share stands below.

    Args:
        document: see the module.

    Raises:
        IntaglioError: another format, or a field is missing.
    """
    document = _checked(document, "demo")
    dense, variants = document["dense"], document["variants"]
    used = [key for key in DEMO_COLUMNS if any(_value(side, key) is not None for side in (dense, *variants))]
    caption = "* the best of its amount. "
    sizes = {_value(side, "bytes") for side in (dense, *variants)}
    if len(sizes) == 1 and "bytes" in used:
        used.remove("bytes")
        caption += f"Size on disk of each: {_cell(dense, BY_KEY['bytes'], False, False).text}. "
    table = _table(document["title"], caption + ZEROS, [("variant", "left")])
    for key in used:
        heading, _ = NARROW.get(key, (BY_KEY[key].name.lower(), ""))
        table.add_column(Text(heading), justify="right", no_wrap=True)
    table.add_column(Text("took,\ns"), justify="right", no_wrap=True)

    def cells(side: Document) -> list[Text]:
        values = ((key, _value(side, key)) for key in used)
        words = (("-" if v is None else BY_KEY[k].show(v)).removesuffix(NARROW.get(k, ("", ""))[1]) for k, v in values)
        seconds = _finite(side.get("seconds"))
        took = "-" if seconds is None else f"{seconds:,.{1 if seconds < 10 else 0}f}"
        return [*map(Text, words), Text(took)]

    table.add_row(Text("dense"), *cells(dense), end_section=True)
    for position, variant in enumerate(variants):
        best = _is_best(document, variant)
        name = Text(f"{_name(variant)}{' *' if best else ''}", style="bold" if best else "")
        last = position + 1 < len(variants) and variants[position + 1].get("amount") != variant.get("amount")
        table.add_row(name, *cells(variant), end_section=last)
    return table


def _demo_bars(document: Document, key: str, name: Callable[[Document], str], mark: bool) -> list[pictures.Bar]:
    found = []
    for variant in document["variants"]:
        value, best = _value(variant, key), mark and _is_best(document, variant)
        text = "not finite or not measured" if value is None else f"{BY_KEY[key].show(value)}{' best' if best else ''}"
        found.append(pictures.Bar(name(variant), value, text, str(variant.get("amount", "")), best))
    return found


def demo_chart(document: Document) -> pictures.TerminalBars:
    """Return the perplexities of a demo document as bars for the terminal, on a log scale; it reads without colour too.

    Args:
        document: see the module.

    Raises:
        IntaglioError: another format, or a field is missing.
    """
    document = _checked(document, "demo")
    dense = _value(document["dense"], "perplexity")
    text = "not finite or not measured" if dense is None else _plain(dense)
    items = (pictures.Bar("dense", dense, text, "dense"), *_demo_bars(document, "perplexity", _name, mark=True))
    drawn = [bar.value for bar in items if bar.value is not None and pictures.LEAST <= bar.value <= pictures.MOST]
    low, high = pictures.nice_range(drawn)
    return pictures.TerminalBars(f"Perplexity, log scale from {low:,g} (lower is better)", items, low, high)


# ---- the page ----


@dataclass(frozen=True)
class Headline:
    """One of the few numbers at the top of a page."""

    name: str
    value: str
    note: str


def _typeset(text: str) -> str:
    if text == "-":
        return "–"
    for plain, sign in (("-", "−"), ("x ", "× ")):
        if text.startswith(plain):
            return sign + text.removeprefix(plain)
    return text


def _json(value: Any) -> str:
    if value is None:
        return "not set"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("intaglio", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"typeset": _typeset, "words": _json, "duration": _duration}
    environment.globals |= {"ZEROS": ZEROS, "LIVE": LIVE, "BAKED": BAKED}
    return environment


def _render(name: str, document: Document, **values: Any) -> str:
    side_keys = ("measure", "versions", "threads", "device", "dtype", "recipe", "seconds", "notes", "model")
    common = {key: document.get(key) for key in side_keys}
    sentence = summary(document)
    return _environment().get_template(name).render(document=document, **common, summary=sentence, **values)


def _headline(row: Row) -> Headline:
    words = _typeset(row.change.text) + (f", {row.change.verdict}" if row.change.verdict else "")
    if row.change.rises is not None:
        words = f"from {row.before.text}: {words}"
    elif row.change.text == "-":
        words = row.after.why or row.before.why or "no change to tell"
    return Headline(row.measure.name, row.after.text, words)


def _headlines(before: Document, after: Document, reference: str) -> list[Headline]:
    found = {row.measure.key: row for row in rows(before, after)}
    shares = _shares(after)
    spread = "no layer was measured"
    if shares:
        low, high = min(shares), max(shares)
        spread = "in every layer" if high - low < EVEN else f"{_percent(low)} to {_percent(high)} a layer"
    strip = []
    if "cosine" in found:
        cosine = Headline("Cosine", found["cosine"].after.text, f"of embeddings to {reference}'s")
        strip = [cosine]
    else:
        agreement = Headline("Same choice", found["top1_agreement"].after.text, f"of next tokens, as {reference}")
        strip = [_headline(found["perplexity"]), agreement]
    strip.append(Headline("Zeros", found["zero_fraction"].after.text, spread))
    strip.append(_headline(found["bytes"]))
    return strip


@dataclass(frozen=True)
class ZeroMap:
    """Where the zeros of one checkpoint are: a picture, and the same as a table of layer by projection.

    Args:
        name: which checkpoint.
        picture: an SVG element; empty when no name could be placed.
        projections: the columns.
        lines: `(layer, cells)` of each line.
        others: share of each measured name that is no projection of a numbered layer.
    """

    name: str
    picture: Markup
    projections: list[str]
    lines: list[tuple[str, list[str]]]
    others: dict[str, str]


def _row_mean(values: Mapping[tuple[str, str], float], row: str) -> float:
    shares = [share for (name, _), share in values.items() if name == row]
    return math.fsum(shares) / len(shares)


def _zero_map(side: Document, name: str) -> ZeroMap:
    fractions = _fractions(side)
    projections, layers, values = pictures.layer_grid(fractions)
    others = {key: f"{100 * v:.2f} %" for key, v in fractions.items() if not pictures.layer_grid({key: v})[2]}
    lines = []
    for layer in layers:
        cells = [values.get((projection, layer)) for projection in projections]
        lines.append((layer, ["–" if cell is None else f"{100 * cell:.2f} %" for cell in cells]))
    if not values:
        return ZeroMap(name, Markup(), projections, lines, others)
    means = {row: _percent(_row_mean(values, row)) for row in projections}
    words = f"{len(projections)} projections of {len(layers)} layers; {_zeros_words(side)}. Means: "
    words += ", ".join(f"{row} {mean}" for row, mean in means.items()) + "."
    title = f"Zeros in each layer: {name}"
    drawn = pictures.heatmap(title, words, projections, layers, values, column_title="layer", summaries=means)
    return ZeroMap(name, Markup(drawn), projections, lines, others)


def _pairs(before: Document, after: Document, names: tuple[str, str]) -> Markup:
    items = []
    for key in ("perplexity", "bytes", "peak_memory_bytes", "prefill_tokens_per_s", "decode_tokens_per_s"):
        old, new = _value(before, key), _value(after, key)
        if old is not None and new is not None and min(old, new) >= 0:
            measure = BY_KEY[key]
            label = f"{measure.name}, {measure.better} is better"
            items.append(pictures.Pair(label, old, new, measure.show(old), measure.show(new)))
    if not items:
        return Markup()
    words = "; ".join(f"{i.label}: {names[0]} {i.before_text}, {names[1]} {i.after_text}" for i in items) + "."
    return Markup(pictures.pairs(f"Quality and cost, {names[0]} and {names[1]}", words, items, names))


def _step(step: Document) -> dict[str, Any]:
    # A variant of the demo is a step and a SIDE at once; a SIDE's `parameters` is a count.
    found = step.get("parameters")
    parameters: dict[str, Any] = found if isinstance(found, dict) else {}
    defaults = step.get("defaults")
    if isinstance(defaults, Mapping):
        chosen = {k: v for k, v in parameters.items() if k not in defaults or defaults[k] != v}
    else:
        chosen = {k: v for k, v in parameters.items() if v is not None}
    return {
        "slug": step.get("slug", "not named"),
        "main": chosen,
        "all": chosen | parameters,
        "chosen": step.get("chosen") or {},
        "calibration": step.get("calibration"),
        "calibrated": "calibration" in step,
        "seed": step.get("seed"),
        "seconds": step.get("seconds"),
    }


def carve_page(document: Document) -> str:
    """Return the report of one carve as a self-contained HTML page: no script, nothing loaded from elsewhere.

    Args:
        document: see the module.

    Raises:
        IntaglioError: another format, or a field is missing.
    """
    document = _checked(document, "carve")
    before, after = document["before"], document["after"]
    # A map of nothing says nothing: that of an uncarved original is left out.
    maps = [_zero_map(before, "Before")] if any(_shares(before)) else []
    maps.append(_zero_map(after, "After"))
    return _render(
        "carve.html.j2",
        document,
        headlines=_headlines(before, after, "the original"),
        rows=rows(before, after),
        names=("Before", "After", "Change"),
        maps=maps,
        pairs=_pairs(before, after, ("before", "after")),
        steps=[_step(step) for step in document["steps"]],
    )


def compare_page(document: Document) -> str:
    """Return the comparison of two checkpoints as a self-contained HTML page.

    Args:
        document: see the module.

    Raises:
        IntaglioError: another format, or a field is missing.
    """
    document = _checked(document, "compare")
    a, b = document["a"], document["b"]
    reference = _reference(a)
    return _render(
        "compare.html.j2",
        document,
        reference=reference,
        models=(a.get("model", "not named"), b.get("model", "not named")),
        headlines=_headlines(a, b, reference),
        rows=rows(a, b),
        names=("A", "B", "B against A"),
        maps=[_zero_map(a, "A"), _zero_map(b, "B")],
        pairs=_pairs(a, b, ("A", "B")),
    )


def _demo_headlines(document: Document) -> list[Headline]:
    dense = document["dense"]
    strip = [Headline("Dense perplexity", _cell(dense, BY_KEY["perplexity"], False, True).text, "the model as it came")]
    for variant in _best(document):
        row = rows(dense, variant)[0]
        note = f"{_short_name(variant)} does least harm"
        strip.append(Headline(f"Best at {variant['amount']}", row.after.text, f"{note}: {_typeset(row.change.text)}"))
    sizes = {_value(side, "bytes") for side in (dense, *document["variants"])}
    same = "the same for every variant" if len(sizes) == 1 else "dense"
    return [*strip, Headline("Size on disk", _cell(dense, BY_KEY["bytes"], False, True).text, same)]


def _demo_zeros(document: Document) -> Markup:
    values: dict[tuple[str, str], float] = {}
    names: list[str] = []
    for position, variant in enumerate(document["variants"]):
        # Two variants may bear one name; a row of the picture is one variant.
        name = _name(variant)
        name = name if name not in names else f"{name} ({position + 1})"
        names.append(name)
        projections, _, shares = pictures.layer_grid(_fractions(variant))
        values |= {(name, projection): _row_mean(shares, projection) for projection in projections}
    columns = list(dict.fromkeys(column for _, column in values))
    if not values:
        return Markup()
    short = {column: column.rpartition(".")[2] for column in columns}
    if len(set(short.values())) < len(columns):
        short = {column: column for column in columns}
    words = "; ".join(f"{row}, {column}: {_percent(share)}" for (row, column), share in values.items()) + "."
    return Markup(
        pictures.heatmap(
            "Zeros in each projection, mean over layers",
            words,
            names,
            list(short.values()),
            {(row, short[column]): share for (row, column), share in values.items()},
            column_title="projection",
        )
    )


def demo_page(document: Document) -> str:
    """Return the report of the demo as a self-contained HTML page: the dense model and every variant side by side.

    Args:
        document: see the module.

    Raises:
        IntaglioError: another format, or a field is missing.
    """
    document = _checked(document, "demo")
    dense, variants = document["dense"], document["variants"]
    sides = (dense, *variants)
    encoder = _is_encoder(sides)
    told = [measure for measure in _measures(sides) if measure.key != "parameters"]
    measures = [measure for measure in told if any(_value(side, measure.key) is not None for side in sides)]
    lines = [
        {
            "name": "Dense" if side is dense else _short_name(side),
            "amount": "" if side is dense else str(side.get("amount", "")),
            "cells": [_cell(side, measure, encoder, original=side is dense) for measure in measures],
            "seconds": side.get("seconds"),
            "best": side is not dense and _is_best(document, side),
        }
        for side in sides
    ]
    value = _value(dense, "perplexity")
    perplexity = pictures.bars(
        "Perplexity of every variant",
        summary(document),
        _demo_bars(document, "perplexity", _short_name, mark=True),
        axis="perplexity on held-out text, log scale: shorter is better",
        scale="log",
        reference=None if value is None else (value, f"dense {_plain(value)}"),
    )
    shares = _demo_bars(document, "top1_agreement", _short_name, mark=False)
    agreement = pictures.bars(
        "Next-token choices that equal the dense model's",
        "; ".join(f"{bar.label}: {bar.text}" for bar in shares) + ".",
        shares,
        axis="share of next-token choices that equal the dense model's: longer is better",
        ticks=[(step / 5, f"{20 * step} %") for step in range(6)],
    )
    return _render(
        "demo.html.j2",
        document,
        headlines=_demo_headlines(document),
        measures=measures,
        lines=lines,
        perplexity=Markup(perplexity),
        agreement=Markup(agreement),
        zeros=_demo_zeros(document),
        steps=[_step(variant) | {"name": _name(variant)} for variant in variants],
    )
