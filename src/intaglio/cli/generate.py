"""`intaglio generate`: streaming generation with stock decoders and decoding methods, and its cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from jinja2 import TemplateError
from torch import nn
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.streamers import TextStreamer

from intaglio.checkpoint import Checkpoint
from intaglio.cli.settings import check_settings
from intaglio.constraints import Constraint, ConstraintProcessor, Vocabulary, check_output
from intaglio.errors import IntaglioError
from intaglio.measures.infilling import infill_prompt
from intaglio.methods.attention.sparse_frontier import SparseFrontier, cache_bytes, named
from intaglio.methods.base import SamplesConstrained
from intaglio.methods.registry import METHODS, get_method
from intaglio.modeling.anatomy import CACHE, anatomy
from intaglio.speculative.factory import decoder_names, drafter_names, make_decoder
from intaglio.speculative.protocols import Step


class WritingStreamer(TextStreamer):
    """Passes each finished piece of text to a function."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write a piece; see `TextStreamer`."""
        self._write(text)


STOCK = ("greedy", "sample")
"""Decoders that are stock `generate` itself."""


@contextmanager
def count_passes(model: nn.Module) -> Iterator[list[int]]:
    """Count the forward calls of a model in the only element of the list."""
    passes = [0]

    def count(*_: Any) -> None:
        passes[0] += 1

    handle = model.register_forward_pre_hook(count)
    try:
        yield passes
    finally:
        handle.remove()


def check_prompt(checkpoint: Checkpoint, prompt: str) -> None:
    """Raise an `IntaglioError` for a model that does not generate from text, or text that is not valid."""
    parts = anatomy(checkpoint.model)
    if not parts.causal or parts.head is None:
        what = "has no language-model head" if parts.causal else "is an encoder"
        raise IntaglioError(f"{checkpoint.source} {what}; it does not generate")
    if checkpoint.tokenizer is None:
        raise IntaglioError(f"{checkpoint.source} has no tokenizer, so it cannot read a prompt")
    if any("\ud800" <= c <= "\udfff" for c in prompt):
        raise IntaglioError(
            "the prompt holds half a character (a lone surrogate); only text that UTF-8 can hold is accepted"
        )


def encode(checkpoint: Checkpoint, prompt: str, chat: bool) -> torch.Tensor:
    """Return token ids [1, L] of a prompt, with `chat` as a user's turn in the chat template.

    Raises:
        IntaglioError: an encoder, no tokenizer, no or a broken chat template, or an empty or invalid prompt.
    """
    check_prompt(checkpoint, prompt)
    tokenizer = checkpoint.tokenizer
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise IntaglioError(f"the tokenizer of {checkpoint.source} has no chat template; leave --chat out")
        turns = [{"role": "user", "content": prompt}]
        try:
            encoded = tokenizer.apply_chat_template(
                turns,
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
                tokenizer_kwargs={"verbose": False},
            )
        except TemplateError as error:
            raise IntaglioError(f"the chat template of {checkpoint.source} cannot be used: {error}") from error
        ids: torch.Tensor = encoded["input_ids"]
    else:
        # Not verbose: a prompt beyond the context is refused later, in one sentence.
        ids = tokenizer(prompt, return_tensors="pt", verbose=False)["input_ids"].to(torch.long)
    if ids.shape[1] == 0:
        raise IntaglioError("the prompt is empty; give at least one token")
    return ids


def check_options(
    decoder: str, temperature: float | None, top_k: int | None, top_p: float | None
) -> dict[str, float | int]:
    """Return the given sampling options, checked before any model loads; arguments as in `generate`.

    Raises:
        IntaglioError: an unknown decoder, a value out of range, or a sampling option for greedy.
    """
    known = [*STOCK, *decoder_names()]
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
        raise IntaglioError(f"{next(iter(given))} has no effect on the decoder greedy; use --decoder sample")
    return given


def check_constraint(
    decoder: str, constrained: bool, samples: int | None, settings: Mapping[str, str] | None = None
) -> None:
    """Raise an `IntaglioError` for a constraint or samples that a decoder does not take, before any model loads."""
    sampler = get_method(decoder) if decoder in METHODS else None
    if not isinstance(sampler, SamplesConstrained):
        drafts = decoder in (*STOCK, *drafter_names())
        if constrained and not drafts:
            takers = ", ".join([*STOCK, *drafter_names(), *_constrained_samplers()])
            raise IntaglioError(f"the decoder {decoder} takes no constraint; {takers} do")
        if samples is not None:
            others = ", ".join(_constrained_samplers())
            raise IntaglioError(f"samples is {samples}, which the decoder {decoder} does not draw; {others} does")
        return
    if not constrained:
        raise IntaglioError(f"the decoder {decoder} needs a constraint; give --json-schema, --regex, --grammar, ...")
    for name in sorted(sampler.sample_fields & set(settings or {})) if samples is not None else ():
        raise IntaglioError(f"--samples and --set {name} are given; give one of them")


def _constrained_samplers() -> list[str]:
    return [name for name in decoder_names() if name in METHODS and isinstance(get_method(name), SamplesConstrained)]


def check_drafting(decoder: str, settings: Mapping[str, str], show_drafts: bool) -> None:
    """Raise an `IntaglioError` for settings and options that a decoder does not have, before any model loads."""
    if show_drafts and decoder not in drafter_names():
        others = ", ".join(drafter_names())
        raise IntaglioError(f"the decoder {decoder} drafts nothing for --show-drafts to show; {others} do")
    if decoder not in STOCK:
        check_settings(decoder, settings)
    elif settings:
        others = ", ".join(decoder_names())
        raise IntaglioError(f"the decoder {decoder} has no settings (--set {next(iter(settings))}); {others} have")


def check_attention(name: str | None, budget: int | None, decoder: str) -> SparseFrontier | None:
    """Return the sparse attention of a name and a budget in tokens, checked before any model loads.

    Raises:
        IntaglioError: an unknown name, a budget that it does not accept, or a decoder that drafts.
    """
    if name is None:
        if budget is not None:
            raise IntaglioError(f"budget is {budget} without an attention to limit; give --attention too")
        return None
    if decoder not in STOCK:
        raise IntaglioError(
            f"the decoder {decoder} makes passes of its own, which sparse attention does not follow; "
            f"{' and '.join(STOCK)} work with it"
        )
    return named(name, budget)


def generate(
    checkpoint: Checkpoint,
    prompt: str | tuple[str, str],
    *,
    decoder: str = "greedy",
    max_new_tokens: int = 128,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    chat: bool = False,
    seed: int = 0,
    settings: Mapping[str, str] | None = None,
    constraint: Constraint | None = None,
    samples: int | None = None,
    attention: SparseFrontier | None = None,
    write: Callable[[str], None] | None = None,
    paint: Callable[[str, bool], None] | None = None,
) -> dict[str, Any]:
    """Generate from one prompt and measure the cost.

    Args:
        checkpoint: a decoder with a tokenizer.
        prompt: the user's text; or a prefix and a suffix, between which the model fills the hole.
        decoder: `greedy`, `sample`, or a decoding method, which is greedy unless a sampling option is given.
        max_new_tokens: most new tokens. Default 128.
        temperature: (sample) divides the logits; None: 1.
        top_k: (sample) keep the k most likely; None: all.
        top_p: (sample) keep the smallest set with this probability; None: all.
        chat: use the chat template.
        seed: (sample) of the draws.
        settings: (methods) settings as words; see `settings.read_settings`.
        constraint: that the new text must meet (`intaglio.constraints`).
        samples: (decoders that sample under a constraint) number of particles, whose distinct outputs are all
            returned; None: a single draw.
        attention: (greedy, sample) sparse attention while generating; None for the checkpoint's own.
        write: called with each piece of text as it is generated; not by decoders without a streamer.
        paint: (drafting) called instead, with each piece and whether it was drafted.

    Returns:
        `text, token_ids, prompt_tokens, new_tokens, passes, seconds, tokens_per_second, tokens_per_pass,
        accepted_share, lossy, decoder, outputs, constraint, attention, note`; `passes` counts the target's forward
        passes, prefill included, and `accepted_share` is the share of the verified drafted tokens that were accepted
        (None without drafts). `lossy` is None if the output is the target's own, else `threshold`, `agreement` with the
        unaided target and `speed_up` in seconds over it, for which it is run too. `outputs`, of decoders with an
        attribute of that name, are its entries, each with its `text` and `token_ids`; None for others. With a
        constraint, `constraint` has the `checks` beyond masks and, of awrs, the `log_probability` that an output meets
        it; else it is None. `attention` has the shares of query-key pairs that were not computed, `prefill_sparsity`
        and `decode_sparsity`, and the final `cache_bytes`; None without sparse attention. `note` is the drafter's
        remark, such as the reason for drafting nothing.

    Raises:
        IntaglioError: an unknown decoder, sampling options for greedy, wrong settings, a prompt that leaves no
            room in the context, or a constraint that the output cannot meet.
    """
    settings = settings or {}
    given = check_options(decoder, temperature, top_k, top_p)
    check_drafting(decoder, settings, paint is not None)
    check_constraint(decoder, constraint is not None, samples, settings)
    ending: dict[str, Any] = {}
    if isinstance(prompt, tuple):
        check_prompt(checkpoint, "".join(prompt))
        ids, ending = infill_prompt(checkpoint, prompt, max_new_tokens=max_new_tokens)
    else:
        ids = encode(checkpoint, prompt, chat)
    checkpoint.check_ids(ids)
    room = checkpoint.context - ids.shape[1]
    if room < max_new_tokens:
        raise IntaglioError(
            f"a prompt of {ids.shape[1]} tokens leaves room for {room} new ones in the context of "
            f"{checkpoint.context}; max_new_tokens is {max_new_tokens}"
        )
    model: Any = checkpoint.model
    sampled = decoder == "sample" or bool(given)
    options: dict[str, Any] = {"do_sample": sampled, "max_new_tokens": max_new_tokens, "num_beams": 1}
    # The sampling options of the checkpoint's own generation config must not leak in.
    options |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | given if sampled else {
        "temperature": None, "top_k": None, "top_p": None
    }  # fmt: skip
    streamer = None if write is None or paint is not None else WritingStreamer(checkpoint.tokenizer, write)
    loop: Any = None
    if decoder in STOCK:
        options["streamer"] = streamer
    else:
        painter = None if paint is None else DraftPainter(checkpoint.tokenizer, paint)
        loop = make_decoder(decoder, check_settings(decoder, settings), checkpoint, streamer, painter)
        options["custom_generate"] = loop
    processor = None
    if constraint is not None:
        loop, processor = _constrain(constraint, checkpoint, ids.shape[1], options, loop, samples)
    options |= ending
    if not ending and model.generation_config.pad_token_id is None:
        options["pad_token_id"] = checkpoint.tokenizer.pad_token_id or checkpoint.tokenizer.eos_token_id or 0
    ids = ids.to(checkpoint.device)
    devices: list[int] | None = [] if ids.device.type == "cpu" else None
    with torch.random.fork_rng(devices), count_passes(model) as calls, _sparse(attention, model, options) as sparse:
        torch.manual_seed(seed)
        whole, seconds = _timed(model, ids, options)
        new = whole[0, ids.shape[1] :].tolist()
        statistics: Any = getattr(loop, "statistics", None)
        lossy = None
        if loop is not None and not getattr(loop, "lossless", True):
            torch.manual_seed(seed)
            unaided, took = _timed(model, ids, options | {"custom_generate": None})
            lossy = {
                "threshold": statistics.threshold,
                "agreement": statistics.agreement,
                "speed_up": (len(new) / seconds) / ((unaided.shape[1] - ids.shape[1]) / took),
            }
    met = None
    if processor is not None:
        check_output(processor, new)
        met = {"checks": processor.checks, "log_probability": None}
    elif constraint is not None:
        (population,) = loop.populations
        met = {"checks": population.checks, "log_probability": population.log_probability}
    passes = calls[0] if statistics is None else statistics.passes
    outputs = [
        {**asdict(output), **_as_text(row[: output.length], checkpoint)}
        for output, row in zip(getattr(loop, "outputs", ()), whole[:, ids.shape[1] :].tolist(), strict=False)
    ]
    count = sum(output["length"] for output in outputs) if outputs else len(new)
    return {
        **_as_text(outputs[0]["token_ids"] if outputs else new, checkpoint),
        "prompt_tokens": ids.shape[1],
        "new_tokens": count,
        "passes": passes,
        "seconds": seconds,
        "tokens_per_second": count / seconds,
        "tokens_per_pass": count / passes,
        "accepted_share": None if statistics is None else statistics.accepted_share,
        "lossy": lossy,
        "decoder": decoder,
        "outputs": outputs or None,
        "constraint": met,
        "attention": sparse,
        "note": "" if statistics is None else statistics.note,
    }


@contextmanager
def _sparse(attention: SparseFrontier | None, model: Any, options: dict[str, Any]) -> Iterator[dict[str, float] | None]:
    """Install sparse attention and set the cache in the options; the yielded report is filled afterwards."""
    if attention is None:
        yield None
        return
    report: dict[str, float] = {}
    with attention.attached(model) as sparse:
        cache = options[CACHE] = sparse.new_cache(anatomy(model).config)
        yield report
    report |= {
        "prefill_sparsity": sparse.meter.prefill_sparsity,
        "decode_sparsity": sparse.meter.decode_sparsity,
        "cache_bytes": cache_bytes(cache),
    }


def cost_line(result: Mapping[str, Any]) -> str:
    """Return the cost of a result of `generate` in a line."""
    line = (
        f"{result['new_tokens']} tokens in {result['passes']} passes, {result['seconds']:.1f} s "
        f"({result['tokens_per_second']:.1f} tokens/s, {result['decoder']})"
    )
    per_pass, lossy, met = f": {result['tokens_per_pass']:.2f} tokens a pass", result["lossy"], result["constraint"]
    if lossy is not None:
        line += (
            f"{per_pass}; not lossless: at threshold {lossy['threshold']:g} {lossy['agreement']:.1%} agreement with "
            f"the unaided model, {lossy['speed_up']:.2f} times its speed"
        )
    elif result["accepted_share"] is not None:
        line += f"{per_pass}, {result['accepted_share']:.0%} of the drafts accepted"
    if met is not None and met["log_probability"] is not None:
        line += f"; {met['checks']} checks beyond masks; log-probability of the constraint {met['log_probability']:.2f}"
    if result["attention"] is not None:
        line += (
            "; {prefill_sparsity:.0%} of the prompt's pairs and {decode_sparsity:.0%} of the new tokens' left out, "
            "cache of {cache_bytes:,} bytes"
        ).format(**result["attention"])
    return f"{line}; {result['note']}" if result["note"] else line


def output_lines(result: Mapping[str, Any]) -> list[str]:
    """Return the outputs of a result, each below a line with its numbers; nothing for a single plain text."""
    lines = []
    for number, output in enumerate(result["outputs"] or (), 1):
        labels = ", ".join(
            f"{name.replace('_', ' ')} {value:{'.2f' if isinstance(value, float) else 'd'}}"
            for name, value in output.items()
            if isinstance(value, int | float)
        )
        lines += [f"--- {number}: {labels}", output["text"]]
    return lines


def _as_text(token_ids: list[int], checkpoint: Checkpoint) -> dict[str, Any]:
    return {"text": checkpoint.tokenizer.decode(token_ids, skip_special_tokens=True), "token_ids": token_ids}


def _constrain(
    constraint: Constraint, checkpoint: Checkpoint, prompt_length: int, options: dict[str, Any], loop: Any, samples: Any
) -> tuple[Any, ConstraintProcessor | None]:
    """Set the options of a constrained `generate` call; return the decoder and the processor, if it uses one."""
    model: Any = checkpoint.model
    stops = model.generation_config.eos_token_id
    stops = [stops] if isinstance(stops, int) else list(stops or [])
    if not stops and checkpoint.tokenizer.eos_token_id is not None:
        stops = options["eos_token_id"] = [checkpoint.tokenizer.eos_token_id]
    vocabulary = Vocabulary.from_tokenizer(checkpoint.tokenizer, checkpoint.vocabulary, stops)
    if isinstance(loop, SamplesConstrained):
        loop = options["custom_generate"] = loop.constrained(constraint, vocabulary, samples)
        return loop, None
    if loop is not None and not getattr(loop, "lossless", True):
        raise IntaglioError(f"{loop.slug} accepts drafts by its own rule, which a constraint cannot follow")
    processor = ConstraintProcessor(constraint, vocabulary, prompt_length, greedy=not options["do_sample"])
    options["logits_processor"] = LogitsProcessorList([processor])
    return loop, processor


class DraftPainter:
    """An `on_step` callback that passes text on token by token, with whether each piece was drafted.

    Args:
        tokenizer: of the target.
        paint: called with a piece of text and whether its tokens were drafted and accepted.
    """

    def __init__(self, tokenizer: Any, paint: Callable[[str, bool], None]) -> None:
        self._tokenizer = tokenizer
        self._paint = paint
        self._ids: list[int] = []  # since the last line end
        self._shown = 0

    def __call__(self, step: Step) -> None:
        """Show the tokens of a pass over a single row."""
        for index, token in enumerate(step.tokens):
            self._ids.append(token)
            text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
            # Half a character waits for its other half, unless it is the end.
            last = step.done and index == len(step.tokens) - 1
            if len(text) > self._shown and (last or not text.endswith("\ufffd")):
                self._paint(text[self._shown :], index < step.drafted)
                self._shown = len(text)
                if text.endswith("\n"):
                    self._ids, self._shown = [], 0


def _timed(model: Any, ids: torch.Tensor, options: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Return prompt and new tokens [1, L], and the seconds they took."""
    start = time.perf_counter()
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return whole, time.perf_counter() - start
