"""Samples of a model's output before and after a training step, for its report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from intaglio.checkpoint import Checkpoint


@dataclass(frozen=True)
class Sample:
    """An output of a model.

    Args:
        prompt: its input, as shown to the reader.
        expected: the right output.
        text: the output.
    """

    prompt: str
    expected: str
    text: str


@dataclass(frozen=True)
class Samples:
    """Outputs of a model at one time: some to show, and scores over all of them, in percent."""

    shown: Sequence[Sample]
    scores: Mapping[str, float]


@runtime_checkable
class DrawsSamples(Protocol):
    """An objective that shows outputs of a model."""

    def samples(self, checkpoint: Checkpoint, held_out: Sequence[str]) -> Samples:
        """Return outputs for held-out texts; the model may not have been trained yet."""


Show = Callable[[Checkpoint], Samples]


def record_samples(checkpoint: Checkpoint, before: Samples, after: Samples) -> None:
    """Add outputs before and after to the last step of the record."""
    rows: list[dict[str, Any]] = [
        {"prompt": old.prompt, "expected": old.expected, "before": old.text, "after": new.text}
        for old, new in zip(before.shown, after.shown, strict=True)
    ]
    scores = {name: [value, after.scores[name]] for name, value in before.scores.items()}
    checkpoint.record.steps[-1].chosen["samples"] = {"scores": scores, "rows": rows}
