"""Records: the result of a claim as columnar JSON, readable without torch, numpy or the claim itself.

A committed record is `evidence/records/SLUG.json`. It is stale when the claim has another version or digest.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from intaglio import atomic_io
from intaglio.errors import IntaglioError, shorten
from intaglio.evidence.engine.claim import Claim, Cost, Metric

EVIDENCE = Path(__file__).parents[1]
RECORDS, CLAIMS, JOURNALS = EVIDENCE / "records", EVIDENCE / "claims", EVIDENCE / "journals"
FORMAT = 2
MAX_BYTES = 5_000_000
VERDICTS = ("holds", "smaller", "no effect", "worse", "undecided", "untestable here")


@dataclass(frozen=True)
class ArmSummary:
    """One arm over its units: role, mean, share of diverged values, tuned settings, mean cost, other means."""

    what: str
    role: str
    units: int
    mean: float | None
    diverged: float
    settings: dict[str, Any]
    cost: Cost
    metrics: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class LookSummary:
    """One look: units so far, level of the interval, effect, interval, verdict."""

    units: int
    level: float
    effect: float
    interval: tuple[float, float]
    verdict: str


@dataclass(frozen=True)
class Record:
    """A finished run; also what `prove --json` prints.

    Fields of `claim.Claim` keep their names and meaning. `effect` is the mean paired difference, larger = the method is
    better, and `interval` is at the `level` of the last look. `headroom` is the mean of ceiling minus baseline. `probe`
    is what three pilot units showed, `tuning` `{arm: [{settings, mean}]}` on validation data. Columns: `differences` of
    each unit, or of each `inner` unit in each unit (crossed); `values` `{metric: {arm: [mean of each unit]}}` (None:
    diverged); `seconds` `{arm: [core-seconds of each unit]}`. `cost` is in core-minutes; `commit` is "" outside a
    checkout.
    """

    slug: str
    version: int
    digest: str
    says: str
    kind: str
    metric: Metric
    delta: float
    crossed: bool
    unit_names: tuple[str, ...]
    tier: str
    parity: str
    minutes: float
    verdict: str
    why: str
    advice: str
    otherwise: str
    effect: float | None
    interval: tuple[float, float] | None
    level: float
    units: int
    baseline: str
    method: str
    ceiling: str | None
    headroom: float | None
    arms: dict[str, ArmSummary]
    looks: tuple[LookSummary, ...]
    probe: dict[str, Any]
    tuning: dict[str, list[dict[str, Any]]]
    differences: list[Any]
    inner: list[str]
    values: dict[str, dict[str, list[float | None]]]
    seconds: dict[str, list[float]]
    cost: dict[str, float]
    seed_base: int
    reason: str
    commit: str
    versions: dict[str, str]
    machine: str
    command: str
    made: str
    format: int = FORMAT

    @property
    def margin(self) -> float:
        """Effect that the interval must pass: delta, or -delta for `as good as`."""
        return -self.delta if self.kind == "as good as" else self.delta

    @property
    def reading(self) -> str:
        """Verdict, or `better, size open` for an undecided one whose interval lies above 0."""
        positive = self.verdict == "undecided" and self.kind == "better" and self.interval and self.interval[0] > 0
        return "better, size open" if positive else self.verdict

    def gain(self, arm: str) -> float | None:
        """Return how much better than the baseline an arm is, on the units that both ran; None where they diverged.

        `effect` for the method; for other arms the difference of means, over the baseline's where relative.
        """
        if arm == self.method and self.effect is not None:
            return self.effect
        values = self.values[self.metric.name]
        pairs = [(b, a) for b, a in zip(values[self.baseline], values[arm], strict=False) if None not in (b, a)]
        if not pairs:
            return None
        baseline, own = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
        gain = own - baseline if self.metric.better == "higher" else baseline - own
        return gain / max(abs(baseline), 1e-12) if self.metric.relative else gain

    def document(self) -> dict[str, Any]:
        """Return the record as JSON."""
        return asdict(self)

    def summary(self) -> dict[str, Any]:
        """Return the record as JSON without its columns."""
        columns = ("differences", "inner", "values", "seconds", "tuning")
        return {name: value for name, value in self.document().items() if name not in columns}

    @classmethod
    def from_document(cls, document: Any) -> Record:
        """Return the record of a JSON document, or raise a ValueError, TypeError or KeyError."""
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        if missing := {f.name for f in fields(cls)} ^ document.keys():
            raise ValueError(f"it lacks or adds {', '.join(sorted(missing))}")
        arms = {name: ArmSummary(**arm | {"cost": Cost(**arm["cost"])}) for name, arm in dict(document["arms"]).items()}
        looks = tuple(LookSummary(**look | {"interval": tuple(look["interval"])}) for look in document["looks"])
        interval = None if document["interval"] is None else tuple(float(end) for end in document["interval"])
        record = cls(**document | {"arms": arms, "looks": looks, "interval": interval,
                                   "metric": Metric(**document["metric"]),
                                   "unit_names": tuple(document["unit_names"])})  # fmt: skip
        if record.verdict not in VERDICTS:
            raise ValueError(f"its verdict is {record.verdict!r}")
        if {record.baseline, record.method} - arms.keys():
            raise ValueError("the compared arms are not among its arms")
        tested = record.verdict != "untestable here"
        if tested and not (interval and record.effect is not None and interval[0] <= record.effect <= interval[1]):
            raise ValueError("its effect lies outside its interval")
        return record


def alternative(claim: Claim) -> str:
    """Return what to take instead of the method."""
    return claim.otherwise or claim.arms[claim.baseline].what


def compose_advice(claim: Claim, verdict: str, low: float = 0.0) -> str:
    """Return the sentence for a user that follows from a verdict, unless the claim has its own."""
    otherwise = alternative(claim)
    open_size = verdict == "undecided" and low > 0 and claim.kind == "better"
    sentences = {
        "holds": f"Use it when {claim.use_when}, otherwise take {otherwise}.",
        "smaller": f"It helps by less than matters: use it where it costs nothing, otherwise take {otherwise}.",
        "no effect": f"It makes no difference here: take {otherwise}.",
        "worse": f"It is worse here: take {otherwise}.",
        "undecided": f"Undecided here: take {otherwise}, or measure it on your data.",
        "better, size open": f"Better by an unknown amount: try it when {claim.use_when}, otherwise take {otherwise}.",
        "untestable here": f"It could not be tested here: take {otherwise}, or measure it on your data.",
    }
    return claim.advice or sentences["better, size open" if open_size else verdict]


def is_stale(record: Record, claim: Claim) -> bool:
    """Return whether the claim has another version or digest than its record."""
    return (record.version, record.digest) != (claim.version, claim.digest)


def read_record(path: Path, slug: str | None = None) -> Record:
    """Read a record."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise IntaglioError(f"{path} is not a record of Intaglio: it is larger than {MAX_BYTES // 10**6} MB")
        record = Record.from_document(json.loads(path.read_bytes()))
    except OSError as error:
        raise IntaglioError(f"the record {path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, IntaglioError):
            raise
        reason = shorten(str(error).splitlines()[0] if str(error) else "a field is missing", 160)
        raise IntaglioError(f"{path} is not a record of Intaglio, or is damaged: {reason}") from error
    if slug is not None and record.slug != slug:
        raise IntaglioError(f"{path} is the record of {shorten(record.slug)!r}, not of {slug!r}")
    return record


def write_record(record: Record, path: Path) -> None:
    """Write a record: one line a field, so that changes can be read and columns stay compact."""
    lines = [f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in record.document().items()]
    atomic_io.write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def committed(slug: str) -> Record | None:
    """Return the committed record of a method, or None."""
    path = RECORDS / f"{slug}.json"
    return read_record(path, slug) if path.is_file() else None


def is_registered(slug: str) -> bool:
    """Return whether a method has a claim."""
    return (CLAIMS / f"{slug}.py").is_file()


def all_committed() -> dict[str, Record]:
    """Return every committed record by slug."""
    return {path.stem: read_record(path, path.stem) for path in sorted(RECORDS.glob("*.json"))}
