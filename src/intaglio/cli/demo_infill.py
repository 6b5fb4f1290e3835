"""The infilling half of the training demo: a small model that learns to fill holes in Python."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

from intaglio.methods.base import Progress, no_progress
from intaglio.recipe.run import carve
from intaglio.recipe.schema import Recipe

PACKAGE = "asyncio"
"""Package of the standard library that the model reads, about 600 kB."""
STEPS = 300
"""Optimizer steps: about a minute on two cores."""
COLUMNS = ("prompt", "expected", "before", "after")


def infilling(
    output: Path, *, device: str | None = None, seed: int = 0, progress: Progress = no_progress
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train a small Llama on Python with CodeGen2, and fill the middle line of held-out files.

    Returns:
        The report of the run and its section of the demo's page: `title`, `summary`, `curve`, `tables`, `notes`.
    """
    texts = str(Path(sysconfig.get_path("stdlib")) / PACKAGE)
    training = {
        "objective": {"codegen2": {"length": 192, "sentinels": 8}},
        "steps": STEPS,
        "batch_size": 8,
        "learning_rate": 3e-3,
        "warmup": 0.1,
        "evaluate": 0.1,
    }
    recipe = Recipe.from_dict(
        {
            "seed": seed,
            "new": {"family": "llama", "width": 128, "depth": 3, "context": 192, "tokenizer": "texts", "vocab": 2048},
            "calibration": {"texts": texts, "samples": 8, "length": 64},
            "measure": {"texts": texts, "samples": 8, "length": 128, "speed": False},
            "steps": [{"train": training}],
        },
        "the demo",
    )
    document = carve(recipe, output, device=device, progress=progress)
    step = document["steps"][-1]
    section = {
        "title": "Filling holes: CodeGen2 on Python's standard library",
        "summary": "Half of the documents have spans moved to their end; the model fills the middle line of files that"
        " it has not read. A minute teaches the format and the look of a line, not more.",
        "curve": step["curve"],
        "tables": [
            {
                "title": "Held-out lines, before and after",
                "headings": [name.capitalize() for name in COLUMNS],
                "rows": [[row[name] for name in COLUMNS] for row in step["samples"]["rows"]],
            }
        ],
        "notes": step["given"],
    }
    return document, section
