"""The commands. Heavy modules are imported when a command runs, so that `intaglio --help` stays fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from intaglio.cli.ask import ask
from intaglio.cli.classify import classify
from intaglio.cli.console import (
    CommandGroup,
    Device,
    Dtype,
    Json,
    Model,
    err,
    handle_errors,
    out,
    print_err,
    print_json,
    print_out,
    progress_bar,
)
from intaglio.cli.demos import demo
from intaglio.cli.generate_command import generate
from intaglio.cli.inspect_command import inspect
from intaglio.cli.search import evaluate, index_app, search
from intaglio.cli.soup import soup
from intaglio.cli.train import recommend, train

app = typer.Typer(
    name="intaglio",
    cls=CommandGroup,
    help="Apply published masking and sparsity methods to stock checkpoints, measured before and after.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        from importlib.metadata import version as installed

        out.print(installed("intaglio"), highlight=False)
        raise typer.Exit()


@app.command("list")
@handle_errors
def list_methods(
    area: Annotated[str | None, typer.Option(help="Only the methods of this area.")] = None,
    room: Annotated[str | None, typer.Option(hidden=True)] = None,  # the former name of --area
    json: Json = False,
) -> None:
    """List the published methods with their sources and verdicts."""
    from intaglio.errors import IntaglioError, did_you_mean
    from intaglio.evidence.engine import tables
    from intaglio.evidence.engine.record import committed
    from intaglio.methods.registry import AREAS, PUBLISHED

    area = area or room
    if area is not None and area not in AREAS:
        raise IntaglioError(f"there is no area named {area!r}; {did_you_mean(area, AREAS)}")
    entries = [entry for entry in PUBLISHED.values() if area in (None, entry.area)]
    records = {entry.slug: record for entry in entries if (record := committed(entry.slug)) is not None}
    verdicts = {slug: record.verdict for slug, record in records.items()}
    if json:
        print_json(
            [
                {
                    "slug": entry.slug,
                    "area": entry.area,
                    "kind": list(entry.kinds),
                    "paper": entry.citation,
                    "verdict": verdicts.get(entry.slug),
                }
                for entry in entries
            ]
        )
        return
    table = Table("method, area", "what it does, and its source", "evidence", box=SIMPLE_HEAD, pad_edge=False)
    table.columns[0].no_wrap = True
    for entry in entries:
        evidence = tables.cell(records[entry.slug]) if entry.slug in records else tables.without(entry.slug)
        what = f"{entry.summary}\n[dim]{entry.citation}[/dim]"
        table.add_row(f"{entry.slug}\n[dim]{entry.area}[/dim]", what, evidence)
    out.print(table)


@app.command()
@handle_errors
def show(
    slug: Annotated[str, typer.Argument(help="Slug of a method; see `intaglio list`.")], json: Json = False
) -> None:
    """Show a method: its description, parameters and evidence."""
    import inspect

    from intaglio.checkpoint.bundled import bundled_heads
    from intaglio.cli.show import description
    from intaglio.evidence.engine import tables
    from intaglio.evidence.engine.record import committed, is_registered, is_stale
    from intaglio.evidence.engine.registration import load_claim
    from intaglio.methods.registry import METHODS, get_method

    method, heads = get_method(slug), bundled_heads(slug)
    entry, record = METHODS[slug], committed(slug)
    schema = method.model_json_schema()
    if json:
        print_json(
            {
                "slug": slug,
                "area": entry.area,
                "kind": list(entry.kinds),
                "name": entry.name,
                "summary": entry.summary,
                "paper": entry.citation,
                "url": entry.url,
                "verdict": None if record is None else record.verdict,
                "evidence": None if record is None else record.summary(),
                "shipped": [one.summary() for one in heads],
                "parameters": schema.get("properties", {}),
                "description": inspect.getdoc(method),
            }
        )
        return
    out.print(f"[bold]{entry.name}[/bold] ({slug}), in {entry.area}: {entry.summary}\n{entry.citation}\n{entry.url}\n")
    out.print(description(method), crop=False)
    for one in heads:
        out.print(f"\n[bold]Shipped[/bold]: {one.sentence()}", highlight=False)
    if record is None:
        if entry.citation:
            run = f"; `intaglio prove {slug}` runs it" if is_registered(slug) else ""
            out.print(f"\n[bold]Evidence[/bold]: {tables.without(slug)}{run}.", highlight=False)
        return
    out.print("\n[bold]Evidence[/bold]")
    out.print(tables.report(record), highlight=False)
    if is_registered(slug) and is_stale(record, claim := load_claim(slug)):
        out.print(
            f"This record is of version {record.version} of the claim; version {claim.version} is registered and not"
            " yet run.",
            highlight=False,
        )


@app.command()
@handle_errors
def schema(json: Json = False) -> None:
    """Print the JSON Schema of a recipe, for editors and validators."""
    from intaglio.recipe.schema import json_schema

    print_json(json_schema())


@app.command()
@handle_errors
def assets(
    names: Annotated[list[str] | None, typer.Argument(help="Names of assets. [default: all]")] = None,
    json: Json = False,
) -> None:
    """Fetch the bundled models and texts into the user's cache, once."""
    from intaglio.data import assets as bundled

    paths = bundled.fetch(names or None, progress=print_err)
    if json:
        print_json([{"name": path.name, "path": str(path)} for path in paths])
        return
    for path in paths:
        print_out(f"{path.name}: {path}")


@app.command()
@handle_errors
def carve(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A bundled name, a directory or a hub id (user/name or user/name@revision); overrides the recipe's."
        ),
    ] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", "-r", help="A YAML recipe.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The directory to make.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Annotated[int | None, typer.Option(help="Overrides the recipe's seed.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume after the last finished step.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output or an interrupted run.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan with its time and memory; do nothing.")
    ] = False,
    json: Json = False,
) -> None:
    """Run a recipe and measure the model before and after. Writes a checkpoint with a report."""
    from intaglio.errors import IntaglioError
    from intaglio.recipe.schema import Recipe

    if recipe is None:
        raise IntaglioError("a recipe is missing: give one with --recipe FILE (recipes/ in the repository has some)")
    if output is None and not dry_run:
        raise IntaglioError("an output directory is missing: name one with -o DIR")
    read = Recipe.read(recipe)
    source: dict[str, Any] = {"model": model, "device": device, "dtype": dtype, "seed": seed}
    if dry_run:
        _print_plan(read, source, output, overwrite, json)
        return
    assert output is not None
    from intaglio import report
    from intaglio.recipe.run import carve as run

    with progress_bar() as progress:
        document = run(read, output, **source, resume=resume, overwrite=overwrite, progress=progress)
    if json:
        print_json(document)
        return
    tables, sentences = report.overview(document)
    for table in tables:
        out.print(table)
    for sentence in sentences:
        print_out(sentence)
    print_out(f"checkpoint: {output}\nreport: {output / 'report.html'}")


def _print_plan(recipe: Any, source: dict[str, Any], output: Path | None, overwrite: bool, json: bool) -> None:
    import yaml

    from intaglio.recipe.plan import plan
    from intaglio.recipe.resume import check_output

    if output is not None:
        check_output(output, overwrite)
    document = plan(recipe, **source)
    if json:
        print_json(document)
        return
    table = Table("step", "parameters", "seconds", "memory", title="The plan; nothing is done", box=SIMPLE_HEAD)
    for index, step in enumerate(document["steps"], start=1):
        given = yaml.safe_dump(step["given"], default_flow_style=True, sort_keys=False, width=1 << 20)
        parameters = given.strip()[1:-1]  # as a recipe has them, without the outer braces
        label = step["slug"] if step["verb"] in ("carve", step["slug"]) else f"{step['verb']} {step['slug']}"
        table.add_row(f"{index}. {label}", parameters, f"{step['seconds']:.0f}", _megabytes(step["memory_bytes"]))
    table.add_row("measurements before and after", "", f"{document['measure_seconds']:.0f}", "")
    table.add_row("total", "", f"{document['seconds']:.0f}", _megabytes(document["memory_bytes"]), style="bold")
    out.print(table)
    out.print(
        f"{document['model']}, estimated at {document['gflops']:.0f} GFLOP/s, measured just now; memory without the "
        f"{_megabytes(document['libraries_bytes'])} of the libraries.",
        highlight=False,
    )
    if document["left"] < document["parameters"]:
        share = document["left"] / document["parameters"]
        out.print(
            f"{document['left'] / 1e6:,.1f} of {document['parameters'] / 1e6:,.1f} million parameters are left, "
            f"{_megabytes(document['bytes'] * share)} of {_megabytes(document['bytes'])}.",
            highlight=False,
        )


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"


@app.command()
@handle_errors
def compare(
    a: Model,
    b: Annotated[str, typer.Argument(help="The second checkpoint; its agreement with the first is measured.")],
    texts: Annotated[
        str, typer.Option(help="Held-out text: a bundled name, file, folder or datasets id.")
    ] = "wikipedia",
    samples: Annotated[int, typer.Option(min=1, help="Number of segments.")] = 16,
    length: Annotated[int, typer.Option(min=8, help="Tokens of a segment.")] = 512,
    continuations: Annotated[
        int, typer.Option(min=0, help="Number of segments that both continue greedily; the report shows the texts.")
    ] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write a report to this HTML file.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Compare two checkpoints by the same measurements. With --continuations, show their texts side by side."""
    from intaglio import atomic_io, report
    from intaglio.recipe.run import compare as run
    from intaglio.recipe.schema import Measure

    with progress_bar() as progress:
        measure = Measure(texts=texts, samples=samples, length=length, continuations=continuations)
        document = run(a, b, wanted=measure, device=device, dtype=dtype, progress=progress)
    if output is not None:
        atomic_io.write_text(output, report.compare_page(document))
    if json:
        print_json(document)
        return
    out.print(report.compare_table(document))
    if output is not None:
        print_out(f"report: {output}")


app.command()(generate)


@app.command()
@handle_errors
def tune(
    model: Model,
    rows: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1",
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Measure which kernels are fastest for a model here. Later runs use the result."""
    from intaglio.checkpoint import load
    from intaglio.cli.tune import notes, tables
    from intaglio.cli.tune import tune as run
    from intaglio.environment.tuning import default_path
    from intaglio.errors import IntaglioError

    counts = [int(word) if word.strip().isdecimal() else 0 for word in rows.split(",")]
    if not min(counts):
        raise IntaglioError(f"rows is {rows!r}; numbers from 1 on, separated by commas, are accepted")
    document = run(load(model, dtype=dtype), counts)
    if json:
        print_json(document)
        return
    for table in tables(document):
        out.print(table)
    for line in [*notes(document), f"kept in {default_path()}"]:
        print_out(line)


app.command()(inspect)


@app.command()
@handle_errors
def export(
    model: Model,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The directory to make.")] = None,
    format: Annotated[
        str,
        typer.Option(
            help="safetensors (plain weights), compressed-tensors (few bits), bitnet (ternary) or "
            "sentence-transformers (text encoders)."
        ),
    ] = "safetensors",
    dtype: Dtype = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
    json: Json = False,
) -> None:
    """Write a checkpoint in a format of stock libraries. What a format cannot represent is refused."""
    from intaglio.checkpoint import load
    from intaglio.errors import IntaglioError
    from intaglio.exporters import export as run

    if output is None:
        raise IntaglioError("an output directory is missing: name one with -o DIR")
    path = run(load(model, dtype=dtype), output, format, overwrite)  # type: ignore[arg-type]
    if json:
        print_json({"model": model, "format": format, "path": str(path)})
        return
    print_out(f"checkpoint ({format}): {path}")


@app.command()
@handle_errors
def prove(
    slugs: Annotated[list[str] | None, typer.Argument(help="A method's slug; several with --spot.")] = None,
    seed_base: Annotated[int, typer.Option(help="All seeds follow from it; another base gives other data.")] = 0,
    units: Annotated[
        int | None, typer.Option(help="Number of units (repetitions), judged once. [default: the claim's schedule]")
    ] = None,
    tier: Annotated[str | None, typer.Option(help="Size of the experiment: cpu or gpu. [default: the claim's]")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where results go.")] = Path("intaglio-prove"),
    workers: Annotated[int, typer.Option(help="Processes that share the work; the result is the same.")] = 1,
    record: Annotated[bool, typer.Option("--record", help="Write the committed record (source checkout).")] = False,
    pending: Annotated[
        bool, typer.Option("--pending", help="Record all registered claims without a record, cheapest first.")
    ] = False,
    minutes: Annotated[float, typer.Option(min=0, help="(--pending) Wall time after which no unit is begun.")] = 60,
    spot: Annotated[bool, typer.Option("--spot", help="Rerun the cheapest unit of each record, and compare.")] = False,
    json: Json = False,
) -> None:
    """Test a method's published claim against a baseline. A stopped run resumes."""
    from intaglio.errors import IntaglioError
    from intaglio.evidence.engine import tables
    from intaglio.evidence.engine.pending import prove_pending
    from intaglio.evidence.engine.run import prove as run
    from intaglio.evidence.engine.spot import spot as check

    if pending == bool(slugs) or (len(slugs or ()) > 1 and not spot):
        raise IntaglioError("prove takes the slug of one method, --spot with one or more, or --pending alone")
    if spot:
        checks = [check(slug) for slug in slugs or ()]
        if json:
            print_json([result.document() for result in checks])
        for result in checks if not json else ():
            out.print(result.sentence(), markup=False, highlight=False)
        return
    if pending:
        outcomes = prove_pending(minutes, workers)
        if json:
            print_json(list(outcomes))
        for line in outcomes:
            out.print(line, markup=False, highlight=False)
        return
    with progress_bar() as progress:
        proved = run(
            (slugs or [""])[0],
            seed_base=seed_base,
            units=units,
            tier=tier,
            directory=output,
            workers=workers,
            record=record,
            progress=progress,
        )
    if json:
        print_json(proved.document())
        return
    out.print(tables.report(proved), highlight=False)
    if not record:
        out.print(f"results: {output}", markup=False, highlight=False, soft_wrap=True)


app.add_typer(index_app, name="index")
app.command()(search)
app.command()(ask)
app.command()(evaluate)
app.command()(train)
app.command()(recommend)
app.command()(classify)
app.command()(soup)
app.command()(demo)


def main() -> None:
    """Run the `intaglio` command."""
    err.soft_wrap = True
    app()


if __name__ == "__main__":
    main()
