"""The command `inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from intaglio.cli.console import (
    Device,
    Dtype,
    Json,
    Model,
    handle_errors,
    out,
    print_json,
    print_out,
    progress_bar,
    read_argument,
)

VIEWS = {
    "--masks": "shows the attention masks",
    "--experts": "the use of moe_x's experts",
    "--features": "the features of a dictionary",
    "--terms": "the words of a text",
    "--diagnostics": "the geometry and information of next-token steps",
    "--sparse-attention": "the study of long contexts",
    "--spectrum": "the singular values of convolutions and linear layers",
}


@handle_errors
def inspect(
    model: Model,
    masks: Annotated[bool, typer.Option("--masks", help="Show the attention mask of each layer.")] = False,
    experts: Annotated[
        str | None, typer.Option(metavar="TEXTS", help="Show how the experts of moe_x are used on these texts.")
    ] = None,
    features: Annotated[
        bool, typer.Option("--features", help="Write a page of the features of the model's dictionary.")
    ] = False,
    terms: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Show the words of a text's vector (learned-sparse encoders).")
    ] = None,
    diagnostics: Annotated[
        str | None,
        typer.Option(
            metavar="TEXTS", help="Measure entropies, information surplus, Fisher metric and alignment on these texts."
        ),
    ] = None,
    sparse_attention: Annotated[
        bool,
        typer.Option("--sparse-attention", help="Measure the accuracy of sparse attention on long-context tasks."),
    ] = False,
    spectrum: Annotated[
        bool, typer.Option("--spectrum", help="Show the singular values of convolutions (by FFT) and linear layers.")
    ] = False,
    size: Annotated[int, typer.Option(min=1, help="(spectrum) Side of each convolution's input.")] = 16,
    length: Annotated[int, typer.Option(min=1, help="(masks) Number of tokens.")] = 32,
    prompt: Annotated[
        str | None, typer.Option(help="(masks) Show what sparse attention keeps for this text, or @FILE.")
    ] = None,
    attention: Annotated[
        str | None, typer.Option(help="(masks with a prompt) Sparse attention by name, as for generate.")
    ] = None,
    budget: Annotated[int | None, typer.Option(min=1, help="(attention) Tokens that are read or kept.")] = None,
    dictionary: Annotated[
        str | None,
        typer.Option(
            help="(features) An attached dictionary, or a directory of sae_lens. [default: the first attached]"
        ),
    ] = None,
    texts: Annotated[str, typer.Option(help="(features) Texts to read.")] = "wikipedia",
    tokens: Annotated[int, typer.Option(min=256, help="(features) Tokens to read.")] = 65_536,
    against: Annotated[
        str | None, typer.Option(metavar="QUERY", help="(terms) Show what each word adds to the score of this query.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="(diagnostics) A field of markov_lm as key=value; can be repeated."),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(help="(sparse-attention) Another model to compare at equal operations; can be repeated."),
    ] = None,
    lengths: Annotated[str, typer.Option(help="(sparse-attention) Tokens of the prompts, comma-separated.")] = "1024",
    tasks: Annotated[
        str | None,
        typer.Option(
            help="(sparse-attention) niah, vt, cwe, retrieval, multi_hop, filtering, qa, choice. [default: all]"
        ),
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="(sparse-attention) Methods, comma-separated. [default: all]")
    ] = None,
    sparsities: Annotated[str, typer.Option(help="(sparse-attention) Target sparsities.")] = "0.5,0.8,0.9,0.95",
    question: Annotated[
        str | None, typer.Option(help="(sparse-attention) 'before and after' or 'after' the context. [default: both]")
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="(sparse-attention) Samples for each combination.")] = 20,
    documents: Annotated[
        str | None,
        typer.Option(help="(sparse-attention) JSON lines with context, question, answer and perhaps choices."),
    ] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="(sparse-attention) Tasks at the paper's sizes, with explanations.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="(sparse-attention) Seed of the samples.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="(masks) SVG file to draw to; (features, diagnostics, spectrum) the HTML page; (sparse-attention) the"
            " directory to make. [default: features.html; nothing for the others]",
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Inspect a model's masks, experts, features or predictions. Give one of the options from --masks to --spectrum."""
    from intaglio.errors import IntaglioError

    present = (
        masks,
        experts is not None,
        features,
        terms is not None,
        diagnostics is not None,
        sparse_attention,
        spectrum,
    )
    given = [name for name, is_given in zip(VIEWS, present, strict=True) if is_given]
    if len(given) != 1:
        shown = ", ".join(f"{name} {what}" for name, what in VIEWS.items())
        raise IntaglioError(
            f"{' and '.join(given)} are given; give one of them" if given else f"an option is missing: {shown}"
        )
    if set_ and diagnostics is None:
        raise IntaglioError("--set belongs to --diagnostics")
    if against is not None and terms is None:
        raise IntaglioError("--against explains the score of a text; give the text with --terms")
    if sparse_attention:
        from intaglio.cli.inspect_sparse import design

        sizes = design(lengths, methods, sparsities, samples, question, paper, seed)
        options = {"only": tasks, "documents": documents, "paper": paper, "device": device, "dtype": dtype}
        _study([model, *(also or ())], sizes, output, json, **options)
    elif spectrum:
        _spectrum(model, size, output, device, json)
    elif features:
        _features(model, dictionary, texts, tokens, output or Path("features.html"), device, json)
    elif terms is not None:
        _terms(model, terms, against, device, json)
    elif diagnostics is not None:
        _diagnostics(model, diagnostics, set_ or [], output, device, json)
    elif experts is not None:
        _experts(model, experts, device, json)
    elif prompt is not None or attention is not None or budget is not None:
        _kept(model, prompt, attention, budget, output, device, json)
    else:
        _masks(model, length, output, device, json)


def _study(models: Sequence[str], sizes: Any, output: Path | None, json: bool, **options: Any) -> None:
    from intaglio.cli import inspect_sparse

    with progress_bar() as progress:
        points, study = inspect_sparse.study(models, sizes, output=output, progress=progress, **options)
    if json:
        print_json(study)
        return
    for table in inspect_sparse.tables(points, study):
        out.print(table)
    for line in inspect_sparse.law_lines(study):
        print_out(line)
    if output is not None:
        print_out(f"page: {output / 'study.html'}")
        print_out(f"study: {output}")


def _spectrum(model: str, size: int, page: Path | None, device: str | None, json: bool) -> None:
    from intaglio.cli import inspect

    with progress_bar() as progress:
        document = inspect.spectrum(model, size, page, device, progress)
    if json:
        print_json(document)
        return
    out.print(inspect.spectrum_table(document))
    if page is not None:
        print_out(f"page: {page}")


def _features(
    model: str, dictionary: str | None, texts: str, tokens: int, page: Path, device: str | None, json: bool
) -> None:
    from intaglio.cli import inspect

    with progress_bar() as progress:
        document = inspect.features(model, dictionary, texts, tokens, page, device, progress)
    if json:
        print_json(document)
        return
    out.print(inspect.features_table(document))
    print_out(f"page: {page}")


def _terms(model: str, text: str, against: str | None, device: str | None, json: bool) -> None:
    from intaglio.cli import inspect

    document = inspect.terms(model, text, against, device)
    if json:
        print_json(document)
        return
    out.print(inspect.terms_table(document))


def _diagnostics(
    model: str, texts: str, settings: list[str], page: Path | None, device: str | None, json: bool
) -> None:
    from intaglio.cli import inspect
    from intaglio.cli.settings import read_settings
    from intaglio.methods.registry import get_method
    from intaglio.recipe.schema import from_cli

    method: Any = from_cli(get_method("markov_lm"), read_settings(settings), "--set")
    with progress_bar() as progress:
        document = inspect.diagnostics(model, texts, method, page, device, progress)
    if json:
        print_json(document)
        return
    for table in inspect.diagnostics_tables(document):
        out.print(table)
    if page is not None:
        print_out(f"page: {page}")


def _experts(model: str, texts: str, device: str | None, json: bool) -> None:
    from intaglio.cli import inspect

    used = inspect.experts(model, texts, device)
    if json:
        print_json({"model": model, "texts": texts, "layers": used})
        return
    out.print(inspect.experts_table(model, texts, used))


def _kept(
    model: str,
    prompt: str | None,
    attention: str | None,
    budget: int | None,
    picture: Path | None,
    device: str | None,
    json: bool,
) -> None:
    from intaglio.cli import inspect
    from intaglio.cli.generate import check_attention
    from intaglio.errors import IntaglioError

    sparse = check_attention(attention, budget, "greedy")
    if prompt is None:
        raise IntaglioError("--attention keeps keys by the input; give it with --prompt")
    layers, shares = inspect.kept(model, read_argument(prompt), sparse, picture, device)
    if json:
        print_json(shares)
        return
    out.print(inspect.kept_table(model, layers))
    if picture is not None:
        print_out(f"picture: {picture}")


def _masks(model: str, length: int, picture: Path | None, device: str | None, json: bool) -> None:
    from intaglio.cli import inspect

    layers, data = inspect.masks(model, length, picture, device)
    if json:
        print_json(data)
        return
    out.print(inspect.masks_table(model, layers, length))
    if picture is not None:
        print_out(f"picture: {picture}")
