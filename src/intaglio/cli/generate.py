"""`intaglio generate`: generation with streaming, by stock decoders and by those that draft, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jinja2 import TemplateError
from torch import nn
from transformers.generation.streamers import TextStreamer

from intaglio.checkpoint import Checkpoint
from intaglio.cli import settings
from intaglio.errors import IntaglioError
from intaglio.modeling.anatomy import anatomy


class _Streamer(TextStreamer):
    """Hands each finished piece of text to a function."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)


STOCK = ("greedy", "sample")
"""Decoders that are stock `generate` itself."""


@contextmanager
def count_passes(model: nn.Module) -> Iterator[list[int]]:
    """Count the forward calls of a model: the list's one number grows as they happen.

    Args:
        model: the target.
    """
    passes = [0]

    def count(*_: Any) -> None:
        passes[0] += 1

    handle = model.register_forward_pre_hook(count)
    try:
        yield passes
    finally:
        handle.remove()


def encode(checkpoint: Checkpoint, prompt: str, chat: bool) -> torch.Tensor:
    """Token ids [1, L] of a prompt, through the chat template if asked.

    Args:
        checkpoint: a decoder with a tokenizer.
        prompt: the user's text.
        chat: put it into the tokenizer's chat template as the user's turn.

    Raises:
        IntaglioError: an encoder, no tokenizer, no chat template or a broken one, an empty prompt, or one that is no
            text.
    """
    parts = anatomy(checkpoint.model)
    if not parts.causal or parts.head is None:
        what = "has no language-model head" if parts.causal else "is an encoder"
        raise IntaglioError(f"{checkpoint.source} {what}; it does not generate")
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        raise IntaglioError(f"{checkpoint.source} has no tokenizer, so it cannot read a prompt")
    if any("\ud800" <= c <= "\udfff" for c in prompt):
        raise IntaglioError(
            "the prompt holds half a character (a lone surrogate); only text that UTF-8 can hold is accepted"
        )
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise IntaglioError(f"the tokenizer of {checkpoint.source} has no chat template; leave --chat out")
        turns = [{"role": "user", "content": prompt}]
        try:
            found = tokenizer.apply_chat_template(
                turns,
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
                tokenizer_kwargs={"verbose": False},
            )
        except TemplateError as error:
            raise IntaglioError(f"the chat template of {checkpoint.source} cannot be used: {error}") from error
        ids: torch.Tensor = found["input_ids"]
    else:
        # Not verbose: a prompt beyond the context is refused by us, in one sentence.
        ids = tokenizer(prompt, return_tensors="pt", verbose=False)["input_ids"].to(torch.long)
    if ids.shape[1] == 0:
        raise IntaglioError("the prompt is empty; give at least one token")
    return ids


def check_options(
    decoder: str, temperature: float | None, top_k: int | None, top_p: float | None
) -> dict[str, float | int]:
    """The sampling options that were given, checked before any model loads; arguments as in `generate`.

    Raises:
        IntaglioError: an unknown decoder, a value out of range, or a sampling option for greedy.
    """
    known = [*STOCK, *settings.names()]
    if decoder not in known:
        raise IntaglioError(f"there is no decoder named {decoder!r}; accepted: {', '.join(known)}")
    if temperature is not None and not 0 < temperature < float("inf"):
        raise IntaglioError(f"temperature is {temperature}; it must be above 0 (for 0 use the decoder greedy)")
    if top_k is not None and top_k < 1:
        raise IntaglioError(f"top_k is {top_k}; it must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise IntaglioError(f"top_p is {top_p}; it must be above 0 and at most 1")
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    given = {name: value for name, value in options.items() if value is not None}
    if decoder == "greedy" and given:
        raise IntaglioError(f"{next(iter(given))} has no meaning for the decoder greedy; use --decoder sample")
    return given


def check_drafting(decoder: str, settings: Mapping[str, str], show_drafts: bool) -> None:
    """Refuse settings and options that a decoder has no use for, before any model loads; arguments as in `generate`.

    Raises:
        IntaglioError: something set for a stock decoder, or drafts asked of it, or settings that are wrong.
    """
    if decoder not in STOCK:
        settings.check_settings(decoder, settings)
        return
    others = ", ".join(settings.names())
    if settings:
        raise IntaglioError(f"the decoder {decoder} has nothing to set (--set {next(iter(settings))}); {others} have")
    if show_drafts:
        raise IntaglioError(f"the decoder {decoder} drafts nothing that --show-drafts could show; {others} do")


def generate(
    checkpoint: Checkpoint,
    prompt: str,
    *,
    decoder: str = "greedy",
    max_new_tokens: int = 128,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    chat: bool = False,
    seed: int = 0,
    settings: Mapping[str, str] | None = None,
    write: Callable[[str], None] | None = None,
    paint: Callable[[str, bool], None] | None = None,
) -> dict[str, Any]:
    """Generate from one prompt and say what it cost.

    Args:
        checkpoint: a decoder with a tokenizer.
        prompt: the user's text.
        decoder: `greedy`, `sample`, or one that drafts, which is greedy unless a sampling option is given.
        max_new_tokens: tokens at the most. Default 128.
        temperature: (sample) divides the logits; None: 1.
        top_k: (sample) keep the k most likely; None: all.
        top_p: (sample) keep the smallest set with this probability; None: all.
        chat: use the chat template.
        seed: (sample) of the draws.
        settings: (one that drafts) its settings as words; see `drafting.read_settings`.
        write: called with each piece of text as it comes.
        paint: (one that drafts) called in its place, with each piece and whether it was drafted.

    Returns:
        `text, token_ids, prompt_tokens, new_tokens, passes, seconds, tokens_per_second, tokens_per_pass,
        accepted_share, lossy, decoder`; `passes` counts the target's forward passes, prefill included, and
        `accepted_share` is the share of the drafted tokens verified that were accepted (None where nothing drafts).
        `lossy` is None where the output is the target's own, else `threshold`, `agreement` with the unaided target and
        `speed_up` in seconds over it, for which it is run too.

    Raises:
        IntaglioError: an unknown decoder, sampling options for greedy, settings that are wrong, or a prompt that leaves
            no room in the context.
    """
    settings = settings or {}
    given = check_options(decoder, temperature, top_k, top_p)
    check_drafting(decoder, settings, paint is not None)
    ids = encode(checkpoint, prompt, chat)
    checkpoint.check_ids(ids)
    room = checkpoint.context - ids.shape[1]
    if room < max_new_tokens:
        raise IntaglioError(
            f"a prompt of {ids.shape[1]} tokens leaves room for {room} new ones in the context of "
            f"{checkpoint.context}; {max_new_tokens} were asked for"
        )
    model: Any = checkpoint.model
    sampled = decoder == "sample" or bool(given)
    options: dict[str, Any] = {"do_sample": sampled, "max_new_tokens": max_new_tokens, "num_beams": 1}
    # What the checkpoint's own generation config says about sampling must not leak into what was asked for.
    options |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | given if sampled else {
        "temperature": None, "top_k": None, "top_p": None
    }  # fmt: skip
    streamer = None if write is None or paint is not None else _Streamer(checkpoint.tokenizer, write)
    loop = None
    if decoder in STOCK:
        options["streamer"] = streamer
    else:
        shown = None if paint is None else settings.Painter(checkpoint.tokenizer, paint)
        loop = settings.make_decoder(decoder, settings, checkpoint, streamer, shown)
        options["custom_generate"] = loop
    if model.generation_config.pad_token_id is None:
        options["pad_token_id"] = checkpoint.tokenizer.pad_token_id or checkpoint.tokenizer.eos_token_id or 0
    ids = ids.to(checkpoint.device)
    with torch.random.fork_rng(devices=[] if ids.device.type == "cpu" else None), count_passes(model) as calls:
        torch.manual_seed(seed)
        whole, seconds = _timed(model, ids, options)
        new = whole[0, ids.shape[1] :].tolist()
        lossy = None
        if loop is not None and not getattr(loop, "lossless", True):
            torch.manual_seed(seed)
            unaided, took = _timed(model, ids, options | {"custom_generate": None})
            lossy = {
                "threshold": loop.statistics.threshold,
                "agreement": loop.statistics.agreement,
                "speed_up": (len(new) / seconds) / ((unaided.shape[1] - ids.shape[1]) / took),
            }
    passes = calls[0] if loop is None else loop.statistics.passes
    return {
        "text": checkpoint.tokenizer.decode(new, skip_special_tokens=True),
        "token_ids": new,
        "prompt_tokens": ids.shape[1],
        "new_tokens": len(new),
        "passes": passes,
        "seconds": seconds,
        "tokens_per_second": len(new) / seconds,
        "tokens_per_pass": len(new) / passes,
        "accepted_share": None if loop is None else loop.statistics.accepted_share,
        "lossy": lossy,
        "decoder": decoder,
    }


def _timed(model: Any, ids: torch.Tensor, options: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Prompt and new tokens [1, L], and the seconds they took."""
    start = time.perf_counter()
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return whole, time.perf_counter() - start
