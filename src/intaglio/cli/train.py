"""The commands `train` and `recommend`."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from intaglio.cli.console import Device, Json, handle_errors, out, print_json, print_out, progress_bar, read_stdin
from intaglio.errors import IntaglioError, did_you_mean

SIZES = ("width", "depth", "heads", "context")
"""Options that belong to a new model."""
SETTINGS = ("objective", "set_", "steps", "batch_size", "learning_rate", *SIZES)
"""Options that belong to interactions."""


@handle_errors
def train(
    options: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="A checkpoint to train on. [default: the recipe's, or a new model]")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", "-r", help="A YAML recipe that trains; instead of --interactions.")
    ] = None,
    interactions: Annotated[
        str | None,
        typer.Option(
            help="A log of users, items and times: a CSV file, movielens, or a directory in RecBole's format."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The directory to make.")] = None,
    objective: Annotated[str, typer.Option(help="(interactions) bert4rec or sasrec.")] = "bert4rec",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="(interactions) A field of the objective as key=value; can be repeated."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="(interactions) Optimizer steps.")] = 2000,
    batch_size: Annotated[int, typer.Option(min=1, help="(interactions) Sequences of a step.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="(interactions) The highest learning rate.")] = 1e-3,
    width: Annotated[int, typer.Option(min=2, help="(new model) Hidden size.")] = 64,
    depth: Annotated[int, typer.Option(min=1, help="(new model) Layers.")] = 2,
    heads: Annotated[int, typer.Option(min=1, help="(new model) Attention heads.")] = 2,
    context: Annotated[int, typer.Option(min=8, help="(new model) Longest history in items.")] = 50,
    device: Device = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the run. [default: the recipe's, or 0]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume a run that was stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output or an interrupted run.")] = False,
    json: Json = False,
) -> None:
    """Train by a recipe, or a recommender on interactions. Writes a checkpoint with a report."""
    if (recipe is None) == (interactions is None):
        given = "--recipe and --interactions are given" if recipe else "training data is missing"
        raise IntaglioError(f"{given}; give one of --recipe FILE and --interactions LOG")
    if output is None:
        raise IntaglioError("an output directory is missing: name one with -o DIR")
    if recipe is not None:
        _refuse(options, SETTINGS, "needs --interactions; a recipe sets its own")
    elif model is not None:
        _refuse(options, SIZES, f"sizes a new model; {model} has its own")
    from intaglio import report
    from intaglio.recipe.run import carve
    from intaglio.recipe.schema import Recipe

    if recipe is not None:
        read = Recipe.read(recipe)
    else:
        sizes = {"width": width, "depth": depth, "heads": heads, "context": context}
        settings = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "warmup": 0.1}
        read = _recommender_recipe(str(interactions), objective, set_ or [], settings, None if model else sizes)
    if not any(step.slug == "train" for step in read.steps):
        raise IntaglioError(f"{recipe} has no train step; intaglio carve runs it")
    with progress_bar() as progress:
        document = carve(
            read, output, model=model, device=device, seed=seed, resume=resume, overwrite=overwrite, progress=progress
        )
    if json:
        print_json(document)
        return
    tables, sentences = report.overview(document)
    for table in tables:
        out.print(table)
    for sentence in sentences:
        print_out(sentence)
    print_out(f"checkpoint: {output}\nreport: {output / 'report.html'}")


def _refuse(options: typer.Context, names: Sequence[str], reason: str) -> None:
    """Refuse options that would have no effect."""
    for name in names:
        source = options.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise IntaglioError(f"--{name.strip('_').replace('_', '-')} {reason}")


def _recommender_recipe(
    interactions: str, objective: str, words: list[str], settings: dict[str, Any], sizes: dict[str, int] | None
) -> Any:
    """Return the recipe that the options stand for; `sizes` are those of a new model."""
    from intaglio.cli.settings import read_settings
    from intaglio.methods.registry import get_method, list_objectives
    from intaglio.recipe.schema import Recipe, from_cli

    accepted = list_objectives("interactions")
    if objective not in accepted:
        raise IntaglioError(f"--objective is {objective!r}; {did_you_mean(objective, accepted)}")
    method = get_method(objective)
    fields = from_cli(method, read_settings(words), "--set").model_dump()
    step = {"objective": {objective: fields}, "interactions": interactions, **settings}
    family = "gpt2" if "causal" in method.requires else "bert"
    new = {} if sizes is None else {"new": {"family": family, "tokenizer": "items", **sizes}}
    return Recipe.from_dict({**new, "steps": [{"train": step}]}, "the options")


@handle_errors
def recommend(
    model: Annotated[str, typer.Argument(help="A recommender: a directory or a hub id.")],
    history: Annotated[
        list[str],
        typer.Option(
            help="Items in order of time, by name or title; several are separated by commas, or the option repeated;"
            " - reads one a line from stdin."
        ),
    ],
    k: Annotated[int, typer.Option("-k", min=1, help="Number of recommendations.")] = 10,
    exclude_seen: Annotated[
        bool, typer.Option("--exclude-seen/--include-seen", help="Whether items of the history are left out.")
    ] = True,
    device: Device = None,
    json: Json = False,
) -> None:
    """Rank the items that may follow a history."""
    from intaglio.checkpoint import load
    from intaglio.checkpoint.resolve import ITEMS
    from intaglio.methods.objectives.next_item import item_names
    from intaglio.methods.objectives.next_item import recommend as run

    checkpoint = load(model, device=device)
    known = set(item_names(checkpoint))
    titles = _titles(checkpoint.companions.get(ITEMS, b"{}"), f"{ITEMS} of {model}")
    by_title: dict[str, list[str]] = {}
    for name, title in titles.items():
        by_title.setdefault(title, []).append(name)
    items = [item for word in history for item in _items(word, known, by_title)]
    ranked = run(checkpoint, items, k, exclude_seen=exclude_seen)
    if json:
        print_json(
            {
                "model": model,
                "history": [{"item": item, "title": titles.get(item)} for item in items],
                "exclude_seen": exclude_seen,
                "recommendations": [
                    {"rank": rank, "item": entry.item, "title": titles.get(entry.item), "score": entry.score}
                    for rank, entry in enumerate(ranked, 1)
                ],
            }
        )
        return
    table = Table("rank", "item", *(["title"] if titles else []), "score", box=SIMPLE_HEAD)
    for rank, entry in enumerate(ranked, 1):
        shown = [Text(titles.get(entry.item, ""))] if titles else []
        table.add_row(str(rank), Text(entry.item), *shown, f"{entry.score:.3f}")
    out.print(table)


def _titles(content: bytes, what: str) -> dict[str, str]:
    """Return the titles of items by name."""
    try:
        titles = json_module.loads(content)
    except ValueError:
        titles = None
    if not isinstance(titles, dict) or not all(isinstance(title, str) for title in titles.values()):
        raise IntaglioError(f"{what} is damaged: it must map items to titles")
    return titles


def _items(word: str, known: set[str], by_title: dict[str, list[str]]) -> list[str]:
    """Return the items that a word of the command line names: an item, a title, or several after commas."""
    if word == "-":
        return [item for line in read_stdin().splitlines() if line for item in _items(line, known, by_title)]
    if word in known:
        return [word]
    if word in by_title:
        if len(by_title[word]) > 1:
            raise IntaglioError(f"the title {word!r} is that of {len(by_title[word])} items; name one by its item")
        return by_title[word]
    parts = [part.strip() for part in word.split(",")]
    if len(parts) == 1:
        return [word]  # unknown, which is reported with the model's items
    return [item for part in parts for item in _items(part, known, by_title)]
