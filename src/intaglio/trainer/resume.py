"""Directory of a resumable run: the identity of the run, and its complete checkpoints.

A checkpoint is the directory `checkpoint-STEP` of `transformers.Trainer` with one more file, `loop.json`, written last
and atomically: without it the checkpoint is ignored, however a process died. The pickles in there are Trainer's own,
read with `weights_only`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from intaglio import atomic_io
from intaglio.errors import IntaglioError, OtherRunError

RUN = "run.json"
STATE = "loop.json"
TENSOR = "tensor:"
"""The key that stands for a tensor in a state."""

KEEP = 2
"""Number of checkpoints on the disk, in case one is lost."""


def model_digest(model: nn.Module) -> str:
    """Return the SHA-256 over the names and bytes of a model's tensors."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name}:{tensor.dtype}:{list(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def describe(part: Any) -> Any:
    """Return an objective, modifier or selector as plain data for the record and for a run's identity."""
    name = getattr(part, "slug", type(part).__name__)
    if isinstance(part, BaseModel):
        return {name: part.model_dump(mode="json")}
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        return {name: {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}}
    return {name: {}}


def plain(value: Any) -> Any:
    """Return data after a round trip through JSON (tuples become lists)."""
    return json.loads(json.dumps(value, sort_keys=True, default=repr))


def steps_saved(directory: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a directory, in order."""
    steps = (path.parent.name.removeprefix("checkpoint-") for path in directory.glob(f"checkpoint-*/{STATE}"))
    return sorted(int(step) for step in steps if step.isdigit())


def checkpoint_path(directory: Path, step: int) -> Path:
    """Return the path of a step's checkpoint."""
    return directory / f"checkpoint-{step}"


def read_state(path: Path) -> dict[str, Any]:
    """Return the loop's state in a complete checkpoint."""
    return _read(path / STATE)


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IntaglioError(f"{file} is damaged ({error}); name another directory or pass resume=False") from None
    if not isinstance(value, dict):
        raise IntaglioError(f"{file} was not written by this loop; name another directory or pass resume=False")
    return value


def split(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return a state for JSON, its tensors moved into `tensors` and replaced by their numbers; `join` undoes it."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {TENSOR: name}
    if isinstance(value, Mapping):
        return {str(key): split(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [split(item, tensors) for item in value]
    return value


def join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Restore a state from `split`; tuples come back as lists."""
    if isinstance(value, dict):
        return tensors[value[TENSOR]] if TENSOR in value else {key: join(item, tensors) for key, item in value.items()}
    return [join(item, tensors) for item in value] if isinstance(value, list) else value


def finish(directory: Path, step: int, state: dict[str, Any]) -> None:
    """Mark a checkpoint as complete, and remove old ones."""
    path = checkpoint_path(directory, step)
    atomic_io.fsync_tree(path)
    atomic_io.write_json(path / STATE, state)
    atomic_io.fsync_path(directory)
    clean(directory, steps_saved(directory)[-KEEP:])


def clean(directory: Path, kept: list[int]) -> None:
    """Remove all checkpoints of a run but those of the given steps."""
    for path in directory.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdigit() and int(step) not in kept:
            (path / STATE).unlink(missing_ok=True)  # first: an incomplete checkpoint must not count
            shutil.rmtree(path, ignore_errors=True)


def start(directory: Path, identity: dict[str, Any], *, resume: bool) -> int:
    """Claim a directory for a run, and return the step to resume from (0: the start).

    An argument that the saved run lacks equals one that is None, so that a new option does not end old runs.
    """
    identity = plain(identity)
    file = directory / RUN
    if file.is_file() and resume:
        difference = _first_difference("run", _read(file), identity)
        if difference is not None:
            raise OtherRunError(
                f"{directory} holds a run with another {difference}; name another directory or pass resume=False"
            )
        saved = steps_saved(directory)
        clean(directory, saved[-KEEP:])
        return saved[-1] if saved else 0
    atomic_io.check_target(directory, overwrite=file.is_file())
    if file.is_file():
        file.unlink()
    clean(directory, [])
    atomic_io.write_json(file, identity)
    return 0


def _first_difference(name: str, there: Any, here: Any) -> str | None:
    """Return the name of the first difference, with both values where they are short; None: there is none."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [*here, *sorted(there.keys() - here.keys())]
        differences = (_first_difference(key, there.get(key), here.get(key)) for key in keys)
        return next((difference for difference in differences if difference is not None), None)
    if there == here:
        return None
    if isinstance(here, (int, float, str)) and len(str(here)) < 40 and len(str(there)) < 40:
        return f"{name} ({there}, not {here})"
    return name
