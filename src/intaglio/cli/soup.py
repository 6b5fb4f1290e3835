"""The command `soup`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from intaglio.cli.console import Device, Json, handle_errors, out, print_json, print_out, progress_bar
from intaglio.errors import IntaglioError, printable


@handle_errors
def soup(
    models: Annotated[list[str], typer.Argument(help="Models fine-tuned from one checkpoint, at least two.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The directory to make.")] = None,
    mode: Annotated[
        str, typer.Option(help="greedy (best first, while the metric does not fall), maximum (best few) or uniform.")
    ] = "greedy",
    metric: Annotated[
        str | None,
        typer.Option(
            help="perplexity, bits_per_byte (texts), nDCG@10, MRR@10 (pairs), accuracy or macro_f1 (classifiers)."
        ),
    ] = None,
    validation: Annotated[
        str | None, typer.Option(metavar="DATA", help="Data of the metric, on which models are chosen.")
    ] = None,
    test: Annotated[
        str | None, typer.Option(metavar="DATA", help="Other data of the kind, on which all models are reported.")
    ] = None,
    training: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Data the models were trained on, which the others must not share."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="(maximum) Number of models.")] = 3,
    samples: Annotated[int, typer.Option(min=1, help="(texts) Number of segments.")] = 64,
    length: Annotated[int, typer.Option(min=8, help="(texts) Tokens of a segment.")] = 512,
    device: Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
    json: Json = False,
) -> None:
    """Average models that were fine-tuned from one checkpoint. They are chosen by a metric on validation data."""
    if output is None:
        raise IntaglioError("an output directory is missing: name one with -o DIR")
    from intaglio.recipe.soup import Sizes
    from intaglio.recipe.soup import soup as run

    with progress_bar() as progress:
        document = run(
            models,
            output,
            mode=mode,  # type: ignore[arg-type]
            metric=metric,
            validation=validation,
            test=test,
            training=training,
            top=top,
            sizes=Sizes(samples, length),
            device=device,
            overwrite=overwrite,
            progress=progress,
        )
    if json:
        print_json(document)
        return
    if metric is not None:
        out.print(_table(document))
    print_out(f"checkpoint: {output}")


def _table(document: dict[str, Any]) -> Table:
    """Return the metric of every model and of the soup."""
    splits = {"validation": "score", "test": "test_score"}
    shown = {split: total for split, total in splits.items() if document[split] is not None}
    better = "higher" if document["higher_is_better"] else "lower"
    title = f"{document['mode']} soup by {document['metric']}, {better} is better"
    caption = "" if "test" in shown else "Values of the choice flatter it; give --test DATA for others."
    table = Table("model", "in the soup", *shown, title=title, caption=caption, box=SIMPLE_HEAD)
    for row in document["models"]:
        values = [_shown(row[split]) for split in shown]
        table.add_row(Text(printable(row["model"])), "yes" if row["in_soup"] else "no", *values)
    table.add_row("soup", "", *(_shown(document[total]) for total in shown.values()), style="bold")
    return table


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
