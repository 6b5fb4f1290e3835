"""A claim and its record as text and table rows."""

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
NO_VERDICT = {"none": "no evidence yet", "registered": "registered, not yet run"}
NATS = "nats a token"


@dataclass(frozen=True)
class Evidence:
    """The claim of a method as registered before its first run, and the record of the run, where they exist."""

    slug: str
    registration: Mapping[str, Any] | None
    record: Record | None

    @property
    def state(self) -> State:
        """Whether there is no claim, a claim that was not run, or a run."""
        if self.record is not None:
            return "run"
        return "none" if self.registration is None else "registered"

    @property
    def word(self) -> str:
        """The verdict, or why there is none."""
        return self.record.verdict if self.record is not None else NO_VERDICT[self.state]

    @property
    def stale(self) -> tuple[str, ...]:
        """The modules that changed since the run."""
        return () if self.record is None else stale_parts(self.record)

    @property
    def claim(self) -> Mapping[str, Any]:
        """The registered choices, from the record if there is one."""
        claim = self.registration if self.record is None else self.record.preregistration
        assert claim is not None
        return claim

    @property
    def command(self) -> str:
        """The command that makes the record."""
        if self.record is not None:
            return self.record.command
        return f"intaglio prove {self.slug} --tier {self.claim['tier']}"


def load_evidence(slug: str) -> Evidence:
    """Return a method's committed evidence."""
    return Evidence(slug, preregistered(slug), shipped(slug))


def short(evidence: Evidence) -> str:
    """Return the verdict with its numbers, for a table cell."""
    record = evidence.record
    if record is None:
        return evidence.word
    low, high = record.interval
    return (
        f"**{record.verdict}**: {record.metric} {record.effect:+.4f} ({low:+.4f} to {high:+.4f}), "
        f"threshold {threshold(record.delta, record.kind)}"
    )


def threshold(delta: float, kind: str) -> str:
    """Return the value that the whole interval must exceed for a claim of `kind` (`better` or `as good as`)."""
    return f"{delta if kind == 'better' else -delta:+g}"


def claim_rows(claim: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the choices that were fixed before the first run, as (name, text)."""
    arms, rules = claim["arms"], claim["rules"]
    run, unit = (*claim["factors"], "")[:2]  # where runs are independent there is no other factor
    design = {
        "independent": f"one value per {run}",
        "clustered": f"{unit}s nested in each {run}, in varying numbers",
        "crossed": f"{claim['units']} {unit}s crossed with each {run}",
    }[claim["design"]]
    few = claim.get("secondary_runs")
    first = f"; arms used only by secondary comparisons run in the first {few}" if few else ""
    tuning = claim.get("tuning")
    kind = "better by more than" if claim["kind"] == "better" else "worse by no more than"
    rows = [
        ("Method", f"`{claim['method']}`: {arms[claim['method']]}"),
        ("Baseline", f"`{claim['baseline']}`: {arms[claim['baseline']]}"),
        ("Metric", f"{claim['metric']}, {claim['unit']}; {claim['direction']} is better"),
        ("Smallest effect that matters", f"{kind} {claim['delta']:g} {claim['unit']}"),
        ("Pairing", design),
        ("Held equal", claim["parity"]),
        (
            "Number of runs",
            f"set by a pilot of {claim['pilot_runs']} runs on other seeds, between {rules['least runs']} and "
            f"{claim['most_runs']}{first}",
        ),
        ("Needs", {"cpu": "a CPU", "gpu": "a GPU"}[claim["tier"]]),
    ]
    if tuning:
        tried = {arm: ", ".join(f"`{choice}`" for choice in choices) for arm, choices in tuning["choices"].items()}
        trials = f"each on validation data, in {tuning['runs']} runs on separate seeds"
        rows.append(("Tuned", f"{'; '.join(f'`{arm}`: {choices}' for arm, choices in tried.items())}; {trials}"))
    return rows + ([("Rationale", claim["why"])] if claim["why"] else [])


def settings_rows(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return settings as (path, text), nested mappings flattened."""
    rows: list[tuple[str, str]] = []
    for name, value in settings.items():
        path = f"{prefix}, {name}" if prefix else name
        if isinstance(value, Mapping) and all(not isinstance(v, Mapping) for v in value.values()):
            rows.append((path, ", ".join(f"{k} = {v}" for k, v in value.items() if v is not None)))
        elif isinstance(value, Mapping):
            rows += settings_rows(value, path)
        else:
            rows.append((path, str(value)))
    return rows


def effects_plot(record: Record) -> str:
    """Return an SVG of the effects with their intervals, in the page's colours."""
    return plot.effects(record, alone=False)


def sentence(record: Record) -> str:
    """Return the verdict as the command line prints it, without the claim, which the page shows above it."""
    text = summary.sentence(record).removeprefix(f"{record.slug}: ").replace(f" {record.claim}", "")
    return text[0].upper() + text[1:]


def in_perplexity(record: Record) -> str:
    """Return an effect on log-perplexity as a change of perplexity in percent; "" for any other metric."""
    if record.unit != NATS or record.direction != "lower":
        return ""
    middle, least, most = (100 * math.expm1(-value) for value in (record.effect, *record.interval))
    return f"{middle:+.1f} % perplexity (95 % interval {most:+.1f} to {least:+.1f} %)"


@dataclass(frozen=True)
class Arm:
    """A row of the table of arms; `compared` is `method`, `baseline` or "", `cells` are ordered as `arm_columns`."""

    name: str
    what: str
    compared: str
    cells: tuple[str, ...]


def arm_columns(record: Record) -> tuple[str, ...]:
    """Return the column titles of the table of arms; a star marks a cost that is equal by design."""
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
    """Return every arm with its mean metric and mean costs."""
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


def cost_sentence(record: Record) -> str:
    """Return the method's cost relative to its baseline."""
    method, baseline = record.cost[record.method], record.cost[record.baseline]
    seconds = f"{method.seconds:,.1f} against {baseline.seconds:,.1f} s"
    parts = (
        f"{_times(method.seconds, baseline.seconds)} the time ({seconds})",
        f"{_times(method.peak_bytes, baseline.peak_bytes)} the peak memory",
        f"{_times(method.parameters, baseline.parameters)} the non-zero parameters",
    )
    return f"Relative to its baseline the method used {parts[0]}, {parts[1]} and {parts[2]}."


def _times(a: float, b: float) -> str:
    return f"{a / b:.2f} times" if b else "an unknown multiple of"


@dataclass(frozen=True)
class SecondaryRow:
    """A secondary comparison as text; a larger effect favours the first arm, p is Holm-corrected."""

    name: str
    arms: str
    metric: str
    effect: str
    interval: str
    p: str
    result: str


def tuned_rows(record: Record) -> list[tuple[str, str, str, str]]:
    """Return (arm, choice, mean on validation data, "chosen" or "") in the order of registration."""
    rows = []
    for arm, choices in record.preregistration.get("tuning", {}).get("choices", {}).items():
        tuned = record.tuned[arm]
        for choice, what in choices.items():
            mean = tuned.means[choice]
            text = "diverged" if mean is None else f"{mean:.4f}"
            rows.append((arm, f"{choice}: {what}", text, "chosen" if choice == tuned.chosen else ""))
    return rows


def secondary_rows(record: Record) -> list[SecondaryRow]:
    """Return the secondary comparisons."""
    rows = []
    for second in record.secondaries:
        significant = second.p_holm < 1 - LEVEL
        better = second.method if second.effect > 0 else second.baseline
        rows.append(
            SecondaryRow(
                name=second.name,
                arms=f"`{second.method}` against `{second.baseline}`",
                metric=f"{second.metric}, {second.runs} runs",
                effect=summary.signed(second.effect),
                interval=" to ".join(summary.signed(end) for end in second.interval),
                p=_p(second.p_holm),
                result=f"`{better}` is better" if significant else "no significant difference",
            )
        )
    return rows


def _p(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def pilot_sentence(record: Record) -> str:
    """Return how the number of runs was chosen."""
    if record.pilot is None:
        return f"The number of runs, {record.units}, was given on the command line; there was no pilot."
    required = (
        "no number of runs would make the interval narrow enough"
        if record.pilot.asked is None
        else f"{record.pilot.asked} runs are needed"
    )
    return (
        f"A pilot of {record.pilot.runs} runs on separate seeds showed that {required}; the time budget allows"
        f" {record.pilot.most}. {record.units} were run; none were added after seeing results."
    )


def run_rows(record: Record) -> list[tuple[str, ...]]:
    """Return (run, seed, baseline, method, difference): means over the units of each run that did not diverge."""
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
    """Return the SHA-256 of the registered choices."""
    if evidence.record is not None:
        return evidence.record.preregistration_digest
    return str(evidence.claim["digest"])
