"""Dry run: what a carve would do, with its time and memory estimated from the configuration, without weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import psutil
import torch

from intaglio.checkpoint import load_config, load_tokenizer
from intaglio.data.texts import Corpus
from intaglio.measures.language_modeling import ELEMENTS
from intaglio.measures.speed import DECODE, PREFILL, REPEATS, WARM
from intaglio.methods.base import Carving, Cost, Fittable, RemovesBlocks, Workload
from intaglio.modeling.anatomy import Anatomy, anatomy
from intaglio.recipe.compatibility import check_history
from intaglio.recipe.counted_work import CountedWork, count_work
from intaglio.recipe.data import read_texts
from intaglio.recipe.report_document import non_default_fields
from intaglio.recipe.schema import Fit, Measure, Recipe, Step, method_of
from intaglio.recipe.source import RunSpec, meta_model
from intaglio.recipe.steps import check_data, check_fit, is_training, replaces_tokenizer

LAUNCH = 0.00025
"""Seconds of a block in a decoding step, beyond reading its weights."""
TIMED = 0.3
"""Seconds spent on timing each rate of the machine."""


def plan(
    recipe: Recipe,
    *,
    model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Estimate a carve from the model's configuration; no weights are read.

    Args:
        recipe: what would be done.
        model: source of the run; overrides the recipe's.
        device: where. Default: the CPU.
        dtype: of the weights. Default: the checkpoint's own.
        seed: overrides the recipe's.

    Returns:
        `{model, parameters, bytes, tokens, steps: [{slug, verb, parameters, given, seconds, memory_bytes}], left,
        measure_seconds, seconds, memory_bytes, libraries_bytes, gflops}`. `given` holds the non-default parameters,
        `left` the number of parameters after the steps. Seconds come from work timed on this machine just now. Memory
        is the peak beyond `libraries_bytes`, which the process holds already.

    Raises:
        IntaglioError: as `carve`, as far as the configuration shows it.
    """
    spec = RunSpec.from_args(recipe, model, device, dtype, seed)
    recipe, name = spec.recipe, spec.source_name
    counted = count_work(spec)
    if counted is not None:
        return _counted_plan(spec, counted)
    check_history(spec)
    weightless = meta_model(spec)
    kind = _dtype(spec, weightless)
    parts = anatomy(weightless)
    replaced = replaces_tokenizer(*recipe.steps) and not spec.from_scratch
    check_fit(recipe.steps, parts, name, _tokenizer(name) if replaced else None)
    check_data(recipe.steps)
    texts, _ = read_texts(recipe)
    length = min(recipe.calibration.length, int(getattr(parts.config, "max_position_embeddings", 1 << 30)))
    parameters = sum(p.numel() for p in weightless.parameters())
    element = torch.empty(0, dtype=kind).element_size()
    workload = Workload(
        linears=tuple(linear.shape for _, linear in parts.all_linears(experts=True)),
        block_parameters=_in_blocks(parts),
        parameters=parameters,
        hidden=int(parts.config.hidden_size),
        tokens=recipe.calibration.samples * length,
        batch_tokens=recipe.calibration.batch_size * length,
        element_size=element,
        blocks=len(parts.blocks),
    )
    rates = machine_rates(spec.device, kind)
    measure_seconds, held, measuring = _measuring(recipe.measure, workload, parts, rates)
    steps: list[dict[str, Any]] = []
    for step in recipe.steps:
        steps.append(_planned_step(step, _estimate(step, workload, texts), rates, held))
        if isinstance(step, RemovesBlocks):
            parts = step.anatomy_after(parts)
            workload = _shortened(workload, parts)
    whole = {"parameters": parameters, "bytes": parameters * element, "tokens": workload.tokens}
    return _planned(name, whole, workload.parameters, steps, (measure_seconds, measuring), rates)


def _counted_plan(spec: RunSpec, work: CountedWork) -> dict[str, Any]:
    """Return the plan of a recipe of one step on data of its own."""
    kind, parameters = _dtype(spec, work.model), sum(p.numel() for p in work.model.parameters())
    rates = machine_rates(spec.device, kind)
    held = parameters * torch.empty(0, dtype=kind).element_size()
    steps = [_planned_step(spec.recipe.steps[0], work.step, rates, held)]
    whole = {"parameters": parameters, "bytes": held, "tokens": 0}
    return _planned(spec.source_name, whole, parameters, steps, (work.measure_flops / rates.flops, held), rates)


def _dtype(spec: RunSpec, model: Any) -> torch.dtype:
    own: torch.dtype = getattr(model.config, "dtype", None) or torch.float32
    return spec.dtype if isinstance(spec.dtype, torch.dtype) else own


def _planned_step(step: Step, cost: Cost, rates: Rates, held: int) -> dict[str, Any]:
    method = method_of(step)
    return {
        "slug": step.slug,
        "verb": "train" if is_training(step) else "fit" if isinstance(step, Fit) else "carve",
        "parameters": method.model_dump(),
        "given": non_default_fields(method),
        "seconds": cost.flops / rates.flops + cost.sorted_elements / rates.elements,
        "memory_bytes": held + cost.extra_bytes,
    }


def _planned(
    name: str,
    whole: dict[str, int],
    left: int,
    steps: list[dict[str, Any]],
    measuring: tuple[float, int],
    rates: Rates,
) -> dict[str, Any]:
    measure_seconds, measure_bytes = measuring
    return {
        "model": name,
        **whole,
        "steps": steps,
        "left": left,
        "measure_seconds": measure_seconds,
        "seconds": measure_seconds + sum(step["seconds"] for step in steps),
        "memory_bytes": max([measure_bytes, *(step["memory_bytes"] for step in steps)]),
        "libraries_bytes": psutil.Process().memory_info().rss,
        "gflops": rates.flops / 1e9,
    }


def _in_blocks(parts: Anatomy) -> int:
    return sum(p.numel() for block in parts.blocks for p in block.parameters())


def _shortened(workload: Workload, parts: Anatomy) -> Workload:
    """Return the workload of a model with fewer blocks."""
    inside = _in_blocks(parts)
    return replace(
        workload,
        linears=tuple(linear.shape for _, linear in parts.all_linears(experts=True)),
        block_parameters=inside,
        parameters=workload.parameters - workload.block_parameters + inside,
        blocks=len(parts.blocks),
    )


def _tokenizer(name: str) -> Any:
    source, _ = load_config(name)
    return load_tokenizer(name if "@" in name else source)


def _measuring(measure: Measure, workload: Workload, parts: Anatomy, rates: Rates) -> tuple[float, int, int]:
    """Return seconds of both measurements, bytes held during the whole run, and peak bytes of a measurement."""
    width, element = workload.hidden, workload.element_size
    length = min(measure.length, int(getattr(parts.config, "max_position_embeddings", None) or measure.length))
    tokens = measure.samples * length
    held = workload.parameters * element
    peak = held
    # The blocks run for the reference, before and after.
    flops = 3 * 2.0 * workload.block_parameters * tokens
    if parts.causal:
        vocabulary = int(parts.config.vocab_size)
        flops += 4 * 2.0 * vocabulary * width * tokens  # the original's predictions and the model's own, twice
        held += (vocabulary + tokens) * width * element  # a copy of the head and the original's hidden states
        # Logits of a segment; for a part of it, log-probabilities of both models and the terms of their divergence.
        peak = held + 4 * vocabulary * (length + 6 * min(length, max(1, ELEMENTS // vocabulary)))
    seconds = flops / rates.flops
    if measure.speed:
        passes = 2 * (REPEATS + 1)
        seconds += passes * 2.0 * workload.block_parameters * PREFILL / rates.flops
        if parts.causal:
            step = workload.parameters * element / rates.bytes + LAUNCH * len(parts.blocks)
            seconds += 2 * (REPEATS * DECODE + WARM) * step
    return seconds, held, peak


def _estimate(step: Step, workload: Workload, texts: Corpus) -> Cost:
    if isinstance(step, Fit):
        return cast(Fittable, step.method).estimate_fit(workload, texts)
    return cast(Carving, step).estimate(workload)


@dataclass(frozen=True)
class Rates:
    """Throughput of a machine, per second.

    Args:
        flops: floating-point operations of a transformer's pass.
        elements: elements that pass through a selection.
        bytes: bytes of weights read by a matrix-vector product.
    """

    flops: float
    elements: float
    bytes: float


def machine_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Time a matrix product, a selection and a matrix-vector product, each for a fraction of a second."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 768, generator=generator).to(device, dtype)
    y = torch.randn(768, 768, generator=generator).to(device, dtype)
    score = torch.randn(256, 768, generator=generator).to(device)
    matrix = torch.ones(4096, 4096, dtype=dtype, device=device)  # beyond most caches
    vector = torch.ones(4096, dtype=dtype, device=device)

    def best(work: Callable[[], Any]) -> float:
        # The best of many repeats: on a busy machine most of them are interrupted.
        shortest, begun = float("inf"), time.perf_counter()
        while time.perf_counter() - begun < TIMED:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            shortest = min(shortest, time.perf_counter() - start)
        return shortest

    # A transformer's pass reaches about half the throughput of a single product.
    return Rates(
        flops=0.5 * 2 * 512 * 768 * 768 / best(lambda: x @ y),
        elements=score.numel() / best(lambda: score.kthvalue(384, dim=1)),
        bytes=matrix.numel() * matrix.element_size() / best(lambda: matrix @ vector),
    )
