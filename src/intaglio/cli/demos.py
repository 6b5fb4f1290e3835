"""The command `demo`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from intaglio.cli.console import Device, Json, handle_errors, out, print_err, print_json, print_out, progress_bar


@handle_errors
def demo(
    topic: Annotated[str, typer.Argument(help="prune, search, generate, train or features.")] = "prune",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory of the results. [default: intaglio-demo]")
    ] = None,
    device: Device = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all randomness.")] = 0,
    json: Json = False,
) -> None:
    """Show what Intaglio does on small real models."""
    from intaglio.errors import IntaglioError, did_you_mean

    topics = {
        "prune": _demo_prune,
        "search": _demo_search,
        "generate": _demo_generate,
        "train": _demo_train,
        "features": _demo_features,
    }
    if topic not in topics:
        raise IntaglioError(f"the demo has no topic {topic!r}; {did_you_mean(topic, topics)}")
    topics[topic](output, device, seed, json)


def _run(
    run: Callable[..., dict[str, Any]], assets: tuple[str, ...], output: Path, device: str | None, seed: int, json: bool
) -> dict[str, Any] | None:
    """Fetch what a demo needs, run it, and return its report; None where it was printed as JSON."""
    from intaglio.data import assets as bundled

    bundled.fetch(assets, progress=print_err)
    with progress_bar() as progress:
        document = run(output, device=device, seed=seed, progress=progress)
    if json:
        print_json(document)
        return None
    return document


def _demo_generate(output: Path | None, device: str | None, seed: int, json: bool) -> None:
    from intaglio.cli.demo_generate import demo as run
    from intaglio.cli.generate import cost_line, output_lines
    from intaglio.data import assets as bundled

    bundled.fetch(("smollm2",), progress=print_err)
    output = output or Path("intaglio-demo-generate")

    def show(part: dict[str, Any]) -> None:
        if json:
            return
        out.rule(part["title"], align="left")
        print_out(f"> {part['prompt']}\n")
        for line in output_lines(part) or [part["text"]]:
            print_out(line)
        print_out(f"\n[{cost_line(part)}]")

    document = run(output, device=device, seed=seed, show=show)
    if json:
        print_json(document)
        return
    print_out(f"everything took {document['seconds']:.0f} s; results: {output / 'report.json'}")


def _demo_search(output: Path | None, device: str | None, seed: int, json: bool) -> None:
    from intaglio.cli.demo_search import demo as run
    from intaglio.cli.demo_search import tables

    output = output or Path("intaglio-demo-search")
    document = _run(run, ("minilm", "splade-tiny"), output, device, seed, json)
    if document is None:
        return
    for table in tables(document):
        out.print(table)
    indexed = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in document["seconds_to_index"].items())
    print_out(f"indexed in: {indexed}; everything took {document['seconds']:.0f} s")
    print_out(f"report: {output / 'report.html'}\nsearch it yourself: intaglio search {output / 'minilm'} --serve")


def _demo_train(output: Path | None, device: str | None, seed: int, json: bool) -> None:
    from intaglio import report
    from intaglio.cli.demo_train import TOPICS
    from intaglio.cli.demo_train import demo as run

    output = output or Path("intaglio-demo-train")
    document = _run(run, tuple(name for topic in TOPICS.values() for name in topic.assets), output, device, seed, json)
    if document is None:
        return
    for table in report.recommender_tables(document["topics"]["recommender"]):
        out.print(table)
    for row in document["topics"]["infilling"]["steps"][-1]["samples"]["rows"][:2]:
        print_out(f"a held-out line: {row['expected']!r}; filled in before: {row['before']!r}, after: {row['after']!r}")
    print_out(f"everything took {document['seconds']:.0f} s\nreport: {output / 'report.html'}")
    print_out(f"ask it yourself: intaglio recommend {output / 'recommender'} --history 'Star Wars' --history Alien")


def _demo_features(output: Path | None, device: str | None, seed: int, json: bool) -> None:
    from intaglio.cli.demo_features import demo as run
    from intaglio.cli.inspect import features_table

    output = output or Path("intaglio-demo-features")
    document = _run(run, ("smollm2", "wikipedia"), output, device, seed, json)
    if document is None:
        return
    out.print(features_table(document["features"]))
    print_out(document["sentence"])
    for row in document["steered"]:
        print_out(f"{row['label']}: {row['text']!r}")
    print_out(f"everything took {document['seconds']:.0f} s\npage: {output / 'report.html'}")


def _demo_prune(output: Path | None, device: str | None, seed: int, json: bool) -> None:
    from intaglio import report
    from intaglio.cli.demo import demo as run

    output = output or Path("intaglio-demo")
    document = _run(run, ("smollm2", "wikipedia"), output, device, seed, json)
    if document is None:
        return
    out.print(report.demo_table(document))
    out.print(report.demo_chart(document))
    for note in document["notes"]:
        print_out(note)
    print_out(f"report: {output / 'report.html'}")
