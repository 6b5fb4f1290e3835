"""What a claim is as an experiment: one comparison, fixed before the first run, and what runs it.

Nothing here imports torch or numpy: the catalogue reads records through these types.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Stage = Literal["tuning", "pilot", "run"]
"""`tuning` chooses settings on validation data, `pilot` sizes the run; neither's seeds or data are the run's."""
Tier = Literal["cpu", "gpu"]
Kind = Literal["better", "as good as"]
Direction = Literal["lower", "higher"]
Design = Literal["independent", "clustered", "crossed"]
"""How the values of runs hang together: `independent`, one value a run; `clustered`, a run gives values of units of its
own, not equally many; `crossed`, every run gives one value for each of the same units."""

LEVEL = 0.95
"""Of every interval."""
TARGET = 0.6
"""The half-width that a run is sized for, in deltas."""
BOUND = 0.8
"""The pilot's spread is taken at this upper bound, so that a lucky pilot does not make too small a run."""
MOST_DIVERGED = 0.2
"""A method with a larger share of diverged units fails, whatever its other units say."""
LEAST_RUNS: Mapping[Design, int] = {"independent": 5, "clustered": 10, "crossed": 4}
"""What a pilot asks for at the least: below, the spread that a run sees says too little about itself."""
FEWEST_RUNS: Mapping[Design, int] = {"independent": 2, "clustered": 4, "crossed": 2}
"""With fewer there is no interval at all."""
MOST_INDEX = 100_000
MOST_EARLY = MOST_INDEX // 2
"""Runs of a pilot, or of a tuning, at the most: their seeds share the odd numbers."""


class Cost(BaseModel):
    """What one arm of one run took.

    Args:
        tokens: that the method looked at (calibration, training).
        flops: floating-point operations of the method's own work, as it estimates them.
        parameters: that are left, zeros not counted.
        seconds: wall time of the method's own work.
        peak_bytes: the most memory held at once during it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int
    flops: float
    parameters: int
    seconds: float
    peak_bytes: int


class Outcome(BaseModel):
    """What one arm of one run gave.

    Args:
        values: `{metric: {unit: value}}`; None, NaN or an infinity is a diverged unit. An independent design has one
            unit.
        cost: what it took.
        shared: what all arms of a run must have in common, such as the digest of their calibration data; it is checked.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    values: dict[str, dict[str, float | None]]
    cost: Cost
    shared: dict[str, str] = {}


@dataclass(frozen=True)
class Unit:
    """Which run: the seed follows from it.

    Args:
        stage: `tuning`, `pilot` or `run`.
        index: from 0.
        base: the seed base that the user gave.
        choice: which of the arm's settings: one of `Tuning.choices` while tuning, then the one that was chosen. Default
            "": the arm has none to choose from.
    """

    stage: Stage
    index: int
    base: int = 0
    choice: str = ""

    @property
    def seed(self) -> int:
        """A number that no other stage, index (below 100,000) or base has: runs are even, the others odd. It does not
        depend on the choice, so that choices are tried on the same data."""
        index = self.index + (MOST_EARLY if self.stage == "tuning" else 0)
        return 2 * (MOST_INDEX * self.base + index) + (self.stage != "run")


Runner = Callable[[str, Unit, int], Outcome]
"""`run_unit(arm, unit, seed) -> Outcome`. It draws everything from the seed alone (never from the arm), so that the
arms of a run are pairs; it can be pickled, so that processes can share the work."""


@dataclass(frozen=True)
class Tuning:
    """Settings that arms choose from on validation data, before the pilot, each arm with the same number of trials.

    The choice with the best mean of the primary metric over all tuning runs is used from then on; of equal ones the
    first. A diverged value counts as the worst that any choice of the arm had.

    Args:
        choices: `{arm: {choice: what it is}}`; the baseline and the method are among the arms, and all have equally
            many choices. Arms that are left out have nothing to choose.
        runs: in which each choice is tried. Default 1.
    """

    choices: Mapping[str, Mapping[str, str]]
    runs: int = 1


@dataclass(frozen=True)
class Secondary:
    """A comparison beside the primary one; its p-value is corrected for their number.

    Args:
        name: what it asks, in a few words.
        baseline: an arm.
        method: another.
        metric: of the outcome's values. Default "": the primary one.
        direction: which way of it is better. Default `lower`.
    """

    name: str
    baseline: str
    method: str
    metric: str = ""
    direction: Direction = "lower"


@dataclass(frozen=True)
class Experiment:
    """One claim of one method.

    Effects are always "larger = the method is better", whatever the metric's direction.

    Args:
        slug: the method's.
        claim: a plain sentence.
        metric: of the outcome's values, in one word or two.
        unit: of `metric`, such as "nats a token".
        direction: which way of the metric is better.
        delta: the least effect that matters, above 0, in the metric's unit.
        design: how values hang together.
        factors: names of what a run is and of what a unit within it is, such as `("calibration draw", "document")`.
        arms: `{name: what it is and how it differs}`.
        baseline: the arm that the method is held against.
        method: the method's arm.
        parity: the budget that is equal over the arms, in a sentence.
        run_unit: runs one arm of one run.
        kind: `better`, or `as good as` (not worse by more than delta). Default `better`.
        tier: what it needs. Default `cpu`.
        equal: fields of `Cost` that must be equal over the arms of a run; it is checked.
        secondaries: further comparisons.
        pilot_runs: runs of the pilot. Default 5.
        units: of a run, for the crossed design, where the run has other than the pilot.
        most_runs: what the tier's time allows; a pilot that asks for more gets this many, and the record says so.
        secondary_runs: arms that only secondaries compare run in the first so many runs, so that the tier's time
            goes to the claim. Default None: in all.
        threads: of torch in every process; part of what makes numbers equal. None: torch is not touched.
        settings: every other choice: sizes, splits, hyperparameters.
        tuning: what the arms choose on validation data. Default None: nothing is tuned.
        why: what changed in claim, tier or delta against the issue that named them, and why. Default: nothing did.

    Raises:
        ValueError: the experiment contradicts itself.
    """

    slug: str
    claim: str
    metric: str
    unit: str
    direction: Direction
    delta: float
    design: Design
    factors: tuple[str, ...]
    arms: Mapping[str, str]
    baseline: str
    method: str
    parity: str
    run_unit: Runner
    kind: Kind = "better"
    tier: Tier = "cpu"
    equal: tuple[str, ...] = ()
    secondaries: tuple[Secondary, ...] = ()
    pilot_runs: int = 5
    units: int | None = None
    most_runs: int = 1000
    secondary_runs: int | None = None
    threads: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""
    tuning: Tuning | None = None

    def __post_init__(self) -> None:
        if not 0 < self.delta < float("inf"):
            raise ValueError(f"{self.slug}: delta is {self.delta}; the least effect that matters is above 0")
        for name in (self.baseline, self.method, *(n for s in self.secondaries for n in (s.baseline, s.method))):
            if name not in self.arms:
                raise ValueError(f"{self.slug}: there is no arm named {name!r}")
        if any(a == b for a, b in [(self.baseline, self.method), *((s.baseline, s.method) for s in self.secondaries)]):
            raise ValueError(f"{self.slug}: an arm is held against itself")
        if (self.design == "crossed") != (self.units is not None):
            raise ValueError(f"{self.slug}: a crossed design says how many units a run has, and no other does")
        if not FEWEST_RUNS[self.design] <= self.pilot_runs <= min(self.most_runs, MOST_EARLY) <= MOST_INDEX:
            raise ValueError(f"{self.slug}: the pilot has {self.pilot_runs} runs and at most {self.most_runs} follow")
        if self.secondary_runs is not None and self.secondary_runs < FEWEST_RUNS[self.design]:
            raise ValueError(f"{self.slug}: {self.secondary_runs} runs of the secondary arms give no interval")
        if self.tuning is not None:
            self._check_tuning(self.tuning)
        unknown = set(self.equal) - set(Cost.model_fields)
        if unknown:
            raise ValueError(f"{self.slug}: a cost has no {', '.join(sorted(unknown))}")

    def _check_tuning(self, tuning: Tuning) -> None:
        if not {self.baseline, self.method} <= tuning.choices.keys() <= self.arms.keys():
            raise ValueError(f"{self.slug}: what is tuned are arms, the baseline and the method among them")
        if len({len(choices) for choices in tuning.choices.values()}) > 1 or not all(tuning.choices.values()):
            raise ValueError(f"{self.slug}: every arm that is tuned has the same number of choices")
        if not 1 <= tuning.runs <= MOST_EARLY:
            raise ValueError(f"{self.slug}: {tuning.runs} tuning runs choose nothing")

    def runs_of(self, arm: str, runs: int) -> int:
        """In how many of the runs an arm takes part: always the first.

        Args:
            arm: of `arms`.
            runs: of the primary claim.
        """
        if self.secondary_runs is None or arm in (self.baseline, self.method):
            return runs
        return min(runs, self.secondary_runs)

    def preregistration(self) -> dict[str, Any]:
        """Every choice, ready for JSON: what is committed before the first run."""
        return {
            "slug": self.slug,
            "claim": self.claim,
            "kind": self.kind,
            "metric": self.metric,
            "unit": self.unit,
            "direction": self.direction,
            "delta": self.delta,
            "tier": self.tier,
            "design": self.design,
            "factors": list(self.factors),
            "arms": dict(self.arms),
            "baseline": self.baseline,
            "method": self.method,
            "parity": self.parity,
            "equal": list(self.equal),
            "secondaries": [
                {
                    "name": s.name,
                    "baseline": s.baseline,
                    "method": s.method,
                    "metric": s.metric or self.metric,
                    "direction": s.direction if s.metric else self.direction,
                }
                for s in self.secondaries
            ],
            "pilot_runs": self.pilot_runs,
            "units": self.units,
            "most_runs": self.most_runs,
            "secondary_runs": self.secondary_runs,
            "threads": self.threads,
            "settings": dict(self.settings),
            "why": self.why,
            # Absent where nothing is tuned.
            **({} if self.tuning is None else {"tuning": asdict(self.tuning)}),
            "seeds": f"2 * ({MOST_INDEX} * seed base + index), plus 1 for the pilot",
            "rules": {
                "level": LEVEL,
                "half-width sized for, in deltas": TARGET,
                "upper bound of the pilot's spread": BOUND,
                "share of diverged units that fails": MOST_DIVERGED,
                "least runs": LEAST_RUNS[self.design],
            },
        }

    @property
    def digest(self) -> str:
        """SHA-256 of the preregistration."""
        return digest(self.preregistration())


def digest(document: Any) -> str:
    """SHA-256 of a JSON document, whatever the order of its keys.

    Args:
        document: anything `json.dumps` takes.
    """
    text = json.dumps(document, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()
