"""The command `generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from intaglio.cli.console import (
    Device,
    Dtype,
    Json,
    Model,
    handle_errors,
    paint,
    print_err,
    print_json,
    read_argument,
)


@handle_errors
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="Text to continue, or @FILE; - reads it from stdin.")] = None,
    prefix: Annotated[
        str | None, typer.Option(help="Text before a hole to fill, or @FILE; instead of a prompt.")
    ] = None,
    suffix: Annotated[str | None, typer.Option(help="Text after the hole, or @FILE.")] = None,
    decoder: Annotated[
        str | None,
        typer.Option(
            help="greedy, sample, a decoder that drafts (aded, chimera, draft_model, dyspec, hidden_transfer, lud, "
            "ngram, prompt_lookup), or another method (apply_pretrained, awrs, diverse_beam_search).",
            show_default="greedy; with --samples awrs",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="(methods) A field as key=value, such as corpus=FILE; can be repeated."),
    ] = None,
    show_drafts: Annotated[
        bool, typer.Option("--show-drafts", help="(drafts) Colour the accepted draft tokens.")
    ] = False,
    attention: Annotated[
        str | None,
        typer.Option(
            help="(greedy, sample) Sparse attention: quest, snapkv, ada_snapkv, vertical_slash, block_sparse, "
            "flex_prefill, or a baseline: sink_window, random, oracle."
        ),
    ] = None,
    budget: Annotated[
        int | None, typer.Option(min=1, help="(attention) Tokens that are read or kept. [default: the method's own]")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of new tokens.")] = 128,
    temperature: Annotated[float | None, typer.Option(help="(sampling) Divisor of the logits.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="(sampling) Keep the k most likely tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="(sampling) Keep the smallest set of tokens with this probability.")
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option("--json-schema", help="(constraint) Output is JSON valid under this schema file.")
    ] = None,
    regex: Annotated[
        str | None, typer.Option("--regex", help="(constraint) Output matches this regular expression as a whole.")
    ] = None,
    grammar: Annotated[
        Path | None, typer.Option("--grammar", help="(constraint) Output is derived by this Lark grammar file.")
    ] = None,
    choices: Annotated[
        str | None, typer.Option("--choices", help="(constraint) Output is one of these, separated by commas.")
    ] = None,
    sql: Annotated[
        Path | None,
        typer.Option("--sql", help="(constraint) Output is an SQLite SELECT statement over this file's CREATE TABLEs."),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="(constraint) Number of weighted samples to draw with awrs."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the chat template to the prompt.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="(sampling) Seed of the random draws.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Generate text and report the cost. Continues a prompt, or fills the hole between --prefix and --suffix."""
    from intaglio.checkpoint import load
    from intaglio.cli.constraints import read_constraint
    from intaglio.cli.generate import (
        check_attention,
        check_constraint,
        check_drafting,
        check_options,
        cost_line,
        output_lines,
    )
    from intaglio.cli.generate import generate as run
    from intaglio.cli.settings import read_settings, starts_empty
    from intaglio.errors import IntaglioError

    settings = read_settings(set_ or [])
    decoder = decoder or ("greedy" if samples is None else "awrs")
    check_options(decoder, temperature, top_k, top_p)
    check_drafting(decoder, settings, show_drafts)
    sparse = check_attention(attention, budget, decoder)
    constraint = read_constraint(json_schema, regex, grammar, choices, sql)
    check_constraint(decoder, constraint is not None, samples, settings)
    if json and show_drafts:
        raise IntaglioError("--show-drafts colours text, which --json does not print; give one of them")
    hole = prefix is not None or suffix is not None
    if (prompt is not None) == hole or (hole and chat):
        raise IntaglioError("give a prompt to continue, or --prefix and --suffix around a hole, without --chat")
    around = (read_argument(prefix or ""), read_argument(suffix or ""))
    text = around if hole else read_argument(prompt or "")
    checkpoint = load(model, device=device, dtype=dtype)

    streamed = False

    def write(piece: str) -> None:
        nonlocal streamed
        streamed = streamed or piece != ""
        sys.stdout.write(piece)
        sys.stdout.flush()

    def painted(piece: str, drafted: bool) -> None:
        nonlocal streamed
        streamed = streamed or piece != ""
        paint(piece, drafted)

    try:
        result = run(
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
            constraint=constraint,
            samples=samples,
            attention=sparse,
            write=None if json else write,
            paint=painted if show_drafts else None,
        )
    except IntaglioError:
        if streamed:
            write("\n")  # the sentence begins a line
        raise
    if json:
        print_json(result)
        return
    for line in output_lines(result):
        write(f"{line}\n")
    if not result["outputs"]:
        write("\n")
    if starts_empty(decoder, settings, checkpoint.attachments):
        print_err(f"{decoder} had no corpus and started empty; --set corpus=FILE gives it one")
    print_err(cost_line(result))
