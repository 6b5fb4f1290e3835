"""The report of a classifier, as a page, and tables for the terminal; thumbnails as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from intaglio.errors import printable, shorten
from intaglio.report.formatting import duration
from intaglio.report.html import trained_page
from intaglio.report.svg import SMALL_CHARACTER, WIDTH, add, canvas, clean_text, text_of, write

Document = Mapping[str, Any]
SIDE, CELL, ROW = 64.0, 150.0, 104.0
"""Side of a thumbnail, and the width and height of its cell."""
LONGEST = 160
"""Characters of a text in a table."""


def thumbnails(title: str, items: Sequence[Sequence[str]]) -> str:
    """Draw images in a grid; an item is a PNG in base64, a caption and perhaps a second line of it."""
    columns = int(WIDTH // CELL)
    rows = -(-len(items) // columns)
    root = canvas(title, "; ".join(", ".join(item[1:]) for item in items), ROW * rows)
    longest = int((CELL - 8) / SMALL_CHARACTER)
    for number, (png, *captions) in enumerate(items):
        x, y = CELL * (number % columns), ROW * (number // columns)
        add(root, "image", href=f"data:image/png;base64,{png}", x=x, y=y, width=SIDE, height=SIDE,
            style="image-rendering: pixelated")  # fmt: skip
        for line, caption in enumerate(captions):
            write(root, shorten(caption, longest), x, y + SIDE + 14 + 14 * line)
    return text_of(root)


def classifier_summary(document: Document) -> str:
    """Return a classifier's report as one sentence."""
    data, scores = document["data"], document["scores"]
    text = f"{data['training']:,} {data['kind']}s of {len(document['classes'])} classes"
    if scores:
        text += (
            f"; of {data['validation']:,} held out, {scores['accuracy']:.1%} are classified correctly "
            f"(macro-F1 {scores['macro_f1']:.3f})"
        )
    if data["in_both"]:
        text += f"; {data['in_both']:,} of these are training examples too"
    if data["skipped"]:
        text += f"; left out as broken ({len(data['skipped']):,}): {shorten(', '.join(data['skipped']), LONGEST)}"
    return clean_text(f"{text}.")


def _by_class(document: Document) -> list[list[str]]:
    return [
        [clean_text(name), f"{count:,}", f"{predicted:,}", "–" if f1 is None else f"{f1:.3f}"]
        for name, count, predicted, f1 in document["by_class"]
    ]


def _mistakes(document: Document) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Return the table of mistaken texts, or the picture of mistaken images."""
    shown = document["mistakes"]
    title = "Most confident mistakes"
    if not shown:
        return [], []
    if "png" in shown[0]:
        items = [
            (row["png"], f"{row['label']}, not {row['predicted']} ({row['probability']:.0%})", row["index"])
            for row in shown
        ]
        return [], [(thumbnails(title, items), f"{title}: label, predicted class with its probability, name.")]
    rows = [
        [row["index"], row["label"], f"{row['predicted']} ({row['probability']:.0%})", row["text"]] for row in shown
    ]
    table = {"title": title, "headings": ["Index", "Label", "Predicted", "Text"], "rows": [_cells(r) for r in rows]}
    return [table], []


def _cells(row: Sequence[Any]) -> list[str]:
    return [clean_text(shorten(" ".join(str(cell).split()), LONGEST)) for cell in row]


def classifier_page(document: Document) -> str:
    """Return the report of a classifier as a self-contained HTML page."""
    about = ("versions", "threads", "device", "dtype", "seconds")
    given = {name: value for name, value in document["parameters"].items() if value not in (None, [], False)}
    notes = {**given, **{name: document[name] for name in about if name in document}}
    if "seconds" in notes:
        notes["seconds"] = duration(notes["seconds"])
    tables, pictures = _mistakes(document)
    if document["by_class"]:
        headings = ["Class", "Examples", "Predicted", "F1"]
        tables = [{"title": "Held-out examples by class", "headings": headings, "rows": _by_class(document)}, *tables]
    first = {
        "title": "Training and scores", "summary": "", "curve": document["curve"], "tables": tables,
        "pictures": pictures, "notes": notes,
    }  # fmt: skip
    parts = [_modifier_section(slug, content) for slug, content in document["modifiers"].items()]
    return trained_page(document["title"], classifier_summary(document), [first, *parts])


def _modifier_section(slug: str, content: Document) -> dict[str, Any]:
    """Return the section of a modifier's report; see `ModifierSession.report`."""
    tables = [{**table, "rows": [_cells(row) for row in table["rows"]]} for table in content.get("tables", ())]
    pictures = [
        (thumbnails(picture["title"], picture["items"]), picture["title"]) for picture in content.get("thumbnails", ())
    ]
    summary = clean_text(str(content.get("summary", "")))
    return {"title": slug, "summary": summary, "tables": tables, "pictures": pictures, "curve": content.get("curve")}


def classifier_tables(document: Document) -> list[Table]:
    """Return the scores by class, and the tables of the modifiers, for the terminal."""
    tables = []
    if document["by_class"]:
        by_class = Table("class", "examples", "predicted", "F1", box=SIMPLE_HEAD, title="Held-out examples by class")
        for row in _by_class(document):
            by_class.add_row(*(Text(printable(cell)) for cell in row))
        tables.append(by_class)
    for slug, content in document["modifiers"].items():
        for part in content.get("tables", ()):
            table = Table(*part["headings"], box=SIMPLE_HEAD, title=Text(printable(f"{slug}: {part['title']}")))
            for row in part["rows"]:
                table.add_row(*(Text(printable(cell)) for cell in _cells(row)))
            tables.append(table)
    return tables
