"""Where a run keeps its finished steps until OUT can appear, so that a killed one goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
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
"""What a step that trains several times leaves in its directory."""


def check_output(out: Path, overwrite: bool) -> None:
    """Refuse an output directory that is taken, before any work is done; see `writer.check_target`.

    Args:
        out: the directory that is to be made.
        overwrite: whether an earlier result may be replaced. Anything else that stands there may not.

    Raises:
        IntaglioError: it is taken, or cannot be written.
    """
    atomic_io.check_target(out, overwrite)
    if out.is_dir() and any(out.iterdir()) and not (out / RECORD).is_file():
        raise IntaglioError(f"{out} holds something that is no result of a carve (no {RECORD}); name another directory")


def _scratch_path(out: Path) -> Path:
    return out.absolute().parent / f".{out.name}.carving"


def finished_report(out: Path, digest: str) -> dict[str, Any] | None:
    """The report of the very same run, if it has ended; what it left when it was killed at its end is swept."""
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
    """The directory beside OUT where finished steps wait, locked against a second run."""
    path = _scratch_path(out)
    with atomic_io.locked(path / "lock", f"another carve to {out} is running"):
        try:
            yield path
        finally:
            if not _worth_keeping(path):
                shutil.rmtree(path, ignore_errors=True)


def _worth_keeping(scratch: Path) -> bool:
    """Whether a step is finished, or training has saved its state."""
    state = _read_state(scratch)
    begun = (f"{TRAINING}-*/checkpoint-*", f"{TRAINING}-*/{TRIALS}")
    return state is not None and (state["done"] > 0 or any(path for how in begun for path in scratch.glob(how)))


def _read_state(scratch: Path) -> dict[str, Any] | None:
    try:
        state = json.loads((scratch / STATE).read_text(encoding="utf-8"))
        return {"digest": str(state["digest"]), "done": int(state["done"]), "threads": int(state["threads"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def start_or_resume(
    scratch: Path, out: Path, digest: str, steps: int, resume: bool, overwrite: bool
) -> tuple[int, int | None]:
    """How many steps are done already, and with how many threads; leftovers of no use are refused or cleared."""
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


def put_aside(checkpoint: Checkpoint, scratch: Path, done: int, digest: str) -> None:
    """Save the state after a step; the state file names it only when it is whole."""
    checkpoint.save(scratch / f"step-{done}", overwrite=True)
    note_done(scratch, done, digest)
    shutil.rmtree(scratch / f"step-{done - 1}", ignore_errors=True)
    shutil.rmtree(scratch / f"{TRAINING}-{done - 1}", ignore_errors=True)


def note_done(scratch: Path, done: int, digest: str) -> None:
    """Write how many steps are done."""
    atomic_io.write_json(scratch / STATE, {"digest": digest, "done": done, "threads": torch.get_num_threads()})


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def finish(out: Path, last: Path, document: dict[str, Any], overwrite: bool) -> None:
    """Let OUT appear: the last step's files, and the report.

    Args:
        out: the directory that is made.
        last: the directory of the last step.
        document: of the report.
        overwrite: whether an earlier result may be replaced.
    """
    with atomic_io.directory(out, overwrite) as temporary:
        shutil.copytree(last, temporary, copy_function=_link_or_copy, dirs_exist_ok=True)
        (temporary / "report.json").write_text(atomic_io.to_json(document), encoding="utf-8")
        (temporary / "report.html").write_text(report.carve_page(document), encoding="utf-8")
