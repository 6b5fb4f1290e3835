"""Documents as self-contained HTML pages: no script, no external resource."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from intaglio.report import svg, training_curves
from intaglio.report.formatting import (
    BY_KEY,
    MEMORY_NOISE,
    SPEED_NOISE,
    Row,
    cell_of,
    duration,
    measures_of,
    percent,
    plain_number,
    rows,
)
from intaglio.report.schema import (
    BAKED,
    EVEN,
    LIVE,
    TIE,
    ZEROS,
    Document,
    about_zeros,
    best_variants,
    checked,
    finite,
    fractions_of,
    has_cosine,
    has_left_out,
    is_best,
    other_tokens,
    reference_of,
    share,
    shares_of,
    short_name,
    value_of,
    variant_name,
)
from intaglio.report.summary import summary, zeros_words
from intaglio.report.tables import variant_bars

TEXT_MEASURES = (
    ("type_token_ratio", "Type-token ratio", "distinct tokens among the last 96 of a text"),
    ("repetition", "Repeated bigrams", "share of a text's bigrams that occurred in it before"),
    ("entropy", "Entropy", "of next-token predictions on the held-out texts, in nats"),
)
"""Measures of continuations: key, name and hint."""


@dataclass(frozen=True)
class Headline:
    """A key number at the top of a page."""

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
def environment() -> Environment:
    """Return the environment of the templates; all text is escaped."""
    loaded = Environment(
        loader=PackageLoader("intaglio.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    loaded.filters |= {
        "typeset": _typeset,
        "words": _json,
        "about_zeros": about_zeros,
        "duration": duration,
        "text_columns": _text_columns,
        "percent": lambda share: f"{100 * share:.0f} %",
        "transposed": lambda columns: zip_longest(*columns, fillvalue="–"),
    }
    loaded.globals |= {"TEXT_MEASURES": TEXT_MEASURES}
    loaded.globals |= {"ZEROS": ZEROS, "LIVE": LIVE, "BAKED": BAKED}
    loaded.globals |= {"SPEED_NOISE": SPEED_NOISE, "MEMORY_NOISE": MEMORY_NOISE}
    return loaded


def _text_columns(table: Mapping[str, Any]) -> list[str]:
    """Return the class of each column of a table: `text`, aligned left, where a cell begins with a letter."""
    columns = [[row[index] for row in table["rows"]] for index in range(len(table["headings"]))]
    return ["text" if any(cell[:1].isalpha() and cell != "nan" for cell in column) else "" for column in columns]


def _render(name: str, document: Document, **values: Any) -> str:
    side_keys = ("measure", "versions", "threads", "device", "dtype", "recipe", "seconds", "notes", "model")
    common = {key: document.get(key) for key in side_keys}
    sentence = summary(document)
    return environment().get_template(name).render(document=document, **common, summary=sentence, **values)


def _headline(row: Row) -> Headline:
    words = _typeset(row.change.text) + (f", {row.change.verdict}" if row.change.verdict else "")
    if row.change.rises is not None:
        words = f"from {row.before.text}: {words}"
    elif row.change.text == "-":
        words = row.after.why or row.before.why or "no change"
    return Headline(row.measure.name, row.after.text, words)


def _headlines(before: Document, after: Document, reference: str) -> list[Headline]:
    by_key = {row.measure.key: row for row in rows(before, after)}
    shares = shares_of(after)
    spread = "no layer was measured"
    if shares:
        low, high = min(shares), max(shares)
        spread = "in every layer" if high - low < EVEN else f"{percent(low)} to {percent(high)} a layer"
    strip = []
    if "cosine" in by_key:
        cosine = Headline("Cosine", by_key["cosine"].after.text, f"of embeddings to {reference}'s")
        strip = [cosine]
    else:
        agreement = Headline("Same choice", by_key["top1_agreement"].after.text, f"of next tokens, as {reference}")
        strip = [_headline(by_key["perplexity"]), agreement]
        if other_tokens(before, after):
            strip = [_headline(by_key["bits_per_byte"])]
    if not shares and has_left_out([after]):
        strip.append(
            Headline("Inputs left out", by_key["activation_sparsity"].after.text, "of the projections', a token")
        )
    else:
        strip.append(Headline("Zeros", by_key["zero_fraction"].after.text, spread))
    strip.append(_headline(by_key["bytes"]))
    return strip


@dataclass(frozen=True)
class ZeroMap:
    """The zeros of a checkpoint by layer and projection, as an SVG picture and a table.

    `others` are measured names that are not a projection of a numbered layer.
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
    fractions = fractions_of(side)
    projections, layers, values = svg.layer_grid(fractions)
    others = {key: f"{100 * v:.2f} %" for key, v in fractions.items() if not svg.layer_grid({key: v})[2]}
    lines = []
    for layer in layers:
        cells = [values.get((projection, layer)) for projection in projections]
        lines.append((layer, ["–" if cell is None else f"{100 * cell:.2f} %" for cell in cells]))
    if not values:
        return ZeroMap(name, Markup(), projections, lines, others)
    means = {row: percent(_row_mean(values, row)) for row in projections}
    words = f"{len(projections)} projections of {len(layers)} layers; {zeros_words(side)}. Means: "
    words += ", ".join(f"{row} {mean}" for row, mean in means.items()) + "."
    title = f"Zeros in each layer: {name}"
    picture = svg.heatmap(title, words, projections, layers, values, column_title="layer", summaries=means)
    return ZeroMap(name, Markup(picture), projections, lines, others)


def _pairs(before: Document, after: Document, names: tuple[str, str]) -> Markup:
    items = []
    # Per-token metrics do not compare between tokenizers.
    other = other_tokens(before, after)
    speeds = () if other else ("prefill_tokens_per_s", "decode_tokens_per_s")
    for key in ("bits_per_byte" if other else "perplexity", "bytes", "peak_memory_bytes", *speeds):
        old, new = value_of(before, key), value_of(after, key)
        if old is not None and new is not None and min(old, new) >= 0:
            measure = BY_KEY[key]
            label = f"{measure.name}, {measure.better} is better"
            items.append(svg.Pair(label, old, new, measure.show(old), measure.show(new)))
    if not items:
        return Markup()
    words = "; ".join(f"{i.label}: {names[0]} {i.before_text}, {names[1]} {i.after_text}" for i in items) + "."
    return Markup(svg.pairs(f"Quality and cost, {names[0]} and {names[1]}", words, items, names))


def _step(step: Document) -> dict[str, Any]:
    # A variant of the demo is a step and a SIDE at once; a SIDE's `parameters` is a count.
    parameters_field = step.get("parameters")
    parameters: dict[str, Any] = parameters_field if isinstance(parameters_field, dict) else {}
    non_default = step.get("given")
    chosen = (
        dict(non_default)
        if isinstance(non_default, Mapping)
        else {k: v for k, v in parameters.items() if v is not None}
    )
    derived = dict(step.get("chosen") or {})
    return {
        "slug": step.get("slug", "not named"),
        "main": chosen,
        "all": chosen | parameters,
        "selection": _selection(derived.pop("selection", None), step.get("timings")),
        "chosen": derived,
        "calibration": step.get("calibration"),
        "calibrated": "calibration" in step,
        "seed": step.get("seed"),
        "seconds": step.get("seconds"),
        "curves": Markup(training_curves.curves(step["curve"]))
        if training_curves.is_columns(step.get("curve"))
        else Markup(),
        "bars": _bars(step.get("bars")),
        "grid": _grid(step.get("grid")),
        "drawn": _titled(step.get("grid")),
        "samples": _samples(step.get("samples")),
    }


def _samples(samples: Any) -> dict[str, Any]:
    """Return the scores and outputs before and after a training step, as far as they are well formed."""
    values = samples if isinstance(samples, Mapping) else {}
    scores = {
        str(name): [plain_number(value) for value in pair]
        for name, pair in (values.get("scores") or {}).items()
        if isinstance(pair, list) and len(pair) == 2 and all(finite(value) is not None for value in pair)
    }
    columns = ("prompt", "expected", "before", "after")
    rows = [
        [str(row.get(name, "")) for name in columns] for row in values.get("rows") or () if isinstance(row, Mapping)
    ]
    return {"scores": scores, "columns": columns, "rows": rows}


def _selection(selection: Any, timings: Any) -> dict[str, Any]:
    """Return a selector's summary as values and table rows."""
    values = dict(selection) if isinstance(selection, Mapping) else {}
    parts = [part for part in values.pop("clusters", None) or [] if isinstance(part, Mapping)]
    if isinstance(timings, Mapping):
        values |= {f"seconds of {name}": plain_number(value) for name, value in timings.items()}
    columns = list(parts[0]) if parts else []
    lines = [[_short(part.get(name)) for name in columns] for part in parts]
    return {"words": values, "columns": columns, "lines": lines}


def _short(value: Any) -> str:
    return plain_number(value) if isinstance(value, float) else _json(value)


def _bars(bars: Any) -> Markup:
    """Return a step's measurements of parts of the model as bars."""
    values = bars.get("items") if isinstance(bars, Mapping) else None
    if not isinstance(values, Mapping) or not values:
        return Markup()
    marked, mark = bars.get("marked") or [], str(bars.get("mark", "marked"))
    items = []
    for name, value in values.items():
        number, strong = finite(value), name in marked
        text = "not finite" if number is None else f"{value:,}" if isinstance(value, int) else plain_number(number)
        items.append(svg.Bar(str(name), number, f"{text}, {mark}" if strong else text, strong=strong))
    words = "; ".join(f"{bar.label}: {bar.text}" for bar in items) + "."
    title, axis = str(bars.get("title", "Measured")), str(bars.get("axis", ""))
    return Markup(svg.bars(title, words, items, axis=axis))


def _grid(grid: Any) -> Markup:
    """Return the shares that a step chose for projections as a heatmap."""
    values = grid.get("values") if isinstance(grid, Mapping) else None
    known = {str(k): v for k, value in (values or {}).items() for v in [share(value)] if v is not None}
    rows, columns, cells = svg.layer_grid(known)
    if not cells:
        return Markup()
    words = "; ".join(f"{name}: {percent(value)}" for name, value in known.items()) + "."
    return Markup(svg.heatmap(_titled(grid), words, rows, columns, cells, column_title="layer"))


def _titled(grid: Any) -> str:
    return str(grid.get("title", "Chosen")) if isinstance(grid, Mapping) else ""


def training_page(title: str, summary: str, columns: training_curves.Columns, notes: Mapping[str, str]) -> str:
    """Return the progress of a training run as a self-contained HTML page."""
    return (
        environment()
        .get_template("training.html.j2")
        .render(document={"title": title}, summary=summary, curves=Markup(training_curves.curves(columns)), notes=notes)
    )


def trained_page(title: str, summary: str, sections: Sequence[Mapping[str, Any]], kicker: str | None = None) -> str:
    """Return trained models, or other sections, as a self-contained HTML page.

    A section has a `title`, a `summary` (may be empty), and optionally `curve` (columns), `pictures` (SVG and caption),
    `tables` (title, headings, rows of text) and `notes` (values by name). `kicker` is the line above the title.
    """
    shown = [
        {
            "title": section["title"],
            "summary": section["summary"],
            "curves": Markup(training_curves.curves(section["curve"]))
            if training_curves.is_columns(section.get("curve"))
            else Markup(),
            "pictures": [(Markup(picture), caption) for picture, caption in section.get("pictures", ())],
            "tables": section.get("tables", ()),
            "notes": section.get("notes", {}),
        }
        for section in sections
    ]
    template = environment().get_template("trained.html.j2")
    line = kicker or f"trained {'model' if len(shown) == 1 else 'models'}"
    given = {"sections": shown, "kicker": line, "beside_json": kicker is None}
    return template.render(document={"title": title}, summary=summary, **given)


def evaluation_page(
    title: str,
    summary: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    pictures: Sequence[str],
    caption: str,
    examples: Sequence[tuple[str, Mapping[str, Sequence[str]]]] = (),
) -> str:
    """Return measurements of search indexes as a self-contained HTML page.

    `examples` are queries, each with the ids of the first results by index.
    """
    return (
        environment()
        .get_template("evaluation.html.j2")
        .render(
            document={"title": title},
            summary=summary,
            headings=headings,
            rows=rows,
            pictures=[Markup(picture) for picture in pictures],
            caption=caption,
            examples=examples,
        )
    )


def carve_page(document: Document) -> str:
    """Return the report of a carve as a self-contained HTML page."""
    document = checked(document, "carve")
    before, after = document["before"], document["after"]
    # A map without zeros is left out. (Some originals have a few zeros.)
    zeros_before, zeros_after = (max(shares_of(side), default=0.0) >= EVEN for side in (before, after))
    maps = [_zero_map(before, "Before")] if zeros_before else []
    if zeros_before or zeros_after or not (shares_of(after) or has_left_out([after])):
        maps.append(_zero_map(after, "After"))
    return _render(
        "carve.html.j2",
        document,
        headlines=_headlines(before, after, "the original"),
        rows=rows(before, after, document["kind"] == "standalone"),
        names=("Before", "After", "Change"),
        maps=maps,
        pairs=_pairs(before, after, ("before", "after")),
        steps=[_step(step) for step in document["steps"]],
    )


def compare_page(document: Document) -> str:
    """Return the comparison of two checkpoints as a self-contained HTML page."""
    document = checked(document, "compare")
    a, b = document["a"], document["b"]
    reference = reference_of(a)
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
    strip = [Headline("Dense perplexity", cell_of(dense, BY_KEY["perplexity"], False, True).text, "the original model")]
    for amount, tied in best_variants(document):
        row = rows(dense, tied[0])[0]
        names = " and ".join(short_name(variant) for variant in tied)
        note = f"{names} tie, within {percent(TIE)}" if len(tied) > 1 else f"{names}: {_typeset(row.change.text)}"
        strip.append(Headline(f"Best at {amount}", row.after.text, note))
    sizes = {value_of(side, "bytes") for side in (dense, *document["variants"])}
    same = "the same for every variant" if len(sizes) == 1 else "dense"
    return [*strip, Headline("Size on disk", cell_of(dense, BY_KEY["bytes"], False, True).text, same)]


def _demo_zeros(document: Document) -> Markup:
    values: dict[tuple[str, str], float] = {}
    names: list[str] = []
    for position, variant in enumerate(document["variants"]):
        if not fractions_of(variant):
            continue  # its projections have no plain weights
        # Names may repeat; a row of the picture is one variant.
        name = variant_name(variant)
        name = name if name not in names else f"{name} ({position + 1})"
        names.append(name)
        projections, _, shares = svg.layer_grid(fractions_of(variant))
        values |= {(name, projection): _row_mean(shares, projection) for projection in projections}
    columns = list(dict.fromkeys(column for _, column in values))
    if not values:
        return Markup()
    short = {column: column.rpartition(".")[2] for column in columns}
    if len(set(short.values())) < len(columns):
        short = {column: column for column in columns}
    words = "; ".join(f"{row}, {column}: {percent(share)}" for (row, column), share in values.items()) + "."
    return Markup(
        svg.heatmap(
            "Zeros in each projection, mean over layers",
            words,
            names,
            list(short.values()),
            {(row, short[column]): share for (row, column), share in values.items()},
            column_title="projection",
        )
    )


def demo_page(document: Document) -> str:
    """Return the demo's report as a self-contained HTML page, with the dense model and every variant."""
    document = checked(document, "demo")
    dense, variants = document["dense"], document["variants"]
    sides = (dense, *variants)
    cosine = has_cosine(sides)
    shown = [measure for measure in measures_of(sides) if measure.key != "parameters"]
    measures = [measure for measure in shown if any(value_of(side, measure.key) is not None for side in sides)]
    lines = [
        {
            "name": "Dense" if side is dense else short_name(side),
            "amount": "" if side is dense else str(side.get("amount", "")),
            "cells": [cell_of(side, measure, cosine, original=side is dense) for measure in measures],
            "seconds": side.get("seconds"),
            "best": side is not dense and is_best(document, side),
        }
        for side in sides
    ]
    value = value_of(dense, "perplexity")
    perplexity = svg.bars(
        "Perplexity of every variant",
        summary(document),
        variant_bars(document, "perplexity", short_name, mark=True),
        axis="perplexity on held-out text, log scale: shorter is better",
        scale="log",
        reference=None if value is None else (value, f"dense {plain_number(value)}"),
    )
    shares = variant_bars(document, "top1_agreement", short_name, mark=False)
    agreement = svg.bars(
        "Next-token choices equal to the dense model's",
        "; ".join(f"{bar.label}: {bar.text}" for bar in shares) + ".",
        shares,
        axis="share of next-token choices equal to the dense model's: longer is better",
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
        steps=[_step(variant) | {"name": variant_name(variant)} for variant in variants],
    )
