"""The training demo: small models trained in about a minute each, with curves and a sample output."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intaglio import atomic_io, report
from intaglio.cli.demo_infill import infilling
from intaglio.cli.demo_output import demo_directory
from intaglio.methods.base import Progress, no_progress
from intaglio.recipe.run import carve
from intaglio.recipe.schema import Recipe

STEPS = 240
"""Optimizer steps of the recommender: about a minute on two cores."""


@dataclass(frozen=True)
class Topic:
    """A run of the demo: the assets that it needs, and `run(output, device=, seed=, progress=)`.

    The run writes a checkpoint and returns its document and the section of the page, as `report.trained_page` takes it.
    """

    assets: tuple[str, ...]
    run: Callable[..., tuple[dict[str, Any], dict[str, Any]]]


def recommender(
    output: Path, *, device: str | None = None, seed: int = 0, progress: Progress = no_progress
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train SASRec on MovieLens-100K, with a full softmax as it learns fastest, and rank films for users."""
    recipe = Recipe.from_dict(
        {
            "seed": seed,
            "new": {"family": "gpt2", "width": 64, "depth": 2, "heads": 2, "context": 50, "tokenizer": "items"},
            "steps": [
                {
                    "train": {
                        "objective": {"sasrec": {"loss_type": "softmax"}},
                        "interactions": "movielens",
                        "steps": STEPS,
                        "batch_size": 64,
                        "learning_rate": 3e-3,
                        "warmup": 0.1,
                    }
                }
            ],
        },
        "the demo",
    )
    document = carve(recipe, output, device=device, progress=progress)
    return document, report.recommender_section(document, "A recommender: SASRec on MovieLens-100K")


TOPICS: dict[str, Topic] = {"recommender": Topic(("movielens",), recommender), "infilling": Topic((), infilling)}
"""The runs of the demo by name, in order."""


def demo(
    output: str | os.PathLike[str],
    *,
    device: str | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Run every topic; write a checkpoint for each, and one report.

    Returns:
        The content of `report.json`: `{topics: {name: document}, seconds}`.
    """
    started, documents, sections = time.time(), {}, []
    with demo_directory(output, *TOPICS) as temporary:
        for name, topic in TOPICS.items():
            documents[name], section = topic.run(temporary / name, device=device, seed=seed, progress=progress)
            sections.append(section)
        document = {"topics": documents, "seconds": time.time() - started}
        (temporary / "report.json").write_text(atomic_io.to_json(document), encoding="utf-8")
        summary = "Small models from random weights, each trained on one machine in about a minute."
        page = report.trained_page("Training in a minute", summary, sections)
        (temporary / "report.html").write_text(page, encoding="utf-8")
    return document
