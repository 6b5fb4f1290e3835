"""Recipes of one training step on data of their own: run it, resume it, write the result."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from intaglio.checkpoint import Checkpoint, load, stat_fingerprint
from intaglio.environment import torch_threads, versions
from intaglio.recipe.resume import (
    TRAINING,
    check_output,
    finished_report,
    publish,
    save_step,
    scratch_directory,
    start_or_resume,
    write_state,
)
from intaglio.recipe.source import RunSpec


@dataclass(frozen=True)
class SingleStep:
    """The parts of such a run.

    Args:
        data: digest of its data.
        start: returns the checkpoint before training.
        train: trains it; takes the directory of the run's state.
        document: returns the content of the report, without recipe, digest and seconds.
        page: renders it.
    """

    data: str
    start: Callable[[], Checkpoint]
    train: Callable[[Checkpoint, Path], Any]
    document: Callable[[Checkpoint], dict[str, Any]]
    page: Callable[[dict[str, Any]], str]


def run_single_step(spec: RunSpec, out: Path, step: SingleStep, *, resume: bool, overwrite: bool) -> dict[str, Any]:
    """Run the step, and write checkpoint and report; return the report.

    Raises:
        IntaglioError: `out` exists, or holds another run.
    """
    begun, recipe = time.time(), spec.recipe
    stamp = "" if spec.from_scratch else stat_fingerprint(spec.source_name)
    digest = recipe.digest(json.dumps([*spec.identity(), stamp, step.data, versions()]))
    if resume and (finished := finished_report(out, digest)) is not None:
        return finished
    check_output(out, overwrite)
    with scratch_directory(out) as scratch:
        done, threads = start_or_resume(scratch, out, digest, 1, resume, overwrite)
        with torch_threads(threads):
            checkpoint = step.start()
            if done:
                checkpoint = load(scratch / "step-1", device=spec.device, dtype=spec.dtype)
            else:
                write_state(scratch, 0, digest)
                step.train(checkpoint, scratch / f"{TRAINING}-0")
                checkpoint.model.eval()
                save_step(checkpoint, scratch, 1, digest)
            document = step.document(checkpoint) | {
                "recipe": yaml.safe_dump(recipe.dump(), sort_keys=False, allow_unicode=True),
                "digest": digest,
                "seconds": time.time() - begun,
            }
        publish(out, scratch / "step-1", document, overwrite, step.page)
        shutil.rmtree(scratch, ignore_errors=True)
    return document
