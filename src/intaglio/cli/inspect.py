"""`intaglio inspect`: attention masks, experts, and words of a model's vectors."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from intaglio import atomic_io
from intaglio.checkpoint import load
from intaglio.errors import IntaglioError
from intaglio.masks.visualize import Group, as_json, drawing, groups, svg
from intaglio.methods.activations.moe_x import expert_statistics
from intaglio.trainer.term_explanation import explain, terms_of

SHOWN = 20
"""Words of a table."""


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
    found: dict[str, Any] = {"model": model, "text": text}
    if against is None:
        words = terms_of(method, checkpoint, text)
    else:
        explanation = explain(method, checkpoint, against, text)
        words = explanation.terms
        found |= {"query": against, "score": explanation.score}
    return found | {"terms": [asdict(term) for term in words]}


def terms_table(found: dict[str, Any]) -> Table:
    """Return the largest terms from `terms` as a table."""
    whole = math.fsum(term["weight"] for term in found["terms"])
    title = f"Score {found['score']:.3f}" if "score" in found else "Words of the text"
    caption = f"The first {SHOWN} of {len(found['terms']):,} words with a weight."
    table = Table("word", "weight", "share", title=title, caption=caption, box=SIMPLE_HEAD)
    for term in found["terms"][:SHOWN]:
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
    if output is not None and output.suffix.lower() != ".svg":
        raise IntaglioError(f"the picture {output} must be an .svg file")
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
