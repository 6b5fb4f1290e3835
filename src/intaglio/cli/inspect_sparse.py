"""`intaglio inspect MODEL --sparse-attention`: the study of which sparse attention survives which task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from intaglio import atomic_io
from intaglio.checkpoint import load
from intaglio.cli.generate import check_prompt
from intaglio.errors import IntaglioError, did_you_mean
from intaglio.measures.long_context import CONDITIONS, read_documents, tasks
from intaglio.measures.sparsity_tradeoff import StudyCell
from intaglio.methods.attention.sparse_frontier.study import (
    METHODS,
    SPARSITIES,
    StudySizes,
    operation_panels,
    run,
    sparsity_panels,
    summary,
)
from intaglio.methods.base import Progress, no_progress
from intaglio.report.html import trained_page
from intaglio.report.sparsity_curves import operation_dots, sparsity_curves


def numbers(text: str, what: str, least: float, most: float) -> tuple[float, ...]:
    """Return the numbers of a comma-separated list.

    Raises:
        IntaglioError: a word that is no number, or one out of range.
    """
    try:
        values = tuple(dict.fromkeys(float(word) for word in text.split(",")))
    except ValueError:
        values = ()
    if not values or not all(least <= value <= most for value in values):
        raise IntaglioError(
            f"{what} is {text!r}; numbers from {least:g} to {most:g}, separated by commas, are accepted"
        )
    return values


def chosen(text: str | None, accepted: Sequence[str], what: str) -> tuple[str, ...]:
    """Return the names of a comma-separated list, all of them without one."""
    names = tuple(dict.fromkeys(text.split(","))) if text else tuple(accepted)
    for name in names:
        if name not in accepted:
            raise IntaglioError(f"there is no {what} named {name!r}; {did_you_mean(name, accepted)}")
    return names


def design(
    lengths: str,
    methods: str | None,
    sparsities: str | None,
    samples: int,
    question: str | None,
    explain: bool,
    seed: int,
) -> StudySizes:
    """Return the sizes of a study from the words of the command line, checked before any model loads."""
    levels = numbers(sparsities, "sparsities", 0.01, 0.99) if sparsities else SPARSITIES
    return StudySizes(
        tuple(int(n) for n in numbers(lengths, "lengths", 1, 1 << 30)),
        chosen(methods, METHODS, "method"),
        levels,
        chosen(question, CONDITIONS, "condition"),  # type: ignore[arg-type]
        samples,
        explain,
        seed,
    )


def study(
    models: Sequence[str],
    sizes: StudySizes,
    *,
    only: str | None,
    documents: str | None,
    paper: bool,
    output: Path | None,
    device: str | None,
    dtype: str | None,
    progress: Progress = no_progress,
) -> tuple[list[StudyCell], dict[str, Any]]:
    """Run the study on one or several models and return its cells and its analysis.

    Args:
        models: bundled names, directories or hub ids.
        sizes: lengths, methods, sparsities and samples.
        only: names of tasks, separated by commas; None for all.
        documents: JSON lines with questions on documents, or None.
        paper: whether the generated tasks have the paper's sizes instead of those for small models.
        output: directory to write `study.json`, `study.html` and the pictures to, or None.
        device: where to load the models.
        dtype: of the weights.
        progress: called after each cell.

    Raises:
        IntaglioError: an unknown task, documents that cannot be read, or a model that does not fit.
    """
    known = tasks(not paper, read_documents(documents) if documents else ())
    names = chosen(only, [task.name for task in known], "task")
    known = [task for task in known if task.name in names]
    if output is not None:
        atomic_io.check_target(output, overwrite=False)
    points: list[StudyCell] = []
    for name in models:
        checkpoint = load(name, device=device, dtype=dtype)
        check_prompt(checkpoint, "")
        points += run(checkpoint, known, sizes, name, progress)
    data = summary(points)
    if output is not None:
        with atomic_io.directory(output) as temporary:
            (temporary / "study.json").write_text(atomic_io.to_json(data), encoding="utf-8")
            drawn = pictures(points, data)
            for file, text in {**drawn, "study.html": page(points, data, drawn)}.items():
                (temporary / file).write_text(text, encoding="utf-8")
    return points, data


def pictures(points: Sequence[StudyCell], data: dict[str, Any]) -> dict[str, str]:
    """Return the pictures of a study by file name."""
    operations = operation_panels(points, data["equal_flops"])
    return {
        "accuracy.svg": _standalone(sparsity_curves("Accuracy under sparse attention", sparsity_panels(points))),
        "equal_flops.svg": _standalone(operation_dots("Accuracy at equal operations", operations)),
    }


def _standalone(picture: str) -> str:
    return picture.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"


CELL_HEADINGS = ("model", "task", "question", "tokens", "method", "sparsity", "accuracy", "difference")
CELLS = "Sparsity as measured. Difference from dense attention on the same samples, 95 % bootstrap interval."
TOLERATED = (
    "Largest measured sparsity without a significant loss against dense attention, lower ones included; '-' where"
    " dense attention has no right answer."
)


def cell_rows(points: Sequence[StudyCell]) -> list[list[str]]:
    """Return a row of text for each cell, in the order of `CELL_HEADINGS`."""
    rows = []
    for p in points:
        gap = "" if p.difference is None else "{mean:+.2f} [{low:+.2f}, {high:+.2f}]".format(**vars(p.difference))
        numbers = (f"{p.length:,}", p.method, f"{p.sparsity:.1%}", f"{p.accuracy:.2f}", gap)
        rows.append([p.model, p.task, p.condition, *numbers])
    return rows


def tolerated_rows(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of the highest tolerated sparsity: a task a row and a method a column."""
    methods = list(dict.fromkeys(row["method"] for row in data["tolerated"]))
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for row in data["tolerated"]:
        key: tuple[str, ...] = (row["model"], row["task"], row["condition"], f"{int(row['length']):,}")
        rows.setdefault(key, {})[row["method"]] = "-" if row["sparsity"] is None else f"{row['sparsity']:.0%}"
    cells = [[*key, *(values.get(m, "") for m in methods)] for key, values in rows.items()]
    return [*CELL_HEADINGS[:4], *methods], cells


def tables(points: Sequence[StudyCell], data: dict[str, Any]) -> list[Table]:
    """Return the cells and the tolerated sparsities as tables of the terminal."""
    headings, rows = tolerated_rows(data)
    cells = Table(*CELL_HEADINGS, title="Accuracy under sparse attention", caption=CELLS, box=SIMPLE_HEAD)
    tolerated = Table(*headings, title="Tolerated sparsity", caption=TOLERATED, box=SIMPLE_HEAD)
    for table, lines in ((cells, cell_rows(points)), (tolerated, rows)):
        for column in table.columns:
            column.overflow, column.no_wrap = "fold", column.header == "method"
        for line in lines:
            table.add_row(*line)
    return [cells, tolerated]


def page(points: Sequence[StudyCell], data: dict[str, Any], drawn: dict[str, str]) -> str:
    """Return the study as a self-contained HTML page."""
    headings, rows = tolerated_rows(data)
    captions = ("The dashed line is dense attention.", "Prompt, answer, and estimates of what to keep are counted.")
    tolerated = {"title": "By task and method", "headings": headings, "rows": rows}
    cells = {"title": "By method and sparsity", "headings": CELL_HEADINGS, "rows": cell_rows(points)}
    sections: list[dict[str, Any]] = [
        {"title": "Tolerated sparsity", "summary": TOLERATED, "tables": [tolerated]},
        {"title": "Accuracy", "summary": CELLS, "tables": [cells]},
    ]
    sections[1]["pictures"] = list(zip(drawn.values(), captions, strict=True))
    models = ", ".join(dict.fromkeys(p.model for p in points))
    laws = " ".join(f"{line}." for line in law_lines(data)) or "Too few points for a scaling law."
    return trained_page(f"Sparse attention of {models}", laws, sections, "study of long contexts")


def law_lines(data: dict[str, Any]) -> list[str]:
    """Return a line for each fitted scaling law."""
    lines = []
    for law in data["scaling_laws"]:
        terms = ", ".join(f"{name} {value:+.2f}" for name, value in law["coefficients"].items())
        fit = "" if law["r2"] is None else f"; R² {law['r2']:.2f}"
        held = "" if law["held_out_r2"] is None else f", held out ({law['held_out']}) {law['held_out_r2']:.2f}"
        lines.append(f"law of {law['task']}, {law['method']}, question {law['condition']}: {terms}{fit}{held}")
    return lines
