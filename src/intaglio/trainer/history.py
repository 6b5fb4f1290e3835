"""History of a run: log entries for Python, columns for the record and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LogEntry:
    """One line of the history.

    Args:
        step: optimizer steps done.
        loss: mean of the total since the previous line, in the objective's unit (nats a token for `CausalLM`).
        parts: means of the parts of the objective's loss and of the modifiers' terms.
        learning_rate: of the step.
        gradient_norm: of the step, before clipping.
        evaluation: results of `evaluate` after this step; empty between evaluations.
    """

    step: int
    loss: float
    parts: Mapping[str, float]
    learning_rate: float
    gradient_norm: float
    evaluation: Mapping[str, float] = field(default_factory=dict)


def history(log: Sequence[dict[str, Any]]) -> tuple[LogEntry, ...]:
    """Return the lines of a log of `transformers.Trainer`."""
    return tuple(
        LogEntry(
            step=int(line["step"]),
            loss=line["loss"],
            parts=_named(line, "part/"),
            learning_rate=line["learning_rate"],
            gradient_norm=line["grad_norm"],
            evaluation=_named(line, "evaluation/"),
        )
        for line in log
        if "loss" in line
    )


def _named(line: dict[str, Any], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in line.items() if name.startswith(prefix)}


def columns(lines: Sequence[LogEntry]) -> dict[str, list[Any]]:
    """Return a history as columns, None where a line has no such value; see `intaglio.report.training_curves`."""
    table: dict[str, list[Any]] = {
        "step": [line.step for line in lines],
        "loss": [line.loss for line in lines],
        "learning_rate": [line.learning_rate for line in lines],
        "gradient_norm": [line.gradient_norm for line in lines],
    }
    for prefix in ("parts", "evaluation"):
        values = [getattr(line, prefix) for line in lines]
        # Sorted: after a resume they come in another order.
        for name in sorted({name for line in values for name in line}):
            table[f"{prefix.removesuffix('s')}/{name}"] = [line.get(name) for line in values]
    return table
