"""The commands `ask` and `index compress`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intaglio.cli.console import (
    Device,
    Json,
    Model,
    handle_errors,
    print_err,
    print_json,
    print_out,
    progress_bar,
    read_argument,
)
from intaglio.cli.search import Encoder, Where, index_app
from intaglio.errors import IntaglioError, printable, shorten

if TYPE_CHECKING:
    from intaglio.checkpoint import Checkpoint
    from intaglio.methods.retrieval.refrag import MixedPrompt, Passage, Refrag
    from intaglio.search import Hit
    from intaglio.search.passage_cache import PassageCache

BATCH = 32
"""Passages that `index compress` encodes and commits at a time."""


@handle_errors
def ask(
    index: Where,
    question: Annotated[str, typer.Argument(help="The question; - reads it from stdin.")],
    model: Model,
    k: Annotated[int, typer.Option("-k", min=1, help="Passages that are retrieved.")] = 4,
    compress: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens read as one embedding; needs a model trained by refrag with as many."),
    ] = None,
    expand: Annotated[
        float | None, typer.Option(min=0, max=1, help="(--compress) Share of the chunks that stay tokens.")
    ] = None,
    expander: Annotated[
        str | None,
        typer.Option(help="(--compress) Their choice: policy, cosine, high_perplexity, low_perplexity or random."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of new tokens.")] = 128,
    encoder: Encoder = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Answer a question from an index's passages. Prints the sources and the time to the first token."""
    if compress is None and (expand is not None or expander is not None):
        raise IntaglioError("--expand and --expander belong to --compress; give it the tokens of a chunk, such as 16")
    words = read_argument(question) if question == "-" else question
    from intaglio.checkpoint import load
    from intaglio.search import Index

    with Index.open(index, encoder=encoder, device=device) as opened:
        hits = opened.search(words, k)
        if not hits:
            raise IntaglioError(f"no passage of {index} matches the question {shorten(repr(words))}")
        checkpoint = load(model, device=device)
        method = None if compress is None else _fitted(checkpoint, model, compress, expand, expander)
        began = time.perf_counter()
        passages, cached = None, 0
        if method is not None:
            passages, cached = _compressed(opened.passage_cache(method.space(checkpoint)), method, checkpoint, hits)
        encoding = time.perf_counter() - began
    plan = _Prompts(checkpoint, words, hits, method, passages, max_new_tokens)
    write = None if json else _write
    text, first = _timed_answer(checkpoint, plan.make, max_new_tokens, write)
    plain = first if method is None else None
    if method is not None and plan.plain_fits:
        plain = _timed_answer(checkpoint, plan.make_plain, 1, None)[1]
    used = hits[: plan.count]
    if json:
        print_json(
            {
                "index": str(index),
                "question": words,
                "answer": text,
                "sources": [{"id": hit.id, "title": hit.title, "start": hit.start, "score": hit.score} for hit in used],
                "positions": plan.positions,
                "seconds_to_first_token": first,
                "plain_positions": plan.plain_positions,
                "plain_seconds_to_first_token": plain,
                "compressed": None if method is None else {"cached": cached, "encoding_seconds": encoding},
            }
        )
        return
    _write("\n")
    for hit in used:
        title = f"  {hit.title}" if hit.title and hit.title != hit.id else ""
        print_out(printable(f"[{hit.rank}] {hit.id}{title}, from character {hit.start:,}"))
    line = f"time to first token: {1000 * first:,.0f} ms, {plan.positions:,} positions"
    if method is not None:
        shown = "does not fit into the context" if plain is None else f"{1000 * plain:,.0f} ms"
        line += (
            f"; plain prompt: {shown}, {plan.plain_positions:,} tokens; {cached} of {len(hits)} passages from the cache"
        )
        line += "" if cached == len(hits) else f", encoding the others {1000 * encoding:,.0f} ms"
    if plan.count < len(hits):
        line += f"; {len(hits) - plan.count} passages do not fit into the context"
    print_err(line)


@index_app.command("compress")
@handle_errors
def compress_index(index: Where, model: Model, device: Device = None, json: Json = False) -> None:
    """Compress every passage for `ask --compress`. The model must have been trained by refrag."""
    from intaglio.checkpoint import load
    from intaglio.search import Index

    with Index.open(index) as opened, progress_bar() as progress:
        checkpoint = load(model, device=device)
        method: Refrag = checkpoint.fitted("refrag")
        count, cache = opened.info()["chunks"], opened.passage_cache(method.space(checkpoint))
        hits, done, cached = opened.passages(), 0, 0
        while batch := list(islice(hits, BATCH)):
            cached += _compressed(cache, method, checkpoint, batch)[1]
            done += len(batch)
            progress(done, max(done, count), "compressing")
    if json:
        print_json({"index": str(index), "passages": done, "compressed": done - cached})
        return
    print_out(f"{index}: {done - cached:,} passages compressed, {cached:,} were in the cache")


def _fitted(checkpoint: Checkpoint, model: str, compress: int, expand: float | None, expander: str | None) -> Refrag:
    """Return the fitted compressor with the options of the command line."""
    given = {name: value for name, value in (("expand", expand), ("expander", expander)) if value is not None}
    from pydantic import ValidationError

    from intaglio.methods.base import validation_sentence
    from intaglio.methods.retrieval.refrag import Refrag

    try:
        method: Refrag = checkpoint.fitted("refrag", **given)
    except ValidationError as error:
        raise IntaglioError(f"--{validation_sentence(error, Refrag, given)}") from error
    if method.chunk_size != compress:
        raise IntaglioError(
            f"--compress is {compress}; {model} was fitted to chunks of {method.chunk_size} tokens, which is accepted"
        )
    return method


def _compressed(
    cache: PassageCache, method: Refrag, checkpoint: Checkpoint, hits: Sequence[Hit]
) -> tuple[list[Passage], int]:
    """Return the compressed passages of hits, and how many were cached; the others are cached now."""
    import torch

    blank = next((hit for hit in hits if not hit.text.strip()), None)
    if blank is not None:
        raise IntaglioError(
            f"the index {cache.path} has no text of the passage {blank.id!r}, so it cannot be compressed"
        )
    known: list[Passage | None] = []
    for hit in hits:
        arrays = cache.read(hit)
        tensors = {name: torch.from_numpy(array.copy()) for name, array in (arrays or {}).items()}
        known.append(method.from_cache(checkpoint, hit.text, tensors))
    missing = [number for number, passage in enumerate(known) if passage is None]
    made = dict(zip(missing, method.compress(checkpoint, [hits[n].text for n in missing]), strict=True))
    result = [made.get(number, passage) for number, passage in enumerate(known)]
    whole: list[Passage] = [passage for passage in result if passage is not None]
    if "perplexity" in method.expander:
        for number, passage in enumerate(whole):
            if passage.losses is None:
                made[number] = whole[number] = method.with_losses(checkpoint, passage)
    cache.write(
        [(hits[n], {name: value.float().numpy() for name, value in made[n].tensors().items()}) for n in sorted(made)]
    )
    return whole, len(hits) - len(missing)


class _Prompts:
    """The prompt of an answer, with as many of the best passages as fit, and the plain one of the same passages.

    Raises:
        IntaglioError: the question alone does not fit into the context.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        question: str,
        hits: Sequence[Hit],
        method: Refrag | None,
        passages: list[Passage] | None,
        max_new_tokens: int,
    ) -> None:
        from intaglio.methods.retrieval.refrag.passages import token_prompt
        from intaglio.methods.retrieval.refrag.training_rows import passage_ids, question_parts

        before, after = question_parts(checkpoint, question, "context_first" if method is None else method.order)
        room, alone = checkpoint.context - max_new_tokens, len(before) + len(after)
        if alone > room:
            raise IntaglioError(
                f"the question takes {alone} tokens with its prompt; {max(0, room)} fit beside {max_new_tokens} new "
                f"ones into the context of {checkpoint.context}"
            )
        ids = [passage_ids(checkpoint, hit.text) for hit in hits]

        def make(count: int) -> MixedPrompt:
            if method is None or passages is None:
                return token_prompt(before, ids[:count], after)
            return method.prompt(checkpoint, (before, after), passages[:count])

        self.count = next(count for count in range(len(hits), -1, -1) if len(make(count)) <= room)
        self.make = partial(make, self.count)
        self.make_plain = partial(token_prompt, before, ids[: self.count], after)
        self.positions, self.plain_positions = len(self.make()), len(self.make_plain())
        self.plain_fits = self.plain_positions <= room


def _timed_answer(
    checkpoint: Checkpoint, make: Callable[[], MixedPrompt], max_new_tokens: int, write: Callable[[str], None] | None
) -> tuple[str, float]:
    """Return the answer to a prompt, and the seconds to its first token, making the prompt included."""
    import torch

    from intaglio.cli.generate import WritingStreamer
    from intaglio.methods.retrieval.refrag import generate_answer

    times: list[float] = []

    class Clock(WritingStreamer):
        def put(self, value: Any) -> None:
            times.append(time.perf_counter())
            super().put(value)

    with torch.no_grad():
        checkpoint.model(torch.zeros((1, 1), dtype=torch.int64, device=checkpoint.device))  # one-time costs
    began = time.perf_counter()
    streamer = Clock(checkpoint.tokenizer, write or (lambda text: None))
    ids = generate_answer(checkpoint, make(), max_new_tokens, streamer)
    # The first call is of the prompt, the second of the first token.
    return checkpoint.tokenizer.decode(ids, skip_special_tokens=True), times[1] - began


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


__all__ = ["ask", "compress_index"]
