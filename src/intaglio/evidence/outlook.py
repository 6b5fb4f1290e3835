"""What it would take to decide a claim that a run left open, by the spread that the run saw."""

from __future__ import annotations

from intaglio.evidence.experiment import TARGET
from intaglio.evidence.record import Record
from intaglio.evidence.run import paired
from intaglio.evidence.statistics import larger

OPEN = ("underpowered", "inconclusive")


def outlook(record: Record) -> str:
    """A few sentences; "" where the verdict is a decision, or no number of runs within reason would make one.

    Args:
        record: of a run.
    """
    if record.verdict not in OPEN:
        return ""
    found = larger(record.design, paired(record).rows, record.delta)
    if found is None:
        return ""
    run, *unit = record.preregistration["factors"]
    half = TARGET * record.delta
    width = (record.interval[1] - record.interval[0]) / 2
    seconds = sum(record.cost[arm].seconds for arm in (record.baseline, record.method)) * record.units
    times = found.runs / record.units
    size = f"{found.runs:,} {run}s" + (f" over {found.units:,} {unit[0]}s" if found.units else "")
    sentences = [
        f"The interval reaches {width:.3g} {record.unit} to either side; {half:.3g} was aimed at.",
        f"By the spread of this run that would take about {size}, {times:.0f} times as much, and"
        f" {_duration(times * seconds)} of the two arms' own work in the place of {_duration(seconds)}.",
    ]
    if found.of_runs is not None and found.of_units is not None:
        sentences.insert(
            1,
            f"Of the variance behind it {100 * found.of_runs:.0f} % comes from which {run}s there were and"
            f" {100 * found.of_units:.0f} % from which {unit[0]}s.",
        )
    return " ".join(sentences)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.0f} hours"
