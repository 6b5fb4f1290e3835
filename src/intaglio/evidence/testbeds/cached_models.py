"""Small models that test beds train once: cached on disk, resumed after a kill."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from intaglio.checkpoint import Checkpoint, load
from intaglio.environment import torch_threads, versions
from intaglio.errors import OtherRunError
from intaglio.evidence.testbeds.cache import cached, preparation
from intaglio.methods.base import Progress, no_progress
from intaglio.trainer import train

THREADS = 1
"""Torch threads of these trainings; the last bits of the weights depend on them."""
MOST_LOADED = 4
"""Models that a process keeps: runs work through one seed after the other."""

_loaded: dict[Path, Checkpoint] = {}


def pretraining_recipe(steps: int, batch_size: int, learning_rate: float, seed: int) -> dict[str, Any]:
    """Return the keyword arguments of `intaglio.trainer.train` that all small models are pretrained with."""
    return {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "final_share": 0.1,
        "betas": (0.9, 0.95),
        "weight_decay": 0.1,
        "seed": seed % 2**31,
    }


def trained_model(
    name: str,
    choices: Mapping[str, Any],
    new: Callable[[], Checkpoint],
    data: Callable[[], Any],
    recipe: Mapping[str, Any],
    progress: Progress = no_progress,
) -> Checkpoint:
    """Return a trained model, one shared object a process (copy it before changing it); train it unless it is cached.

    The key is `choices` (settings, seed, a digest of the data; JSON) and the plain values of `recipe`, arguments of
    `intaglio.trainer.train`.
    """
    packages = versions()
    key = {
        **choices,
        "recipe": {field: value for field, value in recipe.items() if isinstance(value, (int, float, str, tuple))},
        "threads": THREADS,
        "versions": {package: packages[package] for package in ("torch", "transformers", "numpy")},
    }

    def build(target: Path, scratch: Path) -> None:
        checkpoint, examples = new(), data()
        with torch_threads(THREADS), preparation():
            try:
                train(checkpoint, examples, directory=scratch, progress=progress, **recipe)
            except OtherRunError:  # a killed build of another version of the library
                shutil.rmtree(scratch)
                train(checkpoint, examples, directory=scratch, progress=progress, **recipe)
        checkpoint.write_files(target)

    path = cached(name, key, build)
    if path not in _loaded:
        if len(_loaded) == MOST_LOADED:
            del _loaded[next(iter(_loaded))]
        _loaded[path] = load(path)
    return _loaded[path]


def copied(checkpoint: Checkpoint) -> Checkpoint:
    """Return a copy of a shared checkpoint that may be changed, its vocabulary included."""
    return Checkpoint(copy.deepcopy(checkpoint.model), copy.deepcopy(checkpoint.tokenizer), checkpoint.source)
