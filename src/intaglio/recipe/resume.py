"""The scratch directory of a run: finished steps are kept there until the output appears, so a killed run resumes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from intaglio import atomic_io, report
from intaglio.checkpoint import RECORD, Checkpoint
from intaglio.errors import IntaglioError

STATE = "state.json"
TRAINING = "training"
TRIALS = "trial-*"
"""Directories left by a step that trains several times."""


def check_output(out: Path, overwrite: bool) -> None:
    """Refuse an output directory that is taken, before any work is done; see `writer.check_target`.

    Args:
        out: the directory to make.
        overwrite: whether an earlier result may be replaced; anything else may not.

    Raises:
        IntaglioError: it is taken, or cannot be written.
    """
    atomic_io.check_target(out, overwrite)
    if out.is_dir() and any(out.iterdir()) and not (out / RECORD).is_file():
        raise IntaglioError(f"{out} is not the result of a carve (it has no {RECORD}); name another directory")


def _scratch_path(out: Path) -> Path:
    return out.absolute().parent / f".{out.name}.carving"


def finished_report(out: Path, digest: str) -> dict[str, Any] | None:
    """Return the report of the same run if it has finished; remains of a run killed at its end are removed."""
    try:
        document: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
        if document["digest"] != digest:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    shutil.rmtree(_scratch_path(out), ignore_errors=True)
    return document


@contextmanager
def scratch_directory(out: Path) -> Iterator[Path]:
    """Yield the scratch directory next to `out`, locked against a second run; it is kept if there is work in it."""
    path = _scratch_path(out)
    with atomic_io.locked(path / "lock", f"another carve to {out} is running"):
        try:
            yield path
        finally:
            state = _read_state(path)
            begun = [*path.glob(f"{TRAINING}-*/checkpoint-*"), *path.glob(f"{TRAINING}-*/{TRIALS}")]
            if state is None or not (state["done"] or begun):
                shutil.rmtree(path, ignore_errors=True)


def _read_state(scratch: Path) -> dict[str, Any] | None:
    try:
        state = json.loads((scratch / STATE).read_text(encoding="utf-8"))
        return {"digest": str(state["digest"]), "done": int(state["done"]), "threads": int(state["threads"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def start_or_resume(
    scratch: Path, out: Path, digest: str, steps: int, resume: bool, overwrite: bool
) -> tuple[int, int | None]:
    """Return the number of finished steps and their thread count; refuse or clear the state of another run."""
    state = _read_state(scratch)
    if state is None:
        return 0, None
    if resume:
        if state["digest"] != digest:
            raise IntaglioError(
                f"the interrupted carve to {out} was of another recipe, model, text, device, dtype or version; "
                "run it without resume and with overwrite to start over"
            )
        return min(state["done"], steps), state["threads"]
    if not overwrite:
        raise IntaglioError(
            f"an interrupted carve to {out} has finished {state['done']} of {steps} steps; "
            "resume it, or overwrite it to start over"
        )
    shutil.rmtree(scratch / f"step-{state['done']}", ignore_errors=True)
    (scratch / STATE).unlink(missing_ok=True)
    return 0, None


def save_step(checkpoint: Checkpoint, scratch: Path, done: int, digest: str) -> None:
    """Save the checkpoint after a step; the state file names it only once it is complete."""
    checkpoint.save(scratch / f"step-{done}", overwrite=True)
    write_state(scratch, done, digest)
    shutil.rmtree(scratch / f"step-{done - 1}", ignore_errors=True)
    shutil.rmtree(scratch / f"{TRAINING}-{done - 1}", ignore_errors=True)


def write_state(scratch: Path, done: int, digest: str) -> None:
    """Write the number of finished steps."""
    atomic_io.write_json(scratch / STATE, {"digest": digest, "done": done, "threads": torch.get_num_threads()})


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def publish(
    out: Path,
    last: Path,
    document: dict[str, Any],
    overwrite: bool,
    page: Callable[[dict[str, Any]], str] = report.carve_page,
) -> None:
    """Make `out` from the directory of the last step and the report, atomically; `page` renders the report."""
    with atomic_io.directory(out, overwrite) as temporary:
        shutil.copytree(last, temporary, copy_function=_link_or_copy, dirs_exist_ok=True)
        (temporary / "report.json").write_text(atomic_io.to_json(document), encoding="utf-8")
        (temporary / "report.html").write_text(page(document), encoding="utf-8")
