"""The machine of a measurement: its processor, and whether it was quiet enough for a claim."""

from __future__ import annotations

import os
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from intaglio.environment import processor, versions
from intaglio.errors import IntaglioError

WANDERED = 0.10
"""Largest difference of the dense time between two parts of a run, relative to the smaller."""
PARTS = 4


def machine() -> dict[str, Any]:
    """Return processor, vector instructions, threads and versions, for the results."""
    return {
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        **versions(["numba"]),
    }


def title() -> str:
    """Return the machine as a line of a report."""
    own = machine()
    return (
        f"{own['processor']}, {own['instructions']}, {own['threads']} threads, load {os.getloadavg()[0]:.1f}, "
        f"torch {own['torch']}, transformers {own['transformers']}, numba {own['numba']}"
    )


def wandering(dense: Sequence[float]) -> float:
    """Return how much the dense time changed during a run: the largest over the smallest median of its parts, less 1.

    Args:
        dense: seconds of the same dense work, in the order in which they were measured.
    """
    count = min(PARTS, len(dense))
    if count < 2:
        return 0.0
    parts = [median(dense[len(dense) * i // count : len(dense) * (i + 1) // count]) for i in range(count)]
    return max(parts) / min(parts) - 1


def check_quiet(dense: Sequence[float], what: str) -> None:
    """Raise an `IntaglioError`, so that nothing is written, if the dense time wandered by more than 10 %."""
    share = wandering(dense)
    if share > WANDERED:
        raise IntaglioError(
            f"the time of {what} wandered by {share:.0%} during the run; results are written from a machine where it "
            f"wanders by at most {WANDERED:.0%}: repeat the run while nothing else is running"
        )
