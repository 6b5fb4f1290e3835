"""The study of a model: which sparse attention survives which task, at which sparsity.

For each task, length and condition, the same samples are answered under dense attention and under each method at each
sparsity. Forced tokens and estimation windows scale with the length, by n / 8,192; budgets of patterns that depend on
the input are chosen on the first prompt of a length. With the question after the context the context alone is the
prompt: caches are compressed before the question is known, and its tokens are decoded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from random import Random as PythonRandom
from typing import Any

import torch
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError, did_you_mean
from intaglio.measures.long_context import CONDITIONS, Condition, TaskSample
from intaglio.measures.sparsity_tradeoff import (
    StudyCell,
    decode_flops,
    equal_flops,
    fit_scaling_law,
    paired_bootstrap,
    prefill_flops,
    tolerated_sparsity,
)
from intaglio.methods.attention.sparse_frontier import SparseFrontier
from intaglio.methods.attention.sparse_frontier.cache import (
    AdaSnapKV,
    CachePolicy,
    OraclePolicy,
    Quest,
    RandomPolicy,
    SinkWindowPolicy,
    SnapKV,
)
from intaglio.methods.attention.sparse_frontier.prefill import BlockSparse, FlexPrefill, Prefill, VerticalSlash
from intaglio.methods.attention.sparse_frontier.tiled_attention import Meter
from intaglio.methods.base import Progress, no_progress
from intaglio.modeling.anatomy import CACHE, anatomy
from intaglio.report.sparsity_curves import Panel, Series

PREFILL = ("vertical_slash", "block_sparse", "flex_prefill")
DECODE = ("quest", "snapkv", "ada_snapkv", "sink_window", "random", "oracle")
METHODS = (*PREFILL, *DECODE)
ADAPTED = ("vertical_slash", "flex_prefill")
"""Methods whose sparsity depends on the input."""
BISECTIONS = 6
SPARSITIES = (0.5, 0.8, 0.9, 0.95)
REFERENCE = 8192
"""Context to which the published numbers of forced tokens belong."""
ANSWER = 48
"""Most new tokens of an answer without, and four times as many with, an explanation."""


def scaled(count: int, length: int, least: int) -> int:
    """Return a published number of tokens for a context of another length."""
    return max(least, min(count, round(count * length / REFERENCE)))


def at_sparsity(name: str, length: int, sparsity: float) -> SparseFrontier:
    """Return the method whose budget aims at a sparsity for a context of `length` tokens.

    What is computed is measured: forced tokens, whole pages and tiles make it differ.
    """
    if name not in METHODS:
        raise IntaglioError(f"there is no method named {name!r}; {did_you_mean(name, METHODS)}")
    if not 0 < sparsity < 1:
        raise IntaglioError(f"a sparsity of {sparsity:g} was given; above 0 and below 1 is accepted")
    sinks, recent = scaled(4, length, 1), scaled(64, length, 4)
    budget = max(1, round((1 - sparsity) * length))
    tile = scaled(64, length, 8)
    prefill: Prefill | None = None
    cache: CachePolicy | None = None
    if name == "vertical_slash":
        # Columns and offsets of a share p each leave (1 - p)^2 of the pairs.
        count = max(round(length * (1 - math.sqrt(sparsity))), recent, sinks)
        window = scaled(256, length, 8)
        prefill = VerticalSlash(
            columns=count, offsets=count, sinks=sinks, recent=recent, block_size=tile, num_queries=window
        )
    elif name == "block_sparse":
        prefill = BlockSparse.at_sparsity(length, sparsity, scaled(16, length, 4))
    elif name == "flex_prefill":
        prefill = FlexPrefill(
            coverage=1 - sparsity,
            min_budget=max(recent, sinks),
            sinks=sinks,
            recent=recent,
            block_size=tile,
            num_queries=scaled(512, length, 8),
        )
    elif name == "quest":
        size = scaled(16, length, 4)
        cache = Quest(budget=max(budget // size, 1) * size, page_size=size)
    elif name in ("snapkv", "ada_snapkv"):
        kept = scaled(128, length, 4)
        kind = SnapKV if name == "snapkv" else AdaSnapKV
        kernel = scaled(21, length, 3) // 2 * 2 + 1
        cache = kind(
            budget=max(budget, sinks + kept),
            sinks=sinks,
            recent=kept,
            num_queries=scaled(256, length, 8),
            kernel_size=kernel,
        )
    elif name == "sink_window":
        cache = SinkWindowPolicy(budget=max(budget, sinks + 1), sinks=sinks)
    else:
        cache = RandomPolicy(budget=budget) if name == "random" else OraclePolicy(budget=budget)
    return SparseFrontier(prefill=prefill, cache=cache)


@torch.no_grad()
def calibrated(checkpoint: Checkpoint, ids: Tensor, name: str, sparsity: float) -> float:
    """Return the nominal sparsity for `at_sparsity` at which a prompt [1, L] is computed at a sparsity.

    Tiles of slashes, and a coverage, compute another share of the pairs than their numbers say, so a bisection measures
    passes over the prompt. For the other methods the nominal sparsity is kept.
    """
    if name not in ADAPTED:
        return sparsity
    low, high, best = 0.0, 1.0, (1.0, sparsity)
    for _ in range(BISECTIONS):
        nominal = (low + high) / 2
        with at_sparsity(name, ids.shape[1], nominal).attached(checkpoint.model) as sparse:
            anatomy(checkpoint.model).base(ids.to(checkpoint.device), use_cache=False)
        measured = sparse.meter.prefill_sparsity
        best = min(best, (abs(measured - sparsity), nominal))
        low, high = (nominal, high) if measured < sparsity else (low, nominal)
    return best[1]


@dataclass(frozen=True)
class StudySizes:
    """Sizes of a study.

    Args:
        lengths: tokens of the prompts.
        methods: names from `METHODS`. Default: all.
        sparsities: targets beside dense attention. Default 0.5, 0.8, 0.9, 0.95.
        conditions: where the question stands. Default: both.
        samples: of a task, length and condition. Default 20.
        explain: ask for an explanation before the answer. Default False; the paper does.
        seed: of the samples. Default 0.
    """

    lengths: tuple[int, ...]
    methods: tuple[str, ...] = METHODS
    sparsities: tuple[float, ...] = SPARSITIES
    conditions: tuple[Condition, ...] = CONDITIONS
    samples: int = 20
    explain: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.methods:
            for sparsity in self.sparsities:
                at_sparsity(name, min(self.lengths, default=1), sparsity)
        if not self.lengths or min(self.lengths) < 1 or self.samples < 2:
            raise IntaglioError(
                f"{self.samples} samples of lengths {self.lengths} were given; a length and 2 are needed"
            )


def encoded(checkpoint: Checkpoint, sample: TaskSample, condition: Condition, explain: bool) -> tuple[Tensor, Tensor]:
    """Return the token ids [1, L] up to the end of the context and from the question on."""
    tokenizer = checkpoint.tokenizer
    context, question = sample.parts(condition, explain)
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": context + question}]
        whole = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        at = whole.rindex(question.strip())
        context, question = whole[:at], whole[at:]
        special = {"add_special_tokens": False}
    else:
        special = {}
    first = tokenizer(context, return_tensors="pt", verbose=False, **special)["input_ids"]
    second = tokenizer(question, return_tensors="pt", add_special_tokens=False, verbose=False)["input_ids"]
    return first, second


@dataclass(frozen=True)
class Answer:
    """An answer's text, the counts of its pairs and its tokens."""

    text: str
    meter: Meter
    prompt_tokens: int
    new_tokens: int


@contextmanager
def _installed(model: Any, method: SparseFrontier | None) -> Iterator[Any]:
    if method is None:
        yield None
    else:
        with method.attached(model) as sparse:
            yield sparse


@torch.no_grad()
def answer(
    checkpoint: Checkpoint, first: Tensor, second: Tensor, method: SparseFrontier | None, condition: Condition, new: int
) -> Answer:
    """Answer greedily; with the question after the context, the context alone is the prompt of the method."""
    model: Any = checkpoint.model
    ids = torch.cat([first, second], 1).to(checkpoint.device)
    tokenizer = checkpoint.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": new, "pad_token_id": pad}
    options |= {"temperature": None, "top_k": None, "top_p": None}
    with _installed(model, method) as sparse:
        if sparse is not None:
            options[CACHE] = sparse.new_cache(anatomy(model).config)
            if condition == "after":
                anatomy(model).base(ids[:, : first.shape[1]], **{CACHE: options[CACHE]}, use_cache=True)
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    text = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    return Answer(text, Meter() if sparse is None else sparse.meter, ids.shape[1], whole.shape[1] - ids.shape[1])


def run(
    checkpoint: Checkpoint, tasks: Sequence[Any], design: StudySizes, name: str = "", progress: Progress = no_progress
) -> list[StudyCell]:
    """Return the cells of a study, dense attention first in each task, condition and length.

    Args:
        checkpoint: a decoder with a tokenizer.
        tasks: generators, see `intaglio.measures.long_context`.
        design: sizes.
        name: of the model. Default: the checkpoint's source.
        progress: called after each cell.

    Raises:
        IntaglioError: a length beyond the model's context, a task that does not fit a length, or a method that does not
            fit the model.
    """
    new = ANSWER * (4 if design.explain else 1)
    if max(design.lengths) + new > checkpoint.context:
        raise IntaglioError(
            f"a length of {max(design.lengths)} with {new} new tokens is beyond the model's context of "
            f"{checkpoint.context}; give shorter lengths"
        )
    for chosen in design.methods:
        at_sparsity(chosen, min(design.lengths), design.sparsities[0]).plan(anatomy(checkpoint.model))
    cells = [(t, c, n) for t in tasks for c in design.conditions for n in design.lengths]
    drawn = [[_sample(checkpoint, *cell, design, i) for i in range(design.samples)] for cell in cells]
    arms = [(None, 0.0), *((m, s) for m in design.methods for s in design.sparsities)]
    points: list[StudyCell] = []
    nominal: dict[tuple[str, float, int, Condition], float] = {}
    done = 0
    for (task, condition, length), samples in zip(cells, drawn, strict=True):
        dense: StudyCell | None = None
        for method, sparsity in arms:
            key = (method or "", sparsity, length, condition)
            if method is not None and key not in nominal:
                _, first, second = samples[0]
                ids = first if condition == "after" else torch.cat([first, second], 1)
                nominal[key] = calibrated(checkpoint, ids, method, sparsity)
            aim = (sparsity, nominal.get(key, 0.0))
            point = _cell(checkpoint, task, condition, length, method, aim, samples, new, name)
            if dense is None:
                dense = point
            else:
                point = replace(point, difference=paired_bootstrap(dense.scores, point.scores, design.seed))
            points.append(point)
            done += 1
            progress(done, len(cells) * len(arms), f"cells: {task.name}, {length:,}, {method or 'dense'}")
    return points


def _sample(
    checkpoint: Checkpoint, task: Any, condition: Condition, length: int, design: StudySizes, index: int
) -> tuple[TaskSample, Tensor, Tensor]:
    """Return a sample whose prompt has at most `length` tokens, and its two parts."""

    def count(text: str) -> int:
        return len(checkpoint.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    room = length
    for _ in range(8):  # the frame's tokens are known only with the question
        rng = PythonRandom(f"{design.seed}:{task.name}:{condition}:{length}:{index}")
        sample = task.sample(rng, room, count)
        first, second = encoded(checkpoint, sample, condition, design.explain)
        over = first.shape[1] + second.shape[1] - length
        if over <= 0:
            return sample, first, second
        room -= over
        if room < 1:
            break
    raise IntaglioError(f"a prompt of {length} tokens is too short for {task.name}; give longer lengths")


def _cell(
    checkpoint: Checkpoint,
    task: Any,
    condition: Condition,
    length: int,
    method: str | None,
    aim: tuple[float, float],
    samples: Sequence[tuple[TaskSample, Tensor, Tensor]],
    new: int,
    name: str,
) -> StudyCell:
    """Return a cell; `aim` is the requested and the nominal sparsity."""
    sparsity, nominal = aim
    parts = anatomy(checkpoint.model)
    config = parts.config
    heads = int(config.num_attention_heads)
    width = heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    matrices = sum(math.prod(linear.shape) for _, linear in parts.all_linears(experts=True))
    scores, measured, flops = [], [], []
    phase = "prefill" if method in PREFILL else "decode"
    for sample, first, second in samples:
        prompt = first.shape[1] if condition == "after" else first.shape[1] + second.shape[1]
        sparse = None if method is None else at_sparsity(method, prompt, nominal)
        result = answer(checkpoint, first, second, sparse, condition, new)
        scores.append(sample.score(result.text))
        meter = result.meter
        measured.append(meter.prefill_sparsity if phase == "prefill" else meter.decode_sparsity)
        queries, estimated = _estimates(sparse, prompt)
        decoded = result.prompt_tokens - prompt + result.new_tokens
        flops.append(
            prefill_flops(matrices, len(parts.blocks), width, prompt, meter.prefill_sparsity, queries)
            + decoded * decode_flops(matrices, len(parts.blocks), width, prompt, meter.decode_sparsity, estimated)
        )
    parameters = sum(p.numel() for p in checkpoint.model.parameters())
    mean = sum(measured) / len(measured)
    cost = sum(flops) / len(flops)
    source = name or checkpoint.source
    return StudyCell(
        source, parameters, task.name, condition, length, method or "dense", phase, sparsity, mean, tuple(scores), cost
    )


def _estimates(method: SparseFrontier | None, prompt: int) -> tuple[int, float]:
    """Return the queries that score all keys once, and the keys' worth of scores that each decoded token takes."""
    if method is None:
        return 0, 0.0
    queries = getattr(method.prefill, "num_queries", 0) or getattr(method.cache, "num_queries", 0)
    if isinstance(method.prefill, BlockSparse):
        queries = prompt // (2 * method.prefill.block_size**2)  # half of all pairs of block means
    if isinstance(method.cache, Quest):
        return queries, 2 * prompt / method.cache.page_size
    return queries, float(prompt) if isinstance(method.cache, OraclePolicy) else 0.0


def sparsity_panels(points: Sequence[StudyCell]) -> list[Panel]:
    """Return a panel of accuracy by sparsity for each model, task, condition and length."""

    def cell(p: StudyCell) -> tuple[Any, ...]:
        return (p.model, p.task, p.condition, p.length)

    panels = []
    for dense in points:
        if dense.method == "dense":
            members = [p for p in points if cell(p) == cell(dense) and p.method != "dense"]
            subtitle = f"{dense.length:,} tokens, question {dense.condition} the context"
            series = _series(members, lambda p: p.sparsity)
            panels.append(Panel(f"{dense.task}, {dense.model}", subtitle, series, dense.accuracy))
    return panels


def operation_panels(points: Sequence[StudyCell], groups: Sequence[dict[str, Any]]) -> list[Panel]:
    """Return a panel of accuracy by operations for each task and condition; the best of each bin are encircled."""
    panels = []
    for group in groups:
        members = [p for p in points if (p.task, p.condition) == (group["task"], group["condition"])]
        best = tuple((row["best"]["flops"], row["best"]["accuracy"]) for row in group["bins"])
        subtitle = f"question {group['condition']} the context; circles: best of equal operations"
        panels.append(Panel(group["task"], subtitle, _series(members, lambda p: p.flops), best=best))
    return panels


def _series(points: Sequence[StudyCell], x: Callable[[StudyCell], float]) -> tuple[Series, ...]:
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for p in points:
        lines.setdefault((p.method, p.model), []).append((x(p), p.accuracy))
    return tuple(Series(method, model, tuple(line)) for (method, model), line in lines.items())


def summary(points: Sequence[StudyCell]) -> dict[str, Any]:
    """Return the analysis of a study: cells, tolerated sparsity, equal operations, scaling laws."""
    keys = ("model", "task", "condition", "length", "method")
    tolerated = [
        dict(zip(keys, key, strict=True)) | {"sparsity": value} for key, value in tolerated_sparsity(points).items()
    ]
    groups = sorted({(p.task, p.condition) for p in points})
    dense = [p for p in points if p.method == "dense"]
    laws = []
    for task, condition, method in sorted({(p.task, p.condition, p.method) for p in points if p.method != "dense"}):
        members = [p for p in points if (p.task, p.condition, p.method) == (task, condition, method)]
        law = fit_scaling_law([p for p in dense if (p.task, p.condition) == (task, condition)] + members)
        if law is not None:
            laws.append({"task": task, "condition": condition, "method": method, **asdict(law)})
    return {
        "cells": [asdict(point) | {"accuracy": point.accuracy} for point in points],
        "tolerated": tolerated,
        "equal_flops": [
            {"task": t, "condition": c, "bins": equal_flops([p for p in points if (p.task, p.condition) == (t, c)])}
            for t, c in groups
        ],
        "scaling_laws": laws,
    }
