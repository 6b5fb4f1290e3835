"""Records in the terminal: a cell, a sentence, and tables of the arms and their costs."""

from __future__ import annotations

import re

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from intaglio.evidence.engine.record import ArmSummary, Record, is_registered


def without(slug: str) -> str:
    """Return the evidence of a method without a record, for a table cell."""
    return "registered, not yet run" if is_registered(slug) else "no evidence yet"


def number(value: float | None) -> str:
    """Return a mean to four digits; "" where there is none."""
    return "" if value is None else f"{value:.4g}"


def signed(value: float) -> str:
    """Return an effect with its sign, to four places or, where it is smaller, to two digits."""
    return f"{value:+.4f}" if value == 0 or abs(value) >= 0.01 else f"{value:+.2g}"


def cell(record: Record) -> str:
    """Return verdict, effect and a better alternative in a few words: `worse: -0.06 bits; take SparseGPT`."""
    words = record.reading
    if record.effect is not None:
        number = f"{record.effect:+.1%}" if record.metric.relative else f"{record.effect:+.3g} {record.metric.unit}"
        words = f"{words}: {number.rstrip()}"
    better = record.verdict in ("holds", "smaller") or record.reading == "better, size open"
    return words if better else f"{words}; take {re.split('[,;] ', record.otherwise)[0]}"


def sentence(record: Record) -> str:
    """Return the verdict with its numbers and the advice, in words."""
    return f"{record.slug}: {record.reading}. The claim was: {record.says} {outcome(record)} {record.advice}"


def outcome(record: Record) -> str:
    """Return effect, interval and units, or why there are none."""
    if record.interval is None or record.effect is None:
        return f"{record.why[:1].upper()}{record.why[1:]}."
    low, high = map(signed, record.interval)
    inner = f" by {len(record.inner)} {record.unit_names[1]}s" if record.inner else ""
    return (
        f"Effect on {record.metric.name}: {signed(record.effect)}"
        f" {record.metric.unit}, {100 * record.level:g} % interval {low} to {high}, to pass {record.margin:+g}; larger"
        f" is better for the method. {record.units} units ({record.unit_names[0]}){inner}."
    )


def report(record: Record) -> Group:
    """Return all of a record: a line for each arm, the tables, the sentence."""
    legend = "\n".join(
        f"{name} ({arm.role}): {arm.what}{f' ({settings(arm)})' if arm.settings else ''}"
        for name, arm in record.arms.items()
    )
    return Group(Text(legend), arms(record), costs(record), Text(f"{record.parity}\n\n{sentence(record)}"))


def settings(arm: ArmSummary) -> str:
    """Return the tuned settings of an arm."""
    return ", ".join(f"{key}={value}" for key, value in arm.settings.items())


def lead(record: Record, arm: str) -> str:
    """Return how much better than the baseline an arm is on the same units; "" for the baseline itself."""
    gain = None if arm == record.baseline else record.gain(arm)
    return "" if gain is None else f"{gain:+.1%}" if record.metric.relative else signed(gain)


def arms(record: Record) -> Table:
    """Return a table of all arms with their lead over the baseline and the means of the metrics."""
    others = list(next(iter(record.arms.values())).metrics)
    diverged = any(arm.diverged for arm in record.arms.values())
    title = f"{record.metric.name}, {record.metric.unit}"
    table = _table(title, "mean", "better by", *others, *(["diverged"] if diverged else []))
    for name, arm in record.arms.items():
        table.add_row(
            name,
            number(arm.mean),
            lead(record, name),
            *(number(arm.metrics[other]) for other in others),
            *([f"{arm.diverged:.0%}"] if diverged else []),
            style=_style(arm),
        )
    return table


def costs(record: Record) -> Table:
    """Return a table of the mean cost of a unit of every arm."""
    table = _table("mean cost of a unit", "units", "tokens", "GFLOPs", "non-zero, M", "seconds", "peak, MB")
    for name, arm in record.arms.items():
        cost = arm.cost
        table.add_row(
            name,
            str(arm.units),
            f"{cost.tokens:,}",
            f"{cost.flops / 1e9:,.0f}",
            f"{cost.parameters / 1e6:,.1f}",
            f"{cost.seconds:,.1f}",
            f"{cost.peak_bytes / 1e6:,.0f}",
            style=_style(arm),
        )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    table.add_column("arm", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", min_width=6, overflow="fold")
    return table


def _style(arm: ArmSummary) -> str:
    return "bold" if arm.role in ("baseline", "method") else ""
