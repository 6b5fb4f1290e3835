"""Spot checks: rerun a record's cheapest sealed unit, whose difference should fall inside the prediction interval."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from intaglio.errors import IntaglioError
from intaglio.evidence.engine import record as records
from intaglio.evidence.engine.claim import Claim, RunKey
from intaglio.evidence.engine.registration import check_machine, load_claim
from intaglio.evidence.engine.run import Task, run_task
from intaglio.evidence.engine.statistics import pair, prediction_interval


@dataclass(frozen=True)
class Spot:
    """Difference of a unit on record and now, with the 99 % prediction interval."""

    slug: str
    unit: int
    recorded: float
    now: float
    interval: tuple[float, float]
    stale: bool

    @property
    def inside(self) -> bool:
        """Whether the difference lies inside the interval."""
        return self.interval[0] <= self.now <= self.interval[1]

    def document(self) -> dict[str, Any]:
        """Return the check as JSON."""
        return asdict(self) | {"inside": self.inside}

    def sentence(self) -> str:
        """Return the check in words."""
        place = "inside" if self.inside else "OUTSIDE"
        return (
            f"{self.slug}: unit {self.unit} gives {self.now:+.4g} (on record {self.recorded:+.4g}), {place} the 99 %"
            f" prediction interval {self.interval[0]:+.4g} to {self.interval[1]:+.4g}."
            + (" The record is stale: the claim has changed." if self.stale else "")
        )


def spot(slug: str, claim: Claim | None = None, record: records.Record | None = None) -> Spot:
    """Rerun baseline and method of the cheapest unit of a record (default: the committed one)."""
    claim, record = claim or load_claim(slug), record or records.committed(slug)
    if record is None or record.effect is None:
        raise IntaglioError(f"{slug} has no record with an effect that a spot check could rerun")
    check_machine(claim)
    arms = (record.baseline, record.method)
    unit = int(np.argmin(np.sum([record.seconds[arm] for arm in arms], axis=0)))
    key = RunKey("look", unit, record.seed_base, record.version)
    entries = [run_task(claim, Task(arm, key, record.arms[arm].settings)) for arm in arms]
    baseline, method = ([entry.values[claim.metric.name]] for entry in entries)
    now = float(pair(baseline, method, claim.metric, claim.crossed).x.mean())
    x_N = np.array([np.mean(of_unit) for of_unit in record.differences])
    interval = prediction_interval(x_N, record.delta)
    return Spot(slug, unit, float(x_N[unit]), now, interval, records.is_stale(record, claim))
