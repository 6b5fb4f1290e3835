"""What a record says, for the terminal: one sentence, and a table of arms with their costs."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from intaglio.evidence.record import Record, preregistered

MEANS = {
    "holds": "the interval lies above what matters",
    "fails": "the interval lies below what matters",
    "underpowered": "the interval is too wide to say anything: no evidence",
    "inconclusive": "the interval is narrow, but what matters lies inside it",
}
FAILED_TO_FINISH = "too many of the method's units diverged"


ASKED = ("claim", "kind", "metric", "unit", "tier", "delta", "effect", "interval", "units", "sizes", "made", "renewed")


def document(record: Record) -> dict[str, Any]:
    """The answer without its raw values, as JSON.

    Args:
        record: of a run.
    """
    return record.model_dump(mode="json", include=set(ASKED))


def without(slug: str) -> str:
    """What there is to say of a method that has no record.

    Args:
        slug: of the method.
    """
    if (claim := preregistered(slug)) is None:
        return "none; its claim was not stated as an experiment yet."
    return f"not yet run. {claim['claim']} `intaglio prove {slug}` runs it."


def signed(value: float) -> str:
    """An effect with its sign, to four places or, where it is smaller, to two digits.

    Args:
        value: in the metric's unit.
    """
    return f"{value:+.4f}" if value == 0 or abs(value) >= 0.01 else f"{value:+.2g}"


def sentence(record: Record) -> str:
    """The verdict with its numbers, in words.

    Args:
        record: of a run.
    """
    margin = record.delta if record.kind == "better" else -record.delta
    why = MEANS[record.verdict]
    if record.verdict == "fails" and record.interval[1] >= margin:
        why = FAILED_TO_FINISH
    low, high = record.interval
    return (
        f"{record.slug}: {record.verdict} ({why}). {record.claim} Effect on {record.metric}: {record.effect:+.4f}"
        f" {record.unit}, 95 % interval {low:+.4f} to {high:+.4f}, to pass {margin:+g}; larger is better for the"
        f" method. {_counted(record)}"
    )


def _counted(record: Record) -> str:
    factors = [f"{count} {name}{'' if count == 1 else 's'}" for name, count in record.sizes.items() if name != "pairs"]
    limit = ""
    if record.pilot and (record.pilot.asked is None or record.pilot.asked > record.pilot.most):
        asked = "no number of them suffices" if record.pilot.asked is None else f"asked for {record.pilot.asked}"
        limit = f"; by the pilot {asked}, the tier's time allows {record.pilot.most}"
    return f"{record.sizes['pairs']} pairs: {', '.join(factors)}{limit}."


def legend(record: Record) -> str:
    """What each arm is, a line each.

    Args:
        record: of a run.
    """
    return "\n".join(f"{name}: {arm.what}" for name, arm in record.arms.items())


def arms(record: Record) -> Table:
    """Every arm: its mean, and the mean cost of a run.

    Args:
        record: of a run.
    """
    diverged = any(arm.diverged for arm in record.arms.values())
    costs = ("tokens", "GFLOPs", "non-zero, M", "s", "peak, MB")
    title = f"{record.metric}, {record.unit}"
    table = Table(
        "arm", "mean", *(["diverged"] if diverged else []), *costs, title=title, caption=record.parity, box=SIMPLE_HEAD
    )
    for column in table.columns[1:]:
        column.justify = "right"
    table.columns[0].no_wrap = True
    for name, arm in record.arms.items():
        cost = record.cost[name]
        table.add_row(
            name,
            "" if arm.mean is None else f"{arm.mean:.4f}",
            *([f"{arm.diverged:.0%}"] if diverged else []),
            f"{cost.tokens:,}",
            f"{cost.flops / 1e9:,.0f}",
            f"{cost.parameters / 1e6:,.1f}",
            f"{cost.seconds:,.1f}",
            f"{cost.peak_bytes / 1e6:,.0f}",
            style="bold" if name in (record.baseline, record.method) else "",
        )
    return table


def secondaries(record: Record) -> Table:
    """The comparisons beside the primary one.

    Args:
        record: of a run.
    """
    table = Table(
        "secondary", "runs", "effect", "95 % interval", "p (Holm)",
        caption="larger is better for the method", box=SIMPLE_HEAD,
    )  # fmt: skip
    for second in record.secondaries:
        low, high = second.interval
        table.add_row(
            second.name,
            str(second.runs),
            signed(second.effect),
            f"{signed(low)} to {signed(high)}",
            f"{second.p_holm:.2g}",
        )
    return table
