"""The verbs. Anything heavy is imported when a verb runs, so that `intaglio --help` stays quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from intaglio.cli.console import Verbs, err, out, paint, print_json, progress_bar, read_stdin, say, speaks_plainly

app = typer.Typer(
    name="intaglio",
    cls=Verbs,
    help="Carve pretrained transformers: published methods on stock checkpoints, measured before and after.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Device = Annotated[str | None, typer.Option(help="Where to work: cpu, cuda, cuda:N, mps. [default: cpu]")]
Dtype = Annotated[
    str | None,
    typer.Option(help="Of the weights: float32, bfloat16, float16. [default: the checkpoint's own]"),
]
Model = Annotated[
    str,
    typer.Argument(
        help="A bundled name (smollm2, minilm), a directory, or a hub id (user/name or user/name@revision)."
    ),
]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        from importlib.metadata import version as installed

        out.print(installed("intaglio"), highlight=False)
        raise typer.Exit()


@app.command("list")
@speaks_plainly
def list_methods(
    room: Annotated[str | None, typer.Option(help="Only the methods of this room.")] = None,
    json: Json = False,
) -> None:
    """The catalogue: every method, where it comes from, what its evidence says."""
    from intaglio.errors import IntaglioError, did_you_mean
    from intaglio.evidence.record import is_stale, preregistered, shipped
    from intaglio.methods.registry import AREAS, PUBLISHED

    if room is not None and room not in AREAS:
        raise IntaglioError(f"there is no room named {room!r}; {did_you_mean(room, AREAS)}")
    entries = [entry for entry in PUBLISHED.values() if room in (None, entry.area)]
    records = {entry.slug: record for entry in entries if (record := shipped(entry.slug)) is not None}
    verdicts = {slug: record.verdict for slug, record in records.items()}
    if json:
        print_json(
            [
                {
                    "slug": e.slug,
                    "room": e.area,
                    "kind": list(e.kinds),
                    "paper": e.citation,
                    "verdict": verdicts.get(e.slug),
                }
                for e in entries
            ]
        )
        return
    table = Table("method", "room", "what it does, and its source", "verdict", box=SIMPLE_HEAD)
    for e in entries:
        said: str = verdicts.get(e.slug, "not yet run" if preregistered(e.slug) else "no evidence yet")
        stale = " (stale)" if e.slug in records and is_stale(records[e.slug]) else ""
        table.add_row(e.slug, e.area, f"{e.summary}\n[dim]{e.citation}[/dim]", said + stale)
    out.print(table)


@app.command()
@speaks_plainly
def show(
    slug: Annotated[str, typer.Argument(help="A method's slug; see `intaglio list`.")], json: Json = False
) -> None:
    """One method: its description, parameters and evidence."""
    import inspect

    from intaglio.checkpoint.bundled import bundled_heads as shipped_heads
    from intaglio.evidence import summary
    from intaglio.evidence.record import shipped, stale_parts
    from intaglio.methods.registry import PUBLISHED, get_method

    method, heads = get_method(slug), shipped_heads(slug)
    entry, record = PUBLISHED[slug], shipped(slug)
    schema = method.model_json_schema()
    if json:
        print_json(
            {
                "slug": slug,
                "room": entry.area,
                "kind": list(entry.kinds),
                "name": entry.name,
                "summary": entry.summary,
                "paper": entry.citation,
                "url": entry.url,
                "verdict": None if record is None else record.verdict,
                "stale": [] if record is None else stale_parts(record),
                "evidence": None if record is None else summary.document(record),
                "shipped": [one.told() for one in heads],
                "parameters": schema.get("properties", {}),
                "description": inspect.getdoc(method),
            }
        )
        return
    out.print(f"[bold]{entry.name}[/bold] ({slug}), in {entry.area}: {entry.summary}\n{entry.citation}\n{entry.url}\n")
    out.print(showing.description(method))
    for one in heads:
        out.print(f"\n[bold]Shipped[/bold]: {one.sentence()}", highlight=False)
    if record is None:
        out.print(f"\n[bold]Evidence[/bold]: {summary.without(slug)}", highlight=False)
        return
    out.print("\n[bold]Evidence[/bold]")
    out.print(summary.legend(record), markup=False, highlight=False)
    out.print(summary.arms(record))
    if record.secondaries:
        out.print(summary.secondaries(record))
    out.print(summary.sentence(record), markup=False, highlight=False)
    if stale := stale_parts(record):
        again = f"`intaglio prove {slug} --renew` clears it if the values are the same"
        out.print(f"Stale: {', '.join(stale)} changed since; {again}.", markup=False, highlight=False)


@app.command()
@speaks_plainly
def schema(json: Json = False) -> None:
    """Print the JSON Schema of a recipe (for editors and checkers)."""
    from intaglio.recipe.schema import json_schema

    print_json(json_schema())


@app.command()
@speaks_plainly
def assets(
    names: Annotated[list[str] | None, typer.Argument(help="Which ones. [default: all]")] = None,
    json: Json = False,
) -> None:
    """Fetch the bundled models and texts into the user's cache, once."""
    from intaglio.data import assets as bundled

    paths = bundled.fetch(names or None, progress=say)
    found = [{"name": path.name, "path": str(path)} for path in paths]
    if json:
        print_json(found)
        return
    for row in found:
        out.print(f"{row['name']}: {row['path']}", markup=False, highlight=False, soft_wrap=True)


@app.command()
@speaks_plainly
def carve(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A bundled name, a directory or a hub id (user/name or user/name@revision); wins over the recipe's."
        ),
    ] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", "-r", help="A YAML recipe.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The directory to make.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Annotated[int | None, typer.Option(help="Wins over the recipe's seed.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last finished step.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output or an interrupted run.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, its time and memory; do nothing.")
    ] = False,
    json: Json = False,
) -> None:
    """Run a recipe on a checkpoint: measured before and after, with a report beside the weights."""
    from intaglio.errors import IntaglioError
    from intaglio.recipe.schema import Recipe

    if recipe is None:
        raise IntaglioError("a recipe is missing: give one with --recipe FILE (recipes/ in the repository has some)")
    if output is None and not dry_run:
        raise IntaglioError("an output directory is missing: name one with -o DIR")
    read = Recipe.read(recipe)
    if seed is not None:
        read = Recipe.from_dict(read.dump() | {"seed": seed}, "--seed")
    if dry_run:
        _plan(read, model, device, dtype, output, overwrite, json)
        return
    assert output is not None
    from intaglio import report
    from intaglio.recipe.run import carve as run

    with progress_bar() as progress:
        document = run(
            read,
            output,
            model=model,
            device=device,
            dtype=dtype,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
        )
    if json:
        print_json(document)
        return
    out.print(report.carve_table(document))
    out.print(report.summary(document), markup=False, highlight=False)
    for note in document["notes"]:
        out.print(note, markup=False, highlight=False)
    out.print(f"checkpoint: {output}\nreport: {output / 'report.html'}", markup=False, highlight=False, soft_wrap=True)


def _plan(
    recipe: Any,
    model: str | None,
    device: str | None,
    dtype: str | None,
    output: Path | None,
    overwrite: bool,
    json: bool,
) -> None:
    import yaml

    from intaglio.recipe.plan import plan
    from intaglio.recipe.resume import check_output

    if output is not None:
        check_output(output, overwrite)
    found = plan(recipe, model=model, device=device, dtype=dtype)
    if json:
        print_json(found)
        return
    table = Table("step", "parameters", "seconds", "memory", title="The plan; nothing is done", box=SIMPLE_HEAD)
    for index, step in enumerate(found["steps"], start=1):
        given = yaml.safe_dump(step["given"], default_flow_style=True, sort_keys=False, width=1 << 20)
        parameters = given.strip()[1:-1]  # as a recipe has them, without the outer braces
        label = step["slug"] if step["verb"] in ("carve", step["slug"]) else f"{step['verb']} {step['slug']}"
        table.add_row(f"{index}. {label}", parameters, f"{step['seconds']:.0f}", _megabytes(step["memory_bytes"]))
    table.add_row("measuring, before and after", "", f"{found['measure_seconds']:.0f}", "")
    table.add_row("together", "", f"{found['seconds']:.0f}", _megabytes(found["memory_bytes"]), style="bold")
    out.print(table)
    out.print(
        f"{found['model']}, estimated at {found['gflops']:.0f} GFLOP/s, measured just now; memory beside "
        f"{_megabytes(found['libraries_bytes'])} of libraries.",
        highlight=False,
    )
    if found["left"] < found["parameters"]:
        share = found["left"] / found["parameters"]
        out.print(
            f"{found['left'] / 1e6:,.1f} of {found['parameters'] / 1e6:,.1f} million parameters are left, "
            f"{_megabytes(found['bytes'] * share)} of {_megabytes(found['bytes'])}.",
            highlight=False,
        )


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"


@app.command()
@speaks_plainly
def compare(
    a: Model,
    b: Annotated[str, typer.Argument(help="The other checkpoint; its agreement with the first is measured.")],
    texts: Annotated[
        str, typer.Option(help="Held-out text: a bundled name, file, folder or datasets id.")
    ] = "wikipedia",
    samples: Annotated[int, typer.Option(min=1, help="Segments to measure on.")] = 16,
    length: Annotated[int, typer.Option(min=8, help="Tokens of a segment.")] = 512,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write a page to this HTML file.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """The same measurements on any two checkpoints, side by side."""
    from intaglio import report
    from intaglio.recipe.run import compare as run
    from intaglio.recipe.schema import Measure

    with progress_bar() as progress:
        wanted = Measure(texts=texts, samples=samples, length=length)
        document = run(a, b, wanted=wanted, device=device, dtype=dtype, progress=progress)
    if output is not None:
        writer.write_text(output, report.compare_page(document))
    if json:
        print_json(document)
        return
    out.print(report.compare_table(document))
    if output is not None:
        out.print(f"report: {output}", markup=False, highlight=False, soft_wrap=True)


@app.command()
@speaks_plainly
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to go on from; - reads it from stdin.")],
    decoder: Annotated[
        str,
        typer.Option(
            help="greedy, sample; or one that drafts: aded, dyspec, lud, prompt_lookup, ngram, draft_model, ..."
        ),
    ] = "greedy",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="(drafting) a setting as key=value, such as corpus=FILE; may stand several times."),
    ] = None,
    show_drafts: Annotated[
        bool, typer.Option("--show-drafts", help="(drafting) colour the tokens that were drafted and accepted.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at the most.")] = 128,
    temperature: Annotated[float | None, typer.Option(help="(sampling) divides the logits.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="(sampling) keep the k most likely.")] = None,
    top_p: Annotated[float | None, typer.Option(help="(sampling) keep the smallest set with this probability.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the chat template.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="(sampling) of the draws.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Generate from a prompt, streaming; says what it cost."""
    from intaglio.checkpoint import load
    from intaglio.cli.generate import check_drafting, check_options
    from intaglio.cli.generate import generate as run
    from intaglio.cli.settings import read_settings, starts_empty
    from intaglio.errors import IntaglioError

    settings = read_settings(set_ or [])
    check_options(decoder, temperature, top_k, top_p)
    check_drafting(decoder, settings, show_drafts)
    if json and show_drafts:
        raise IntaglioError("--show-drafts colours text, which --json does not print; leave one of the two out")
    text = read_stdin() if prompt == "-" else prompt
    checkpoint = load(model, device=device, dtype=dtype)

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    found = run(
        checkpoint,
        text,
        decoder=decoder,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        chat=chat,
        seed=seed,
        settings=settings,
        write=None if json else write,
        paint=paint if show_drafts else None,
    )
    if json:
        print_json(found)
        return
    write("\n")
    if starts_empty(decoder, settings, checkpoint.attachments):
        say(f"{decoder} had no corpus and started empty; --set corpus=FILE gives it one")
    line = (
        f"{found['new_tokens']} tokens in {found['passes']} passes, {found['seconds']:.1f} s "
        f"({found['tokens_per_second']:.1f} tokens/s, {decoder})"
    )
    lossy = found["lossy"]
    if lossy is not None:
        line += (
            f": {found['tokens_per_pass']:.2f} tokens a pass; not lossless: at threshold {lossy['threshold']:g} "
            f"{lossy['agreement']:.1%} agreement with the unaided model, {lossy['speed_up']:.2f} times its speed"
        )
    elif found["accepted_share"] is not None:
        line += f": {found['tokens_per_pass']:.2f} tokens a pass, {found['accepted_share']:.0%} of the drafts accepted"
    say(line)


@app.command()
@speaks_plainly
def inspect(
    model: Model,
    masks: Annotated[bool, typer.Option("--masks", help="What each layer sees: who may look at whom.")] = False,
    experts: Annotated[
        str | None, typer.Option(metavar="TEXTS", help="How the experts of moe_x are used on these texts.")
    ] = None,
    length: Annotated[int, typer.Option(min=1, help="(masks) tokens that are shown.")] = 32,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="(masks) also draw it into this SVG file.")
    ] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Read a model: with --masks what each layer sees, of a stock one too; with --experts how its experts are used."""
    from intaglio.errors import IntaglioError

    if masks == (experts is not None):
        raise IntaglioError(
            "--masks and --experts are asked for; give one"
            if masks
            else "nothing is asked for: --masks shows what each layer sees, --experts how the experts of moe_x are used"
        )

    if experts is not None:
        used = inspecting.experts(model, experts, device)
        if json:
            print_json({"model": model, "texts": experts, "layers": used})
        else:
            out.print(inspecting.experts_table(model, experts, used))
        return
    found, data = inspecting.masks(model, length, output, device)
    if json:
        print_json(data)
        return
    out.print(inspecting.masks_table(model, found, length))
    if output is not None:
        out.print(f"picture: {output}", markup=False, highlight=False, soft_wrap=True)


@app.command()
@speaks_plainly
def export(
    model: Model,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The directory to make.")] = None,
    format: Annotated[
        str,
        typer.Option(help="safetensors (plain weights), compressed-tensors (few bits) or bitnet (ternary)."),
    ] = "safetensors",
    dtype: Dtype = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
    json: Json = False,
) -> None:
    """Write a checkpoint as stock transformers loads it by itself, or say why the format cannot hold it."""
    from intaglio.checkpoint import load
    from intaglio.errors import IntaglioError
    from intaglio.export import export as run

    if output is None:
        raise IntaglioError("an output directory is missing: name one with -o DIR")
    path = run(load(model, dtype=dtype), output, format, overwrite)  # type: ignore[arg-type]
    if json:
        print_json({"model": model, "format": format, "path": str(path)})
        return
    out.print(f"checkpoint ({format}): {path}", markup=False, highlight=False, soft_wrap=True)


@app.command()
@speaks_plainly
def prove(
    slug: Annotated[str, typer.Argument(help="A method's slug; see `intaglio list`.")],
    seed_base: Annotated[int, typer.Option(help="All seeds follow from it; another one gives other data.")] = 0,
    units: Annotated[int | None, typer.Option(help="Runs to compare. [default: a pilot says]")] = None,
    tier: Annotated[str | None, typer.Option(help="cpu or gpu. [default: the claim's]")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where results go.")] = Path("intaglio-prove"),
    workers: Annotated[int, typer.Option(help="Processes that share the work; the result is the same.")] = 1,
    record: Annotated[bool, typer.Option("--record", help="Also write the shipped record (source checkout).")] = False,
    renew: Annotated[
        bool, typer.Option("--renew", help="Run one run again; the same values clear a stale record (source checkout).")
    ] = False,
    beside: Annotated[
        bool,
        typer.Option("--beside", help="(--renew) Compare with what the code on record gives on this machine."),
    ] = False,
    json: Json = False,
) -> None:
    """Run a method's published claim: baseline and method side by side, and a verdict. Goes on where it was stopped."""
    from intaglio.errors import IntaglioError
    from intaglio.evidence import summary
    from intaglio.evidence.outlook import outlook
    from intaglio.evidence.record import Record
    from intaglio.evidence.renew import renew as again
    from intaglio.evidence.run import prove as run

    if renew and (record or units is not None or seed_base or tier):
        raise IntaglioError("--renew does one run of the record again, as it was made; leave out the other options")
    if beside and not renew:
        raise IntaglioError("--beside says what --renew compares with; it stands beside it")
    if renew:
        with progress_bar() as progress:
            renewed = again(slug, beside=beside, workers=workers, progress=progress)
        if json:
            print_json(renewed)
        else:
            same = "its values are the same with the changed" if renewed["changed"] else "not stale; nothing was run:"
            out.print(f"{slug}: {same} {', '.join(renewed['changed'])}".rstrip(" :"), markup=False, highlight=False)
        return
    with progress_bar() as progress:
        document = run(
            slug,
            seed_base=seed_base,
            units=units,
            tier=tier,
            directory=output,
            workers=workers,
            record=record,
            progress=progress,
        )
    if json:
        print_json(document)
        return
    found = Record.model_validate(document)
    out.print(summary.legend(found), markup=False, highlight=False)
    out.print(summary.arms(found))
    if found.secondaries:
        out.print(summary.secondaries(found))
    out.print(f"{summary.sentence(found)} {outlook(found)}".rstrip(), markup=False, highlight=False)
    out.print(f"results: {output}", markup=False, highlight=False, soft_wrap=True)


@app.command()
@speaks_plainly
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the report goes.")] = Path("intaglio-demo"),
    device: Device = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json: Json = False,
) -> None:
    """The main job, nothing to configure: a real 135M model pruned by four methods at 50 % and 2:4, measured."""
    from intaglio import report
    from intaglio.cli.demo import demo as run
    from intaglio.data import assets as bundled

    bundled.fetch(("smollm2", "wikipedia"), progress=say)
    with progress_bar() as progress:
        document = run(output, device=device, seed=seed, progress=progress)
    if json:
        print_json(document)
        return
    out.print(report.demo_table(document))
    out.print(report.demo_chart(document))
    for note in document["notes"]:
        out.print(note, markup=False, highlight=False)
    out.print(f"report: {output / 'report.html'}", markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point of the `intaglio` command."""
    err.soft_wrap = True
    app()


if __name__ == "__main__":
    main()
