"""What a carve would do and take, told from the configuration alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import psutil
import torch

from intaglio.checkpoint import load_config, load_tokenizer, parse_device, parse_dtype
from intaglio.data.texts import Corpus
from intaglio.measures.language_modeling import ELEMENTS
from intaglio.measures.speed import DECODE, PREFILL, REPEATS, WARM
from intaglio.methods.base import Carving, Cost, Fittable, RemovesBlocks, Workload
from intaglio.modeling.anatomy import Anatomy, anatomy
from intaglio.recipe.compatibility import check_history
from intaglio.recipe.data import read_texts
from intaglio.recipe.report_document import non_default_fields
from intaglio.recipe.schema import Fit, Measure, Recipe, Step, method_of
from intaglio.recipe.source import is_new, meta_model, name_of
from intaglio.recipe.steps import check_fit, retokenizes, trains

LAUNCH = 0.00025
"""Seconds that a block of one decoding step takes beside reading its weights."""
TIMED = 0.3
"""Seconds that each rate of the machine is timed for."""


def plan(
    recipe: Recipe, *, model: str | None = None, device: str | None = None, dtype: str | None = None
) -> dict[str, Any]:
    """What a carve would do and take, from the model's configuration alone: no weights are read.

    Args:
        recipe: what would be done.
        model: what would be carved; wins over the recipe's.
        device: where.
        dtype: of the weights. Default: the checkpoint's own.

    Returns:
        `{model, parameters, bytes, tokens, steps: [{slug, verb, parameters, given, seconds, memory_bytes}], left,
        measure_seconds, seconds, memory_bytes, libraries_bytes, gflops}`. `given` are the parameters that are not as
        by default, `left` those of the model behind the steps. Seconds come from work timed on this machine just now.
        Memory is the peak beside `libraries_bytes`, which the process holds already.

    Raises:
        IntaglioError: as `carve` would, as far as can be told without weights.
    """
    name = name_of(recipe, model)
    where, wanted = parse_device(device), parse_dtype(dtype)
    check_history(recipe, model)
    weightless = meta_model(recipe, model)
    kind = wanted if isinstance(wanted, torch.dtype) else (getattr(weightless.config, "dtype", None) or torch.float32)
    parts = anatomy(weightless)
    replaced = retokenizes(recipe.steps) and not is_new(recipe, model)
    check_fit(recipe.steps, parts, name, _tokenizer(name) if replaced else None)
    texts, _ = read_texts(recipe)
    length = min(recipe.calibration.length, int(getattr(parts.config, "max_position_embeddings", 1 << 30)))
    parameters = sum(p.numel() for p in weightless.parameters())
    element = torch.empty(0, dtype=kind).element_size()
    workload = Workload(
        linears=tuple(linear.shape for _, linear in parts.all_linears()),
        block_parameters=_in_blocks(parts),
        parameters=parameters,
        hidden=int(parts.config.hidden_size),
        tokens=recipe.calibration.samples * length,
        batch_tokens=recipe.calibration.batch_size * length,
        element_size=element,
        blocks=len(parts.blocks),
    )
    rates = machine_rates(where, kind)
    measure_seconds, held, measuring = _measuring(recipe.measure, workload, parts, rates)
    steps: list[dict[str, Any]] = []
    for step in recipe.steps:
        cost = _estimate(step, workload, texts)
        took = cost.flops / rates.flops + cost.sorted_elements / rates.elements
        memory = held + cost.extra_bytes
        method = method_of(step)
        told = {
            "slug": step.slug,
            "verb": _verb(step),
            "parameters": method.model_dump(),
            "given": non_default_fields(method),
        }
        steps.append({**told, "seconds": took, "memory_bytes": memory})
        if isinstance(step, RemovesBlocks):
            parts = step.anatomy_after(parts)
            workload = _shortened(workload, parts)
    return {
        "model": name,
        "parameters": parameters,
        "bytes": parameters * element,
        "tokens": workload.tokens,
        "steps": steps,
        "left": workload.parameters,
        "measure_seconds": measure_seconds,
        "seconds": measure_seconds + sum(step["seconds"] for step in steps),
        "memory_bytes": max([measuring, *(step["memory_bytes"] for step in steps)]),
        "libraries_bytes": psutil.Process().memory_info().rss,
        "gflops": rates.flops / 1e9,
    }


def _in_blocks(parts: Anatomy) -> int:
    return sum(p.numel() for block in parts.blocks for p in block.parameters())


def _shortened(workload: Workload, parts: Anatomy) -> Workload:
    """The sizes of a model with fewer blocks."""
    inside = _in_blocks(parts)
    return replace(
        workload,
        linears=tuple(linear.shape for _, linear in parts.all_linears()),
        block_parameters=inside,
        parameters=workload.parameters - workload.block_parameters + inside,
        blocks=len(parts.blocks),
    )


def _tokenizer(name: str) -> Any:
    source, _ = load_config(name)
    return load_tokenizer(name if "@" in name else source)


def _measuring(wanted: Measure, workload: Workload, parts: Anatomy, rates: Rates) -> tuple[float, int, int]:
    """Seconds of measuring before and after; bytes that are held all the time, and at the peak of measuring."""
    width, element = workload.hidden, workload.element_size
    length = min(wanted.length, int(getattr(parts.config, "max_position_embeddings", None) or wanted.length))
    tokens = wanted.samples * length
    held = workload.parameters * element
    peak = held
    # The blocks run for the reference, before and after.
    flops = 3 * 2.0 * workload.block_parameters * tokens
    if parts.causal:
        vocabulary = int(parts.config.vocab_size)
        flops += 4 * 2.0 * vocabulary * width * tokens  # the original's predictions and the model's own, twice
        held += (vocabulary + tokens) * width * element  # the head's copy and the original's hidden states
        # Logits of one segment; of a piece of it log-probabilities of both models and what their divergence takes.
        peak = held + 4 * vocabulary * (length + 6 * min(length, max(1, ELEMENTS // vocabulary)))
    seconds = flops / rates.flops
    if wanted.speed:
        passes = 2 * (REPEATS + 1)
        seconds += passes * 2.0 * workload.block_parameters * PREFILL / rates.flops
        if parts.causal:
            step = workload.parameters * element / rates.bytes + LAUNCH * len(parts.blocks)
            seconds += 2 * (REPEATS * DECODE + WARM) * step
    return seconds, held, peak


def _verb(step: Step) -> str:
    return "train" if trains(step) else "fit" if isinstance(step, Fit) else "carve"


def _estimate(step: Step, workload: Workload, texts: Corpus) -> Cost:
    if isinstance(step, Fit):
        return cast(Fittable, step.method).estimate_fit(workload, texts)
    return cast(Carving, step).estimate(workload)


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second.

    Args:
        flops: floating-point operations of a transformer's pass.
        elements: elements that pass through a selection.
        bytes: bytes of weights that a matrix-vector product reads.
    """

    flops: float
    elements: float
    bytes: float


def machine_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Time a matrix product, a selection and a matrix-vector product, each for a fraction of a second.

    Args:
        device: where.
        dtype: of the products.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 768, generator=generator).to(device, dtype)
    y = torch.randn(768, 768, generator=generator).to(device, dtype)
    score = torch.randn(256, 768, generator=generator).to(device)
    matrix = torch.ones(4096, 4096, dtype=dtype, device=device)  # beyond most caches
    vector = torch.ones(4096, dtype=dtype, device=device)

    def best(work: Callable[[], Any]) -> float:
        # The best of many: on a busy machine most of them are interrupted.
        found, begun = float("inf"), time.perf_counter()
        while time.perf_counter() - begun < TIMED:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            found = min(found, time.perf_counter() - start)
        return found

    # A transformer's pass reaches about half of what a lone product does.
    return Rates(
        flops=0.5 * 2 * 512 * 768 * 768 / best(lambda: x @ y),
        elements=score.numel() / best(lambda: score.kthvalue(384, dim=1)),
        bytes=matrix.numel() * matrix.element_size() / best(lambda: matrix @ vector),
    )
