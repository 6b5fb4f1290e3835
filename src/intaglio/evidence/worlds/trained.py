"""Small models that worlds train once: found again in the user's cache, resumed when they were killed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from intaglio.checkpoint import Checkpoint, load
from intaglio.environment import torch_threads, versions
from intaglio.evidence.worlds.made import code_of, made
from intaglio.methods.base import Progress, no_progress
from intaglio.trainer import train

THREADS = 2
"""That these models are trained with: part of what makes their last bits."""

_loaded: dict[Path, Checkpoint] = {}


def trained(
    name: str,
    choices: Mapping[str, Any],
    new: Callable[[], Checkpoint],
    data: Callable[[], Any],
    recipe: Mapping[str, Any],
    code: tuple[str, ...],
    progress: Progress = no_progress,
) -> Checkpoint:
    """The trained model of a world, one object a process.

    Args:
        name: of the world.
        choices: settings and a digest of the data: what decides the model beside code, versions and recipe; JSON.
        new: makes the model with random weights.
        data: makes what it is trained on.
        recipe: keyword arguments of `intaglio.trainer.train`; those that are not JSON are left out of the digest.
        code: modules of ours, beside the trainer, whose change makes it another model.
        progress: called after each step of a training.

    Raises:
        IntaglioError: the cache cannot be written, or the training failed.
    """
    found = versions()
    decided = {
        **choices,
        "recipe": {key: value for key, value in recipe.items() if isinstance(value, (int, float, str, tuple))},
        "threads": THREADS,
        "code": code_of("intaglio.checkpoint.from_scratch", "intaglio.trainer", *code),
        "versions": {package: found[package] for package in ("torch", "transformers", "numpy")},
    }

    def make(target: Path, scratch: Path) -> None:
        checkpoint = new()
        with torch_threads(THREADS):
            train(checkpoint, data(), directory=scratch, progress=progress, **recipe)
        checkpoint.write_files(target)

    place = made(name, decided, make)
    if place not in _loaded:
        _loaded.clear()  # one at a time: a run asks for one seed after the other
        _loaded[place] = load(place)
    return _loaded[place]
