"""Small models that test beds train once: cached on disk, resumed after a kill."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from intaglio.checkpoint import Checkpoint, load
from intaglio.environment import torch_threads, versions
from intaglio.evidence.testbeds.cache import cached
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


def train_once(
    name: str,
    choices: Mapping[str, Any],
    new: Callable[[], Checkpoint],
    data: Callable[[], Any],
    recipe: Mapping[str, Any],
    version: int = 1,
    progress: Progress = no_progress,
) -> Path:
    """Return the directory of a trained model; train it unless it is cached.

    Args:
        name: of the test bed.
        choices: settings, seed and a digest of the data; JSON.
        new: returns the untrained model.
        data: returns the training data.
        recipe: keyword arguments of `intaglio.trainer.train`; plain values among them are part of the key.
        version: raised when the same choices give another model. Default 1.
        progress: called after each training step.

    Raises:
        IntaglioError: the cache is not writable, or the training failed.
    """
    packages = versions()
    key = {
        **choices,
        "recipe": {field: value for field, value in recipe.items() if isinstance(value, (int, float, str, tuple))},
        "threads": THREADS,
        "versions": {package: packages[package] for package in ("torch", "transformers", "numpy")},
    }

    def build(target: Path, scratch: Path) -> None:
        checkpoint = new()
        with torch_threads(THREADS):
            train(checkpoint, data(), directory=scratch, progress=progress, **recipe)
        checkpoint.write_files(target)

    return cached(name, key, build, version)


def trained_model(
    name: str,
    choices: Mapping[str, Any],
    new: Callable[[], Checkpoint],
    data: Callable[[], Any],
    recipe: Mapping[str, Any],
    version: int = 1,
    progress: Progress = no_progress,
) -> Checkpoint:
    """Return the model of `train_once`, one shared object a process: copy it before changing it."""
    path = train_once(name, choices, new, data, recipe, version, progress)
    if path not in _loaded:
        if len(_loaded) == MOST_LOADED:
            del _loaded[next(iter(_loaded))]
        _loaded[path] = load(path)
    return _loaded[path]
