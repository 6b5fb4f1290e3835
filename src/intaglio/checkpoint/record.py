"""The record of a checkpoint's steps (`intaglio.json`), and reading it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers.utils import cached_file

from intaglio.errors import IntaglioError

RECORD = "intaglio.json"


class StepRecord(BaseModel):
    """A finished step, with all that is needed to repeat it.

    Args:
        slug: the method.
        parameters: its hyperparameters, defaults included.
        seed: its seed.
        calibration: digest, samples, length and batch size of its calibration data, or None.
        chosen: values derived from the model (scaled thresholds, zero fractions ...).
        verb: `carve`, which edits the model, or `fit`, which attaches something to it.
        timings: seconds by part, for a report; never written, as they differ between runs.
    """

    model_config = ConfigDict(extra="forbid")

    slug: str
    parameters: dict[str, Any]
    seed: int = 0
    calibration: dict[str, Any] | None = None
    chosen: dict[str, Any] = Field(default_factory=dict)
    verb: Literal["carve", "fit"] = "carve"
    timings: dict[str, float] = Field(default_factory=dict, exclude=True)


class Record(BaseModel):
    """The content of `intaglio.json`.

    Args:
        format: version of this file.
        source: what the checkpoint was loaded from.
        steps: the steps, in order.
        versions: of the libraries, at the last step.
        threads: of torch, which affect the last bits of some sums.
        dtype: of the weights.
        live: parts to restore after loading; empty for a baked checkpoint.
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    source: str = ""
    steps: list[StepRecord] = Field(default_factory=list)
    versions: dict[str, str] = Field(default_factory=dict)
    threads: int = 0
    dtype: str = ""
    live: list[dict[str, Any]] = Field(default_factory=list)


def read_record(path: Path) -> Record | None:
    """Return the record in a directory, or None."""
    file = path / RECORD
    if not file.is_file():
        return None
    try:
        return Record.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        location = "".join(f"{part}: " for part in [".".join(str(part) for part in first["loc"])] if part)
        raise IntaglioError(f"{file} is not a record of Intaglio: {location}{first['msg']}") from error


def hub_record(source: str, revision: str | None, needed: bool = True) -> Record | None:
    """Return the record of a model on the hub, or None."""
    file = cached_file(
        source,
        RECORD,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=needed,
        _raise_exceptions_for_gated_repo=needed,
    )
    return None if file is None else read_record(Path(file).parent)
