"""A claim and its record as text and table rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from intaglio.evidence.engine import plot, tables
from intaglio.evidence.engine.claim import Claim, describe
from intaglio.evidence.engine.record import Record, committed, is_registered, is_stale
from intaglio.evidence.engine.registration import load_claim

State = Literal["none", "registered", "run"]
NO_VERDICT = {"none": "no evidence yet", "registered": "registered, not yet run"}
NATS = "nats a token"


@dataclass(frozen=True)
class Evidence:
    """The registered claim of a method and the record of its run, where they exist."""

    slug: str
    claim: Claim | None
    record: Record | None

    @property
    def state(self) -> State:
        """Whether there is no claim, a claim that was not run, or a run."""
        return "run" if self.record is not None else "none" if self.claim is None else "registered"

    @property
    def word(self) -> str:
        """The verdict, or why there is none."""
        return self.record.reading if self.record is not None else NO_VERDICT[self.state]

    @property
    def stale(self) -> bool:
        """Whether the record is of another version of the claim."""
        return self.record is not None and self.claim is not None and is_stale(self.record, self.claim)


def load_evidence(slug: str) -> Evidence:
    """Return a method's committed evidence."""
    return Evidence(slug, load_claim(slug) if is_registered(slug) else None, committed(slug))


def short(evidence: Evidence) -> str:
    """Return verdict, effect and a better alternative, for a table cell."""
    if evidence.record is None:
        return evidence.word
    verdict = evidence.record.reading
    text = f"**{verdict}**{tables.cell(evidence.record).removeprefix(verdict)}"
    return f"{text} (version {evidence.record.version}; its successor is not yet run)" if evidence.stale else text


def claim_rows(claim: Claim) -> list[tuple[str, str]]:
    """Return the choices that are fixed before a run, as (name, text)."""
    unit = " crossed with each ".join(reversed(claim.unit_names)) if claim.crossed else claim.unit_names[0]
    better = "better by more than" if claim.kind == "better" else "worse by no more than"
    delta = f"{claim.delta:.3g} of the baseline" if claim.metric.relative else f"{claim.delta:g} {claim.metric.unit}"
    rows = [
        ("Method", f"`{claim.method}`: {claim.arms[claim.method].what}"),
        ("Baseline", f"`{claim.baseline}`: {claim.arms[claim.baseline].what}"),
        ("Metric", f"{claim.metric.name}, {claim.metric.unit}; {claim.metric.better} is better"),
        ("Smallest effect that matters", f"{better} {delta}"),
        ("A unit is", f"a {unit}"),
        ("Looks", f"after {', '.join(map(str, claim.looks))} units"),
        ("Held equal", claim.parity),
        ("Needs", {"cpu": "a CPU", "gpu": "a GPU"}[claim.tier] + f", at most {claim.minutes:g} core-minutes"),
    ]
    for name, what in (("ceiling", claim.ceiling), ("floor", claim.floor)):
        if what is not None:
            rows.insert(2, (name.capitalize(), f"`{what}`: {claim.arms[what].what}"))
    tuned = {arm: claim.grid(arm) for arm in (claim.baseline, claim.method) if claim.grid(arm)}
    grids = [f"`{arm}`: {', '.join(f'{k} in {list(v)}' for k, v in grid.items())}" for arm, grid in tuned.items()]
    rows += [("Tuned", "; ".join(grids) + "; on validation data")] if grids else []
    return rows + ([("Reason for this version", claim.reason)] if claim.reason else [])


def settings_rows(claim: Claim) -> list[tuple[str, str]]:
    """Return the design and the settings of each arm, as (name, text)."""
    arms = [(f"arm {name}", str(describe(arm.settings))) for name, arm in claim.arms.items() if arm.settings]
    return [("design", str(describe(claim.design))), *arms]


def effects_plot(record: Record) -> str:
    """Return an SVG of the effect with its interval, in the page's colours."""
    return plot.effects(record, alone=False)


def in_perplexity(record: Record) -> str:
    """Return an effect on log-perplexity as a change of perplexity in percent; "" for any other metric."""
    metric = record.metric
    if (metric.unit, metric.better, metric.relative) != (NATS, "lower", False) or record.interval is None:
        return ""
    middle, least, most = (100 * math.expm1(-value) for value in (record.effect or 0.0, *record.interval))
    return f"{middle:+.1f} % perplexity ({100 * record.level:g} % interval {most:+.1f} to {least:+.1f} %)"


@dataclass(frozen=True)
class Row:
    """An arm in the table of arms; `cells` are ordered as `arm_columns`."""

    name: str
    what: str
    role: str
    settings: str
    cells: tuple[str, ...]


def arm_columns(record: Record) -> tuple[str, ...]:
    """Return the column titles of the table of arms."""
    others = next(iter(record.arms.values())).metrics
    return ("units", record.metric.name, "better by", *(["diverged"] if _diverged(record) else []), *others,
            "tokens", "GFLOPs", "non-zero, M", "s", "peak, MB")  # fmt: skip


def _diverged(record: Record) -> bool:
    return any(arm.diverged for arm in record.arms.values())


def arm_rows(record: Record) -> list[Row]:
    """Return every arm with its tuned settings, means and mean costs."""
    rows = []
    for name, arm in record.arms.items():
        cost = arm.cost
        cells = (
            f"{arm.units}",
            _number(arm.mean),
            tables.lead(record, name),
            *([f"{arm.diverged:.0%}"] if _diverged(record) else []),
            *(_number(value) for value in arm.metrics.values()),
            f"{cost.tokens:,}",
            f"{cost.flops / 1e9:,.0f}",
            f"{cost.parameters / 1e6:,.1f}",
            f"{cost.seconds:,.1f}",
            f"{cost.peak_bytes / 1e6:,.0f}",
        )
        rows.append(Row(name, arm.what, arm.role, tables.settings(arm), cells))
    return rows


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def cost_sentence(record: Record) -> str:
    """Return the method's cost relative to its baseline."""
    method, baseline = record.arms[record.method].cost, record.arms[record.baseline].cost
    parts = [
        f"{a / b:.2f} times the {what}"
        for a, b, what in (
            (method.seconds, baseline.seconds, f"time ({method.seconds:,.1f} against {baseline.seconds:,.1f} s)"),
            (method.peak_bytes, baseline.peak_bytes, "peak memory"),
            (method.parameters, baseline.parameters, "non-zero parameters"),
        )
        if b
    ]
    return f"Relative to its baseline, a unit of the method took {', '.join(parts)}." if parts else ""


def tuned_rows(record: Record) -> list[tuple[str, str, str, str]]:
    """Return (arm, settings, mean on validation data, "chosen" or "")."""
    rows = []
    for arm, trials in record.tuning.items():
        for trial in trials:
            text = ", ".join(f"{name}={value}" for name, value in trial["settings"].items())
            chosen = "chosen" if trial["settings"] == record.arms[arm].settings else ""
            rows.append((arm, text, "diverged" if trial["mean"] is None else f"{trial['mean']:.4f}", chosen))
    return rows


def look_rows(record: Record) -> list[tuple[str, ...]]:
    """Return (units, level, effect, interval, verdict) of each look."""
    return [
        (str(look.units), f"{100 * look.level:g} %", tables.signed(look.effect),
         " to ".join(map(tables.signed, look.interval)), look.verdict)
        for look in record.looks
    ]  # fmt: skip


def unit_rows(record: Record) -> list[tuple[str, str, str]]:
    """Return (unit, baseline, method): means of the primary metric."""
    columns = [record.values[record.metric.name][arm] for arm in (record.baseline, record.method)]
    pairs = zip(*columns, strict=True)
    return [(str(n), *(_number(v) or "diverged" for v in pair)) for n, pair in enumerate(pairs)]  # type: ignore[misc]
