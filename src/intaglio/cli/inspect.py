"""`intaglio inspect`: attention masks, sparse attention and experts of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from intaglio import atomic_io
from intaglio.checkpoint import load
from intaglio.cli.generate import encode
from intaglio.errors import IntaglioError
from intaglio.masks.visualize import Group, as_json, drawing, groups, svg
from intaglio.methods.activations.moe_x import expert_statistics
from intaglio.methods.attention.sparse_frontier import SparseFrontier, pictures


def check_picture(output: Path | None) -> None:
    """Refuse a picture that is no SVG file."""
    if output is not None and output.suffix.lower() != ".svg":
        raise IntaglioError(f"the picture {output} must be an .svg file")


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
