"""`intaglio inspect`: masks, sparse attention, experts, features, diagnostics and words of a model."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from intaglio import atomic_io, report
from intaglio.checkpoint import load
from intaglio.cli.generate import encode
from intaglio.dictionaries.features import describe_features
from intaglio.dictionaries.sources import find_dictionary
from intaglio.errors import IntaglioError
from intaglio.masks.visualize import Group, as_json, drawing, groups, svg
from intaglio.measures.conv_spectrum import layer_spectra
from intaglio.methods.activations.moe_x import expert_statistics
from intaglio.methods.attention.sparse_frontier import SparseFrontier, pictures
from intaglio.methods.base import Progress, no_progress
from intaglio.methods.probes.markov_lm import MarkovLM
from intaglio.report.spectrum import HEADINGS
from intaglio.trainer.term_explanation import explain, terms_of

SHOWN = 20
"""Words of a table."""


def check_picture(output: Path | None) -> None:
    """Refuse a picture that is no SVG file."""
    if output is not None and output.suffix.lower() != ".svg":
        raise IntaglioError(f"the picture {output} must be an .svg file")


def terms(model: str, text: str, against: str | None, device: str | None) -> dict[str, Any]:
    """Return the words of a text's vector, or what each word adds to its score for a query.

    Args:
        model: a learned-sparse encoder.
        text: a document.
        against: a query, or None.
        device: where to load the model.

    Raises:
        IntaglioError: the model cannot be loaded, or is no learned-sparse encoder.
    """
    checkpoint = load(model, device=device)
    method = checkpoint.encoder()
    document: dict[str, Any] = {"model": model, "text": text}
    if against is None:
        words = terms_of(method, checkpoint, text)
    else:
        explanation = explain(method, checkpoint, against, text)
        words = explanation.terms
        document |= {"query": against, "score": explanation.score}
    return document | {"terms": [asdict(term) for term in words]}


def terms_table(document: dict[str, Any]) -> Table:
    """Return the largest terms from `terms` as a table."""
    whole = math.fsum(term["weight"] for term in document["terms"])
    title = f"Score {document['score']:.3f}" if "score" in document else "Words of the text"
    caption = f"The first {SHOWN} of {len(document['terms']):,} words with a weight."
    table = Table("word", "weight", "share", title=title, caption=caption, box=SIMPLE_HEAD)
    for term in document["terms"][:SHOWN]:
        table.add_row(Text(term["token"]), f"{term['weight']:.3f}", f"{term['weight'] / whole:.1%}")
    return table


def masks(model: str, length: int, output: Path | None, device: str | None) -> tuple[list[Group], dict[str, Any]]:
    """Return the groups of layers with the same attention mask over `length` tokens, also as plain data.

    Args:
        model: a bundled name, a directory or a hub id, which may be pinned (`user/name@revision`).
        length: tokens.
        output: SVG file to write, or None.
        device: where to load the model.

    Raises:
        IntaglioError: the model cannot be loaded or read, or the file name does not end in `.svg`.
    """
    check_picture(output)
    checkpoint = load(model, device=device)
    layers = groups(checkpoint.model, length)
    if output is not None:
        atomic_io.write_text(output, svg(model, layers))
    return layers, {"model": model, "kind": checkpoint.kind, "length": length, "groups": as_json(layers)}


def masks_table(model: str, layers: list[Group], length: int) -> Table:
    """Return the groups of layers as a table, with a small drawing of each mask."""
    caption = (
        f"Over {length} tokens; queries down, keys across, the first 24 drawn (█ two queries see the key, ▀▄ one)."
    )
    title = f"Attention masks of {model}"
    table = Table("layers", "mask", "share", "", title=title, caption=caption, box=SIMPLE_HEAD)
    for group in layers:
        table.add_row(group.where, group.name, f"{group.share:.0%}", drawing(group))
    return table


def kept(
    model: str, prompt: str, attention: SparseFrontier | None, output: Path | None, device: str | None
) -> tuple[list[pictures.Kept], dict[str, Any]]:
    """Return what the heads keep for a prompt under sparse attention, also as plain data.

    Args:
        model: a bundled name, a directory or a hub id.
        prompt: text.
        attention: sparse attention to install; None for the checkpoint's own.
        output: SVG file to write, or None.
        device: where to load the model.

    Raises:
        IntaglioError: the model cannot be loaded or has no sparse attention, or the file name does not end in `.svg`.
    """
    check_picture(output)
    checkpoint = load(model, device=device)
    if attention is not None:
        attention.install(checkpoint.model)
    ids = encode(checkpoint, prompt, chat=False)
    layers = pictures.kept(checkpoint, ids.to(checkpoint.device))
    if output is not None:
        rows = {"prefill": "queries", "cache": "heads"}
        axes = " or ".join(f"{rows[part]} down ({part})" for part in dict.fromkeys(layer.part for layer in layers))
        atomic_io.write_text(output, svg(model, [layer.group() for layer in layers], f"{axes} and keys across"))
    return layers, {"model": model, "tokens": ids.shape[1], "layers": pictures.as_json(layers)}


def kept_table(model: str, layers: list[pictures.Kept]) -> Table:
    """Return what the heads keep as a table, a layer a row."""
    caption = "Kept keys of each head: of the prompt's pairs (prefill), or for the token after the prompt (cache)."
    title = f"Sparse attention of {model}"
    table = Table("layer", "part", "method", "share", "kept by head", title=title, caption=caption, box=SIMPLE_HEAD)
    for layer in layers:
        counts = ", ".join(f"{count:,}" for count in layer.seen.flatten(1).sum(1).tolist())
        table.add_row(str(layer.layer), layer.part, layer.name, f"{layer.share:.1%}", counts)
    return table


def experts(model: str, texts: str, device: str | None) -> dict[str, dict[str, Any]]:
    """Return statistics of each layer of experts on some texts; see `moe_x.expert_statistics`.

    Raises:
        IntaglioError: the model cannot be loaded, has no experts, or there is too little text.
    """
    return expert_statistics(load(model, device=device), texts)


def experts_table(model: str, texts: str, statistics: dict[str, dict[str, Any]]) -> Table:
    """Return the statistics from `experts` as a table, a layer a row."""
    caption = "Evenness: entropy of the loads, 1 if all are equal. Dead: share of units that fired for no token."
    columns = ("layer", "experts", "evenness", "fire", "expected", "dead")
    table = Table(*columns, title=f"The experts of {model} on {texts}", caption=caption, box=SIMPLE_HEAD)
    for name, layer in statistics.items():
        table.add_row(
            name,
            str(len(layer["load"])),
            f"{layer['load_entropy']:.2f}",
            f"{layer['l0']:.1f}",
            f"{layer['expected_l0']:.1f}",
            f"{layer['dead_units']:.1%}",
        )
    return table


def features(
    model: str,
    dictionary: str | None,
    texts: str,
    tokens: int,
    output: Path,
    device: str | None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write the page of a dictionary's features and return its data; see `describe_features`.

    Raises:
        IntaglioError: the model has no such dictionary, the texts cannot be read, or the file name does not end in
            `.html`.
    """
    if output.suffix.lower() != ".html":
        raise IntaglioError(f"the page {output} must be an .html file")
    checkpoint = load(model, device=device)
    name, chosen = find_dictionary(checkpoint, dictionary)
    document = describe_features(checkpoint, name, chosen, texts, tokens=tokens, progress=progress)
    atomic_io.write_text(output, report.features_page(document))
    return document


def features_table(document: dict[str, Any], most: int = 12) -> Table:
    """Return the most frequent features with the token at which each fires highest, a feature a row."""
    title = f"Features of {document['model']}, {document['site']}"
    alive, width, tokens = document["alive"], document["width"], document["tokens"]
    caption = f"{alive} of {width} fired on {tokens} tokens, {document['l0']:.1f} at a time."
    table = Table("feature", "fires", "highest at", "raises", title=title, caption=caption, box=SIMPLE_HEAD)
    for feature in document["features"][:most]:
        ids, levels = feature["contexts"][0]
        raised = " ".join(repr(document["vocabulary"][index]) for index in feature["raised"][:3])
        peak = document["vocabulary"][ids[levels.index(max(levels))]]
        table.add_row(str(feature["id"]), f"{feature['rate']:.2%}", Text(repr(peak)), Text(raised))
    return table


def diagnostics(
    model: str,
    texts: str,
    method: MarkovLM,
    output: Path | None,
    device: str | None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Return the diagnostics of a causal model on some texts; see `MarkovLM.measure`.

    Args:
        model: a bundled name, a directory or a hub id.
        texts: a name for `load_texts`.
        method: with its fields.
        output: HTML file to write, or None.
        device: where to load the model.
        progress: called after each pass and probe.

    Raises:
        IntaglioError: as `MarkovLM.measure`, or the file name does not end in `.html`.
    """
    if output is not None and output.suffix.lower() not in (".html", ".htm"):
        raise IntaglioError(f"the page {output} must be an .html file")
    document = {"model": model, **method.measure(load(model, device=device), texts, progress=progress)}
    if output is not None:
        atomic_io.write_text(output, report.diagnostics_page(document))
    return document


def diagnostics_tables(document: dict[str, Any]) -> list[Table]:
    """Return the diagnostics as tables."""
    tables = []
    for title, headings, rows in report.diagnostics_tables(document):
        table = Table(*headings, title=title, box=SIMPLE_HEAD)
        for row in rows:
            table.add_row(*row)
        tables.append(table)
    return tables


def spectrum(
    model: str, size: int, page: Path | None, device: str | None, progress: Progress = no_progress
) -> dict[str, Any]:
    """Return the singular values of all convolutions and linear layers, and write a page of them.

    Args:
        model: a bundled name, a directory or a hub id.
        size: side of each convolution's input.
        page: HTML file to write, or None.
        device: where to load the model.
        progress: called after each layer.

    Raises:
        IntaglioError: the model cannot be loaded or has no such layer, or the file name does not end in `.html`.
    """
    if page is not None and page.suffix.lower() != ".html":
        raise IntaglioError(f"the page {page} must be an .html file")
    layers = layer_spectra(load(model, device=device).model, size, progress)
    document = {"model": model, "size": size, "layers": [layer.document() for layer in layers]}
    if page is not None:
        atomic_io.write_text(page, report.spectrum_page(document))
    return document


TERMINAL_COLUMNS = [
    place for place, heading in enumerate(HEADINGS) if heading not in ("weight", "stride", "at every size", "note")
]
"""Columns in a terminal; the page has all."""


def spectrum_table(document: dict[str, Any]) -> Table:
    """Return the spectra as a table."""
    title = f"Singular values of {document['model']}"
    table = Table(title=title, caption=report.spectrum_summary(document), box=SIMPLE_HEAD)
    for heading in (HEADINGS[place] for place in TERMINAL_COLUMNS):
        table.add_column(heading, no_wrap=True)
    for row in report.spectrum_rows(document):
        name = report.short_name(row[0], 36)
        table.add_row(*map(Text, [name, *(row[place] for place in TERMINAL_COLUMNS[1:])]))
    return table
