"""What is kept of a run: read by the catalogue, the site and anybody who wants to check; needs neither torch nor numpy.

Shipped records lie in `results/SLUG.json`, beside `preregistered/SLUG.json`, which was committed before the first run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from intaglio.errors import IntaglioError, shorten
from intaglio.evidence import sources
from intaglio.evidence.experiment import Cost, Design, Direction, Kind, Outcome, Stage, Tier
from intaglio.methods.registry import PUBLISHED

RESULTS = Path(__file__).parent / "results"
PREREGISTERED = Path(__file__).parent / "preregistered"
MOST_BYTES = 50_000_000


class _Strict(BaseModel):
    # Frozen and closed: a field that is not known is somebody else's.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Run(_Strict):
    """One arm of one run, as it stands in the journal and in the record.

    Args:
        stage: `tuning`, `pilot` or `run`.
        index: of the run, from 0.
        seed: that everything was drawn from.
        arm: which.
        choice: of its settings; "" where it has none to choose from.
        outcome: raw values, cost, and what the arms share; a diverged value is null.
    """

    stage: Stage
    index: int
    seed: int
    arm: str
    choice: str = ""
    outcome: Outcome

    @property
    def key(self) -> tuple[Stage, int, str]:
        """What no other run of an experiment has; while tuning, an arm runs once for each of its choices."""
        return self.stage, self.index, f"{self.arm}: {self.choice}" if self.stage == "tuning" else self.arm


class ArmSummary(_Strict):
    """One arm over all runs.

    Args:
        what: what it is.
        runs: that it took part in.
        mean: of the primary metric over all units; None for an arm that has no such value.
        diverged: share of its units.
    """

    what: str
    runs: int
    mean: float | None
    diverged: float


class Compared(_Strict):
    """A secondary comparison.

    Args:
        name: what it asks.
        metric: of which values.
        direction: which way of it is better.
        baseline: an arm.
        method: the other.
        runs: compared: those that both arms took part in.
        effect: larger = the method is better.
        interval: 95 %, not corrected.
        p: two-sided, for "the effect is 0".
        p_holm: corrected for the number of secondaries.
        diverged: share of the method's units.
    """

    name: str
    metric: str
    direction: Direction
    baseline: str
    method: str
    runs: int
    effect: float
    interval: tuple[float, float]
    p: float
    p_holm: float
    diverged: float


class Tuned(_Strict):
    """What an arm chose on validation data.

    Args:
        chosen: the best choice.
        means: of the primary metric for each choice, over the values that did not diverge; None if all did.
        diverged: share of each choice's values.
    """

    chosen: str
    means: dict[str, float | None]
    diverged: dict[str, float]


class Pilot(_Strict):
    """How the number of runs was fixed.

    Args:
        runs: of the pilot.
        asked: runs that it asks for; None where no number suffices for the half-width wanted.
        most: runs that the tier's time allows.
    """

    runs: int
    asked: int | None
    most: int


class Record(_Strict):
    """A finished run; also what `prove` prints.

    Args:
        format: of this file.
        slug: the method.
        claim: a plain sentence.
        kind: `better` or `as good as`.
        metric: compared.
        unit: of the metric.
        direction: which way of it is better.
        tier: where it ran.
        delta: the least effect that matters.
        verdict: `holds`, `fails`, `underpowered` or `inconclusive`.
        effect: mean paired difference, larger = the method is better.
        interval: 95 %.
        units: runs that were compared (the number that `--units` sets).
        sizes: `{factor: count}`, and `pairs`, the paired values.
        design: how the values hang together.
        baseline: the baseline's arm.
        method: the method's arm.
        arms: summaries.
        parity: what is equal over the arms.
        cost: of each arm, mean over runs.
        secondaries: other comparisons.
        tuned: what each arm chose; empty where nothing is tuned.
        pilot: None where the user gave the number of runs.
        seed_base: that seeds follow from.
        seeds: of each stage.
        threads: of torch; None if untouched.
        versions: of what decides the numbers.
        command: that gives this record again.
        made: the day, ISO.
        renewed: the day when one run of every arm, run again with changed code, gave the same values; None if never.
        beside: the revision whose code was run beside the changed one for that, on a machine or with libraries that do
            not give the values on record; None where the values on record were given again.
        preregistration: every choice.
        preregistration_digest: SHA-256 of it.
        sources: `{module: syntax-tree hash}` of what the run depends on.
        runs: raw values for every unit and arm.
    """

    format: Literal[1] = 1
    slug: str
    claim: str
    kind: Kind
    metric: str
    unit: str
    direction: Direction
    tier: Tier
    delta: float = Field(gt=0)
    verdict: Literal["holds", "fails", "underpowered", "inconclusive"]
    effect: float
    interval: tuple[float, float]
    units: int = Field(ge=1)
    sizes: dict[str, int]
    design: Design
    baseline: str
    method: str
    arms: dict[str, ArmSummary]
    parity: str
    cost: dict[str, Cost]
    secondaries: list[Compared]
    tuned: dict[str, Tuned] = {}
    pilot: Pilot | None
    seed_base: int = Field(ge=0)
    seeds: dict[Stage, list[int]]
    threads: int | None
    versions: dict[str, str]
    command: str
    made: str
    renewed: str | None = None
    beside: str | None = None
    preregistration: dict[str, Any]
    preregistration_digest: str
    sources: dict[str, str]
    runs: list[Run]

    @model_validator(mode="after")
    def _hangs_together(self) -> Record:
        if not self.interval[0] <= self.effect <= self.interval[1]:
            raise ValueError("the effect lies outside its interval")
        if {self.baseline, self.method} - self.arms.keys():
            raise ValueError("the compared arms are not among the arms")
        return self


def first_problem(error: ValidationError) -> str:
    """What pydantic found first, as a clause.

    Args:
        error: what it raised.
    """
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return shorten(f"{place}: {first['msg']}" if place else first["msg"], 200)


def read_record(path: Path, slug: str | None = None) -> Record:
    """Read a record.

    Args:
        path: of the file.
        slug: of the method whose record it must be. Default: any.

    Raises:
        IntaglioError: it cannot be read, is no record, or is another method's.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise IntaglioError(f"{path} is no record of Intaglio: it is larger than {MOST_BYTES // 10**6} MB")
        content = path.read_bytes()
    except OSError as error:
        raise IntaglioError(f"the record {path} cannot be read: {error.strerror}") from error
    try:
        found = Record.model_validate_json(content)
    except ValidationError as error:
        raise IntaglioError(f"{path} is no record of Intaglio, or a damaged one: {first_problem(error)}") from error
    if slug is not None and found.slug != slug:
        raise IntaglioError(f"{path} is the record of {shorten(found.slug)!r}, not of {slug!r}")
    return found


def shipped(slug: str) -> Record | None:
    """The committed record of a method, or None if there is none.

    Args:
        slug: of the method.

    Raises:
        IntaglioError: the record is corrupt or another method's.
    """
    path = RESULTS / f"{slug}.json"
    return read_record(path, slug) if path.is_file() else None


def shipped_verdict(slug: str) -> str | None:
    """Return the verdict of a method's committed record without validating the record; None if there is none."""
    path = RESULTS / f"{slug}.json"
    verdict: str | None = json.loads(path.read_bytes())["verdict"] if path.is_file() else None
    return verdict


def all_shipped() -> dict[str, Record]:
    """Every committed record, by slug.

    Raises:
        IntaglioError: one is corrupt, or under another method's name.
    """
    return {path.stem: read_record(path, path.stem) for path in sorted(RESULTS.glob("*.json"))}


def stale_parts(record: Record) -> tuple[str, ...]:
    """Modules that do something else now than when the record was made, came after it, or are gone.

    Args:
        record: any.
    """
    now = sources.of_slug(record.slug) if record.slug in PUBLISHED else {}
    then = record.sources
    return tuple(sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name)))


def is_stale(record: Record) -> bool:
    """Whether the code that a record depends on has changed since.

    Args:
        record: any.
    """
    return bool(stale_parts(record))


def preregistered(slug: str) -> dict[str, Any] | None:
    """The committed preregistration of a method, or None.

    Args:
        slug: of the method.

    Raises:
        IntaglioError: the file is no JSON object.
    """
    path = PREREGISTERED / f"{slug}.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IntaglioError(f"the preregistration {path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise IntaglioError(f"the preregistration {path} is no JSON object")
    return found
