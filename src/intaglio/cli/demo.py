"""The main job with nothing to configure: a real 135M-parameter model pruned four ways, at 50 % and at 2:4, and made to
read half of its weights a token (R-Sparse, without a search)."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from intaglio import atomic_io, report
from intaglio.checkpoint import load
from intaglio.methods.base import Method, Progress, no_progress
from intaglio.recipe.data import Data, make_evaluator, prepare_data, read_texts
from intaglio.recipe.report_document import environment, non_default_fields
from intaglio.recipe.schema import Recipe, method_of
from intaglio.recipe.steps import apply_step

MODEL = "smollm2"
AMOUNTS: tuple[tuple[str, dict[str, Any]], ...] = (("50 %", {"sparsity": 0.5}), ("2:4", {"pattern": "2:4"}))
WAYS = (
    ("Magnitude", "magnitude"),
    ("Wanda", "wanda"),
    ("Wanda + DSnoT", "dsnot"),
    ("SparseGPT", "sparsegpt"),
)
VARIANTS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    *((name, amount, slug, fields) for amount, fields in AMOUNTS for name, slug in WAYS),
    ("R-Sparse", "50 % read", "r_sparse", {"sparsity": 0.5}),
)
"""Name, amount, method and its fields."""


def recipe(seed: int = 0) -> Recipe:
    """The demo's variants as steps, with the data they share.

    Args:
        seed: chooses the calibration documents.
    """
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
    """Carve the bundled model nine ways, each from the dense weights, and measure all on held-out English text.

    Args:
        output: a directory for `report.html` and `report.json`; an earlier demo there is replaced.
        device: where to work. Default: the CPU.
        seed: chooses the calibration documents. Default 0.
        progress: called as work goes on.

    Returns:
        What `report.json` holds: `{dense: side, variants: [side + name, slug, amount, parameters, seconds], best,
        notes}`.

    Raises:
        IntaglioError: the bundled model or texts are not there, or the directory holds something else.
    """
    begun = time.time()
    output = Path(output)
    ours = output.is_dir() and {file.name for file in output.iterdir()} <= {"report.html", "report.json"}
    atomic_io.check_target(output, overwrite=ours)
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
    document = {
        "format": report.FORMAT,
        "title": "SmolLM2-135M pruned four ways, and made to read half of its weights",
        "model": MODEL,
        "dense": dense,
        "variants": variants,
        "best": _best(variants),
        **about,
        "seconds": time.time() - begun,
        "notes": [
            "No document that was calibrated on is among the held-out ones, by hash.",
            "R-Sparse leaves no zeros behind: each token reads other columns of the weights. Perplexity is with every "
            "token sparse.",
        ],
    }
    with atomic_io.directory(output, overwrite=ours) as temporary:
        (temporary / "report.json").write_text(atomic_io.to_json(document), encoding="utf-8")
        (temporary / "report.html").write_text(report.demo_page(document), encoding="utf-8")
    return document


def _labelled(progress: Progress, label: str) -> Progress:
    return lambda done, total, what: progress(done, total, f"{label}: {what.partition(': ')[2] or what}")


def _timed(step: Method, checkpoint: Any, shared: Recipe, data: Data, progress: Progress) -> float:
    start = time.time()
    apply_step(step, checkpoint, shared, data, progress)
    return time.time() - start


def _best(variants: list[dict[str, Any]]) -> dict[str, str]:
    """The slug with the lowest perplexity at each amount that several ways have."""
    found: dict[str, str] = {}
    for amount, _ in AMOUNTS:
        of_amount = [v for v in variants if v["amount"] == amount and v["perplexity"] is not None]
        if of_amount:
            found[amount] = min(of_amount, key=lambda v: v["perplexity"])["slug"]
    return found
