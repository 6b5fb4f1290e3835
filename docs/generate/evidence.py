"""A claim and what came of it, ready for a page: rows of text, from the registration and the record alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from intaglio.evidence import plot, summary
from intaglio.evidence.experiment import LEVEL
from intaglio.evidence.record import Record, preregistered, shipped, stale_parts

State = Literal["none", "registered", "run"]
WORDS = {"none": "no evidence yet", "registered": "registered, not yet run"}
NATS = "nats a token"


@dataclass(frozen=True)
class Evidence:
    """What there is of a method's claim.

    Args:
        slug: of the method.
        registration: what was committed before the first run; None if nothing was.
        record: of the run; None if there was none.
    """

    slug: str
    registration: Mapping[str, Any] | None
    record: Record | None

    @property
    def state(self) -> State:
        """No claim, a claim that was not run, or a run."""
        if self.record is not None:
            return "run"
        return "none" if self.registration is None else "registered"

    @property
    def word(self) -> str:
        """The verdict, or why there is none."""
        return self.record.verdict if self.record is not None else WORDS[self.state]

    @property
    def stale(self) -> tuple[str, ...]:
        """Modules that changed since the run."""
        return () if self.record is None else stale_parts(self.record)

    @property
    def claim(self) -> Mapping[str, Any]:
        """Every choice: as the record has it, or as it was registered."""
        found = self.registration if self.record is None else self.record.preregistration
        assert found is not None
        return found

    @property
    def command(self) -> str:
        """What gives the record, or gives it again."""
        if self.record is not None:
            return self.record.command
        return f"intaglio prove {self.slug} --tier {self.claim['tier']}"


def of(slug: str) -> Evidence:
    """The evidence of a method, from what is committed.

    Args:
        slug: of the method.
    """
    return Evidence(slug, preregistered(slug), shipped(slug))


def short(evidence: Evidence) -> str:
    """The verdict with its numbers, for a row of a table.

    Args:
        evidence: of a method.
    """
    record = evidence.record
    if record is None:
        return evidence.word
    low, high = record.interval
    return (
        f"**{record.verdict}**: {record.metric} {record.effect:+.4f} ({low:+.4f} to {high:+.4f}), "
        f"{to_pass(record.delta, record.kind)} to pass"
    )


def to_pass(delta: float, kind: str) -> str:
    """What the interval has to lie above.

    Args:
        delta: the least effect that matters.
        kind: `better` or `as good as`.
    """
    return f"{delta if kind == 'better' else -delta:+g}"


def claim_rows(claim: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was fixed before the first run.

    Args:
        claim: the registration.
    """
    arms, rules = claim["arms"], claim["rules"]
    run, unit = (*claim["factors"], "")[:2]  # where runs are independent there is no other factor
    design = {
        "independent": f"one value a {run}",
        "clustered": f"units of its own a {run}: {unit}s, not equally many",
        "crossed": f"a {unit} crossed with a {run}; {claim['units']} {unit}s",
    }[claim["design"]]
    few = claim.get("secondary_runs")
    first = f"; arms that only secondary comparisons need take part in the first {few}" if few else ""
    kind = "better by more than" if claim["kind"] == "better" else "not worse by more than"
    rows = [
        ("Method", f"`{claim['method']}`: {arms[claim['method']]}"),
        ("Baseline", f"`{claim['baseline']}`: {arms[claim['baseline']]}"),
        ("Metric", f"{claim['metric']}, {claim['unit']}; {claim['direction']} is better"),
        ("Least effect that matters", f"{kind} {claim['delta']:g} {claim['unit']}"),
        ("What is paired", design),
        ("Kept equal", claim["parity"]),
        (
            "Number of runs",
            f"a pilot of {claim['pilot_runs']} on other seeds says, at least {rules['least runs']} and at most "
            f"{claim['most_runs']}{first}",
        ),
        ("Needs", {"cpu": "a CPU", "gpu": "a GPU"}[claim["tier"]]),
    ]
    return rows + ([("Before the first run", claim["why"])] if claim["why"] else [])


def settings_rows(settings: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Settings, nested ones under their path.

    Args:
        settings: of a registration.
        above: the path so far.
    """
    rows: list[tuple[str, str]] = []
    for name, value in settings.items():
        path = f"{above}, {name}" if above else name
        if isinstance(value, Mapping) and all(not isinstance(v, Mapping) for v in value.values()):
            kept = [f"{k} = {v}" for k, v in value.items() if v is not None]
            rows.append((path, ", ".join(kept)))
        elif isinstance(value, Mapping):
            rows += settings_rows(value, path)
        else:
            rows.append((path, str(value)))
    return rows


def picture(record: Record) -> str:
    """The effects with their intervals, in the page's colours.

    Args:
        record: of a run.
    """
    return plot.effects(record, alone=False)


def sentence(record: Record) -> str:
    """The verdict in words, as the command line says it; the claim, which stands above it, left out.

    Args:
        record: of a run.
    """
    said = summary.sentence(record).removeprefix(f"{record.slug}: ").replace(f" {record.claim}", "")
    return said[0].upper() + said[1:]


def in_perplexity(record: Record) -> str:
    """What an effect on the logarithm of the perplexity does to the perplexity; "" for another metric.

    Args:
        record: of a run.
    """
    if record.unit != NATS or record.direction != "lower":
        return ""
    middle, least, most = (100 * math.expm1(-value) for value in (record.effect, *record.interval))
    return f"{middle:+.1f} % perplexity (95 % interval {most:+.1f} to {least:+.1f} %)"


@dataclass(frozen=True)
class Arm:
    """A row of the table of arms.

    Args:
        name: of the arm.
        what: it is.
        compared: `method`, `baseline` or "".
        cells: its metric and costs, in the order of `arm_columns`.
    """

    name: str
    what: str
    compared: str
    cells: tuple[str, ...]


def arm_columns(record: Record) -> tuple[str, ...]:
    """What the cells of an arm are; a star marks what is equal by design.

    Args:
        record: of a run.
    """
    equal = record.preregistration.get("equal", ())
    costs = {
        "tokens": "tokens",
        "flops": "GFLOPs",
        "parameters": "non-zero, M",
        "seconds": "s",
        "peak_bytes": "peak, MB",
    }
    return (
        "runs",
        record.metric,
        *(["diverged"] if _any_diverged(record) else []),
        *(f"{title} *" if name in equal else title for name, title in costs.items()),
    )


def _any_diverged(record: Record) -> bool:
    return any(arm.diverged for arm in record.arms.values())


def arm_rows(record: Record) -> list[Arm]:
    """Every arm with its mean and its mean costs.

    Args:
        record: of a run.
    """
    compared = {record.method: "method", record.baseline: "baseline"}
    rows = []
    for name, arm in record.arms.items():
        cost = record.cost[name]
        cells = (
            f"{arm.runs}",
            "" if arm.mean is None else f"{arm.mean:.4f}",
            *([f"{arm.diverged:.0%}"] if _any_diverged(record) else []),
            f"{cost.tokens:,}",
            f"{cost.flops / 1e9:,.0f}",
            f"{cost.parameters / 1e6:,.1f}",
            f"{cost.seconds:,.1f}",
            f"{cost.peak_bytes / 1e6:,.0f}",
        )
        rows.append(Arm(name, arm.what, compared.get(name, ""), cells))
    return rows


def price(record: Record) -> str:
    """What the method costs over its baseline, in a sentence.

    Args:
        record: of a run.
    """
    method, baseline = record.cost[record.method], record.cost[record.baseline]
    seconds = f"{method.seconds:,.1f} against {baseline.seconds:,.1f} s"
    parts = [
        f"{_times(method.seconds, baseline.seconds)} the time ({seconds})",
        f"{_times(method.peak_bytes, baseline.peak_bytes)} the peak memory",
        f"{_times(method.parameters, baseline.parameters)} the parameters that are not zero",
    ]
    return f"Beside its baseline the method took {', '.join(parts[:-1])}, and left {parts[-1]}."


def _times(a: float, b: float) -> str:
    return f"{a / b:.2f} times" if b else "an unknown multiple of"


@dataclass(frozen=True)
class SecondaryRow:
    """A comparison beside the primary one.

    Args:
        name: what it asks.
        arms: which is held against which.
        metric: of which values, and over how many runs.
        effect: larger = the method is better.
        interval: 95 %, not corrected.
        p: after Holm's correction.
        reads: which is better, by that p.
    """

    name: str
    arms: str
    metric: str
    effect: str
    interval: str
    p: str
    reads: str


def secondary_rows(record: Record) -> list[SecondaryRow]:
    """Every secondary comparison.

    Args:
        record: of a run.
    """
    rows = []
    for second in record.secondaries:
        shown = second.p_holm < 1 - LEVEL
        better = second.method if second.effect > 0 else second.baseline
        rows.append(
            SecondaryRow(
                name=second.name,
                arms=f"`{second.method}` against `{second.baseline}`",
                metric=f"{second.metric}, {second.runs} runs",
                effect=f"{second.effect:+.4f}",
                interval=f"{second.interval[0]:+.4f} to {second.interval[1]:+.4f}",
                p=_p(second.p_holm),
                reads=f"`{better}` is better" if shown else "no difference shown",
            )
        )
    return rows


def _p(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def pilot_sentence(record: Record) -> str:
    """How the number of runs came about.

    Args:
        record: of a run.
    """
    if record.pilot is None:
        return f"The number of runs, {record.units}, was given on the command line; there was no pilot."
    asked = (
        "found that no number of runs makes the interval as narrow as wanted"
        if record.pilot.asked is None
        else f"asked for {record.pilot.asked}"
    )
    return (
        f"A pilot of {record.pilot.runs} runs, on seeds of its own, {asked}; the time of the tier allows"
        f" {record.pilot.most}. {record.units} were run, and none was added after a look."
    )


def run_rows(record: Record) -> list[tuple[str, ...]]:
    """`(run, seed, baseline, method, difference)`: means over the units of each run that did not diverge.

    Args:
        record: of a run.
    """
    of_run = {(run.index, run.arm): run for run in record.runs if run.stage == "run"}
    sign = 1 if record.direction == "higher" else -1
    rows: list[tuple[str, ...]] = []
    for index in range(record.units):
        pair = [of_run[index, arm].outcome.values[record.metric] for arm in (record.baseline, record.method)]
        both = [unit for unit in pair[0] if pair[0][unit] is not None and pair[1].get(unit) is not None]
        baseline, method = (_mean([values[unit] for unit in both]) for values in pair)
        seed = str(of_run[index, record.method].seed)
        if baseline is None or method is None:
            rows.append((str(index + 1), seed, "diverged", "diverged", ""))
        else:
            rows.append(
                (str(index + 1), seed, f"{baseline:.4f}", f"{method:.4f}", f"{sign * (method - baseline):+.4f}")
            )
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    finite = [value for value in values if value is not None]
    return fmean(finite) if finite else None


def digest_of(evidence: Evidence) -> str:
    """SHA-256 of every choice, as it was registered.

    Args:
        evidence: with a claim.
    """
    if evidence.record is not None:
        return evidence.record.preregistration_digest
    return str(evidence.claim["digest"])
