"""The demo: a real 135M-parameter model pruned four ways, at 50 % and at 2:4, and made input-sparse by R-Sparse."""

from __future__ import annotations

import os
import time
from typing import Any

from intaglio import atomic_io, report
from intaglio.checkpoint import load
from intaglio.cli.demo_output import demo_directory
from intaglio.methods.base import Method, Progress, no_progress
from intaglio.recipe.data import Data, make_evaluator, prepare_data, read_texts
from intaglio.recipe.report_document import environment, non_default_fields
from intaglio.recipe.schema import Recipe, method_of
from intaglio.recipe.steps import apply_step

MODEL = "smollm2"
AMOUNTS: tuple[tuple[str, dict[str, Any]], ...] = (("50 %", {"sparsity": 0.5}), ("2:4", {"pattern": "2:4"}))
METHODS = (
    ("Magnitude", "magnitude"),
    ("Wanda", "wanda"),
    ("Wanda + DSnoT", "dsnot"),
    ("SparseGPT", "sparsegpt"),
)
VARIANTS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    *((name, amount, slug, fields) for amount, fields in AMOUNTS for name, slug in METHODS),
    ("R-Sparse", "50 % read", "r_sparse", {"sparsity": 0.5}),
)
"""Name, amount, method and its fields."""


def recipe(seed: int = 0) -> Recipe:
    """Return the demo's variants as steps, with their shared data."""
    return Recipe.from_dict(
        {
            "model": MODEL,
            "seed": seed,
            "calibration": {"texts": "wikipedia", "samples": 16, "length": 256, "batch_size": 8},
            "measure": {"texts": "wikipedia", "samples": 8, "length": 256, "batch_size": 8},
            "steps": [{slug: fields} for _, _, slug, fields in VARIANTS],
        },
        "the demo",
    )


def demo(
    output: str | os.PathLike[str],
    *,
    device: str | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Carve the bundled model nine ways, each from the dense weights, and evaluate all on held-out English text.

    Returns:
        The content of `report.json`: `{dense: side, variants: [side + name, slug, amount, parameters, seconds], best,
        notes}`.
    """
    with demo_directory(output) as temporary:
        document = _document(device, seed, progress)
        (temporary / "report.json").write_text(atomic_io.to_json(document), encoding="utf-8")
        (temporary / "report.html").write_text(report.demo_page(document), encoding="utf-8")
    return document


def _document(device: str | None, seed: int, progress: Progress) -> dict[str, Any]:
    """Return the measurements of the dense model and of all variants."""
    started = time.time()
    shared = recipe(seed)
    checkpoint = load(MODEL, device=device)
    data = prepare_data(shared, checkpoint, read_texts(shared))
    evaluator = make_evaluator(checkpoint, data.held_out, shared.measure, repeats=1)
    dense = evaluator.measure(checkpoint)
    about = environment(checkpoint, shared.measure, data.held_out)
    variants = []
    for index, ((name, amount, *_), step) in enumerate(zip(VARIANTS, map(method_of, shared.steps), strict=True)):
        label = f"{name} {amount}"
        checkpoint = load(MODEL, device=device)
        seconds = _timed(step, checkpoint, shared, data, _labelled(progress, f"{index + 1}/{len(VARIANTS)} {label}"))
        variants.append(
            {
                **evaluator.measure(checkpoint),
                "name": f"{name}, {amount}",
                "slug": step.slug,
                "amount": amount,
                "parameters": step.model_dump(),
                "given": non_default_fields(step),
                "seconds": seconds,
            }
        )
    return {
        "format": report.FORMAT,
        "title": "SmolLM2-135M pruned four ways, and reading half of its weights",
        "model": MODEL,
        "dense": dense,
        "variants": variants,
        "best": _best(variants),
        **about,
        "seconds": time.time() - started,
        "notes": [
            "Calibration and held-out documents are disjoint, by hash.",
            "R-Sparse adds no zeros: each token reads a different part of the weights. Perplexity is with "
            "every token sparse.",
        ],
    }


def _labelled(progress: Progress, label: str) -> Progress:
    return lambda done, total, what: progress(done, total, f"{label}: {what.partition(': ')[2] or what}")


def _timed(step: Method, checkpoint: Any, shared: Recipe, data: Data, progress: Progress) -> float:
    start = time.time()
    apply_step(step, checkpoint, shared, data, progress)
    return time.time() - start


def _best(variants: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Return the best slugs of each amount with several variants, best first.

    Perplexities within `TIE` of the lowest tie: they differ by as much from one machine to another.
    """
    best: dict[str, list[str]] = {}
    for amount, _ in AMOUNTS:
        measured = [v for v in variants if v["amount"] == amount and v["perplexity"] is not None]
        measured.sort(key=lambda v: v["perplexity"])
        if measured:
            limit = (1 + report.TIE) * measured[0]["perplexity"]
            best[amount] = [v["slug"] for v in measured if v["perplexity"] <= limit]
    return best
