"""`intaglio inspect`: what is read out of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from intaglio import atomic_io
from intaglio.checkpoint import load
from intaglio.errors import IntaglioError
from intaglio.masks.visualize import Group, as_json, drawing, groups, svg
from intaglio.methods.activations.moe_x import monitor


def masks(model: str, length: int, output: Path | None, device: str | None) -> tuple[list[Group], dict[str, Any]]:
    """Read what each layer of a model sees, and draw it if asked for.

    Args:
        model: a bundled name, a directory or a hub id, which may be pinned (`user/name@revision`).
        length: tokens.
        output: an SVG file to write; None: none.
        device: where to work.

    Returns:
        The groups of layers, and the same as plain data.

    Raises:
        IntaglioError: the model cannot be loaded or read, or the file is no `.svg`.
    """
    if output is not None and output.suffix.lower() != ".svg":
        raise IntaglioError(f"the picture {output} must be an .svg file")
    checkpoint = load(model, device=device)
    found = groups(checkpoint.model, length)
    if output is not None:
        atomic_io.write_text(output, svg(model, found))
    data = {"model": model, "kind": checkpoint.kind, "length": length, "groups": as_json(found)}
    return found, data


def masks_table(model: str, found: list[Group], length: int) -> Table:
    """The groups as a table with a small drawing of each.

    Args:
        model: its name.
        found: groups.
        length: tokens.
    """
    caption = (
        f"Among {length} tokens; queries down, keys across, the first 24 drawn (█ two queries see the key, ▀▄ one)."
    )
    table = Table(
        "layers", "see", "share", "", title=f"What each layer of {model} sees", caption=caption, box=SIMPLE_HEAD
    )
    for group in found:
        table.add_row(group.where, group.name, f"{group.share:.0%}", drawing(group))
    return table


def experts(model: str, texts: str, device: str | None) -> dict[str, dict[str, Any]]:
    """How each layer of experts in a model is used on some text; see `intaglio.methods.activations.moe_x.monitor`.

    Args:
        model: a directory or a hub id, which may be pinned (`user/name@revision`).
        texts: a bundled name, a file or a folder.
        device: where to work.

    Raises:
        IntaglioError: the model cannot be loaded, has no experts, or there is too little text.
    """
    return monitor(load(model, device=device), texts)


def experts_table(model: str, texts: str, found: dict[str, dict[str, Any]]) -> Table:
    """The same as a table, a layer a row.

    Args:
        model: its name.
        texts: what they were used on.
        found: from `experts`.
    """
    caption = "Evenness: entropy of the loads, 1 where all are alike. Dead: share of units that fired for no token."
    heads = ("layer", "experts", "evenness", "fire", "expected", "dead")
    table = Table(*heads, title=f"The experts of {model} on {texts}", caption=caption, box=SIMPLE_HEAD)
    for name, one in found.items():
        table.add_row(
            name,
            str(len(one["load"])),
            f"{one['load_entropy']:.2f}",
            f"{one['l0']:.1f}",
            f"{one['expected_l0']:.1f}",
            f"{one['dead_units']:.1%}",
        )
    return table
