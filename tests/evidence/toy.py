"""Experiments whose truth is known, quick and without a model; at module level, so that processes can share them."""

from __future__ import annotations

import hashlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.evidence.experiment import Cost, Experiment, Outcome, Secondary, Unit

COST = Cost(tokens=10, flops=1.0, parameters=5, seconds=0.0, peak_bytes=1)


@dataclass(frozen=True)
class Toy:
    """Loss around 3, lower by `effect` in the method's arm.

    Args:
        effect: planted.
        units: of a run; 0 makes clusters of unequal size.
        noise: of a difference.
        diverged: runs below this index have no value in the method's arm.
        calls: a folder that gets one file for each call.
        kill_at: raises KeyboardInterrupt once that many calls were made.
        hard: kills the process instead.
        unfair: the arms do not share their data.
        tokens: by arm.
        better: by choice: the loss is lower by that much; NaN does not finish.
    """

    effect: float = 1.0
    units: int = 1
    noise: float = 0.3
    diverged: int = 0
    calls: str = ""
    kill_at: int = -1
    hard: bool = False
    unfair: bool = False
    tokens: tuple[tuple[str, int], ...] = ()
    better: tuple[tuple[str, float], ...] = ()

    def __call__(self, arm: str, unit: Unit, seed: int) -> Outcome:
        if self.calls:
            if len(list(Path(self.calls).iterdir())) == self.kill_at:
                if self.hard:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise KeyboardInterrupt
            (Path(self.calls) / f"{unit.stage}-{unit.index}-{arm}{unit.choice}-{seed}").touch(exist_ok=False)
        rng = np.random.default_rng(seed)
        count = self.units or int(rng.integers(1, 6))
        base = 3 + rng.normal(size=count) + 0.1 * rng.normal()
        shift = self.effect + self.noise * rng.normal(size=count)
        chosen = dict(self.better).get(unit.choice, 0.0)
        values: list[float | None] = list((base - shift if arm == "method" else base) - chosen)
        if arm == "method" and unit.stage == "run" and unit.index < self.diverged:
            values[0] = float("nan") if unit.index % 2 else None
        shared = {"data": hashlib.sha256(str((seed, arm if self.unfair else "")).encode()).hexdigest()}
        cost = COST.model_copy(update={"tokens": dict(self.tokens).get(arm, 10)})
        # Pairs go by name: each arm has an order of its own.
        order = reversed(range(count)) if arm == "method" else range(count)
        of_units = {f"u{k}": values[k] for k in order}
        twice = {name: value and 2 * value for name, value in of_units.items()}
        return Outcome(values={"loss": of_units, "twice": twice}, cost=cost, shared=shared)


def toy(runner: Toy | None = None, **changes: Any) -> Experiment:
    """An experiment under the slug of Wanda, which stands for any method.

    Args:
        runner: what runs it.
        changes: fields of the experiment.
    """
    runner = runner or Toy()
    crossed: dict[str, Any] = {"design": "crossed", "units": runner.units} if runner.units > 1 else {}
    fields: dict[str, Any] = {
        "slug": "wanda",
        "claim": "The toy method lowers the loss.",
        "metric": "loss",
        "unit": "nats",
        "direction": "lower",
        "delta": 0.5,
        "design": "independent" if runner.units else "clustered",
        "factors": ("seed", "unit"),
        "arms": {"baseline": "nothing", "method": "something", "other": "something else"},
        "baseline": "baseline",
        "method": "method",
        "parity": "Everything.",
        "run_unit": runner,
        "equal": ("tokens",),
        "secondaries": (Secondary("other", "other", "method"), Secondary("twice", "baseline", "method", "twice")),
        "settings": {"effect": runner.effect},
    }
    return Experiment(**(fields | crossed | changes))
