"""Singular values of a model's layers as a table and as a page with a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from intaglio.report.html import trained_page
from intaglio.report.svg import LABEL_CHARACTER, WIDTH, add, canvas, text_of, ticks, write

Document = Mapping[str, Any]
HEADINGS = ["layer", "weight", "stride", "L_orth", "least", "median", "largest", "at every size", "note"]
ROW = 24.0


def spectrum_rows(document: Document) -> list[list[str]]:
    """Return a row of text for each layer, in the order of `HEADINGS`."""
    return [
        [
            layer["name"],
            "x".join(map(str, layer["shape"])),
            "x".join(map(str, layer["stride"])),
            f"{layer['loss']:.3g}",
            *(f"{layer[key]:.3f}" for key in ("minimum", "median", "maximum")),
            "{:.2f} to {:.2f}".format(*layer["band"]),
            _note(layer),
        ]
        for layer in document["layers"]
    ]


def short_name(name: str, most: int) -> str:
    """Return the last characters of a layer's name, at most `most`."""
    return name if len(name) <= most else "…" + name[1 - most :]


def _note(layer: Document) -> str:
    notes = [] if layer["exact"] else ["not circular"]
    return ", ".join([*notes, *([] if layer["possible"] else ["cannot be orthogonal"])])


def spectrum_summary(document: Document) -> str:
    """Return a sentence on the whole model."""
    layers = document["layers"]
    widest = max(layers, key=lambda layer: layer["spread"])
    return (
        f"{len(layers)} layers, convolutions on inputs of side {document['size']}: singular values from "
        f"{min(layer['minimum'] for layer in layers):.3f} to {max(layer['maximum'] for layer in layers):.3f}; the "
        f"widest range, {widest['spread']:.3f}, is that of {widest['name']}."
    )


def spectrum_picture(document: Document) -> str:
    """Draw a row of ticks for each layer, one at each of its singular values at equal steps of rank."""
    layers: Sequence[Document] = document["layers"]
    left = 24 + LABEL_CHARACTER * max(min(len(layer["name"]), 34) for layer in layers)
    span, top, bottom = WIDTH - left - 24, 16.0, 16 + ROW * len(layers)
    marks = ticks(0.0, max(1.0, max(layer["maximum"] for layer in layers)))
    words = "; ".join(f"{layer['name']}: {layer['minimum']:.3f} to {layer['maximum']:.3f}" for layer in layers)
    root = canvas("Singular values of each layer", words, bottom + 44)
    for mark in marks:
        x = left + span * mark / marks[-1]
        add(root, "line", x1=x, x2=x, y1=top - 4, y2=bottom, class_="grid")
        write(root, f"{mark:g}", x, bottom + 18, anchor="middle")
    write(root, "singular value", left, bottom + 38)
    for number, layer in enumerate(layers):
        y = top + ROW * number
        write(root, short_name(layer["name"], 34), left - 8, y + 16, "code", "end")
        line = add(root, "g")
        add(line, "title", f"{layer['name']}: {layer['minimum']:.3f} to {layer['maximum']:.3f}")
        for value in layer["curve"]:
            x = left + span * value / marks[-1]
            add(line, "rect", x=x - 0.75, y=y + 4, width=1.5, height=ROW - 8, class_="bar strong")
    one = left + span / marks[-1]
    add(root, "line", x1=one, x2=one, y1=top - 6, y2=bottom, class_="reference")
    return text_of(root)


def spectrum_page(document: Document) -> str:
    """Return the spectra as a self-contained HTML page."""
    caption = "Singular values at equal steps of rank; the dashed line is 1, where a layer keeps lengths."
    section = {
        "title": "Layers",
        "summary": "L_orth is 0 where every singular value is 1. Convolutions are read as if padding were circular;"
        " where it is not, borders differ.",
        "pictures": [(spectrum_picture(document), caption)],
        "tables": [{"title": "Values", "headings": HEADINGS, "rows": spectrum_rows(document)}],
    }
    return trained_page(f"Singular values of {document['model']}", spectrum_summary(document), [section], "spectrum")
