"""Medians, ratios and tables (JSON and Markdown) of finished runs."""

from __future__ import annotations

from statistics import median
from typing import Any

TIME_TARGET = 1.05
MEMORY_TARGET = 1.05
PERPLEXITY_TARGET = 0.005
SIDES = ("ours", "peer")

Run = dict[str, Any]


def side(runs: list[Run]) -> dict[str, Any]:
    """Return medians and extremes of one side's runs of one variant."""
    seconds = [run["seconds"] for run in runs]
    return {
        "library": runs[0]["library"],
        "batch_size": runs[0]["batch_size"],
        "repeats": len(runs),
        "seconds": median(seconds),
        "seconds_range": [min(seconds), max(seconds)],
        "cpu_seconds": median(run["cpu_seconds"] for run in runs),
        "imports_mib": median(run["imports_mib"] for run in runs),
        "before_mib": median(run["before_mib"] for run in runs),
        "peak_mib": median(run["peak_mib"] for run in runs),
        "zeros": runs[0]["zeros_mean"],
    }


def summary(variant: str, runs: list[Run], judged: Run | None) -> dict[str, Any]:
    """Return a variant's row: both sides, ratios of ours to the peer's, and the targets met."""
    row: dict[str, Any] = {"variant": variant}
    for name in SIDES:
        mine = [run for run in runs if run["side"] == name]
        if mine and "unsupported" in mine[0]:
            row[name] = {"library": mine[0]["library"], "unsupported": mine[0]["unsupported"]}
        elif mine:
            row[name] = side(mine)
    names = [name for name in SIDES if "seconds" in row.get(name, {})]
    if judged:
        for name, checkpoint in zip(names, judged["checkpoints"], strict=True):
            row[name]["perplexity"] = checkpoint["perplexity"]
        row |= {key: judged[key] for key in ("masks_differ", "weights_differ", "others_equal") if key in judged}
    if len(names) == len(SIDES):
        row |= _ratios(row["ours"], row["peer"])
    return row


def _ratios(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    time, memory = ours["seconds"] / peer["seconds"], ours["peak_mib"] / peer["peak_mib"]
    # The peer imports more libraries than it needs for this; without them the ratio says what the algorithm takes.
    own, theirs = (item["peak_mib"] - item["imports_mib"] for item in (ours, peer))
    collected: dict[str, Any] = {
        "time_ratio": time,
        "cpu_time_ratio": ours["cpu_seconds"] / peer["cpu_seconds"],
        "memory_ratio": memory,
        "memory_ratio_without_imports": own / theirs,
        # A target that was not measured is not met: it must not vanish from the list of those missed.
        "meets": {"time": time <= TIME_TARGET, "memory": memory <= MEMORY_TARGET, "perplexity": False},
    }
    if "perplexity" in ours and "perplexity" in peer:
        collected["perplexity_change"] = ours["perplexity"] / peer["perplexity"] - 1
        collected["meets"]["perplexity"] = collected["perplexity_change"] <= PERPLEXITY_TARGET
    return collected


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [row["variant"]]
    for name in SIDES:
        item = row.get(name, {})
        if "seconds" in item:
            cells += [f"{item['seconds']:.1f}", f"{item['peak_mib']:.0f} ({item['before_mib']:.0f})"]
            cells.append(f"{item['perplexity']:.3f}" if "perplexity" in item else "-")
        else:
            cells += ["-", "-", "-"]
    if "time_ratio" not in row:
        return [*cells, "-", "-", "-", "-", "-"]
    change = f"{100 * row['perplexity_change']:+.2f} %" if "perplexity_change" in row else "-"
    differ = f"{100 * row['masks_differ']:.2f} %" if "masks_differ" in row else "-"
    return [
        *cells,
        f"{row['time_ratio']:.2f}",
        f"{row['memory_ratio']:.2f}",
        f"{row['memory_ratio_without_imports']:.2f}",
        change,
        differ,
    ]


def markdown(results: dict[str, Any]) -> str:
    """Return the results as a Markdown page."""
    rows, settings = results["variants"], results["settings"]
    head = ["variant", "ours s", "ours MiB", "ours ppl", "peer s", "peer MiB", "peer ppl"]
    head += ["time", "memory", "without imports", "perplexity", "masks differ"]
    lines = [
        "# Pruning: ours against llmcompressor",
        "",
        f"{settings['samples']} x {settings['length']} tokens of calibration, {settings['threads']} threads, float32, "
        f"CPU. Medians of {settings['repeats']}, runs alternated in fresh processes. Seconds: the pruning call alone. "
        "MiB: highest resident memory during it (before it). Ratios: ours over peer; memory also without what imports "
        f"hold. Dense perplexity {results['dense_perplexity']:.3f} on {settings['held_out']} x {settings['length']} "
        "held-out tokens.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
        *("| " + " | ".join(_cells(row)) + " |" for row in rows),
        "",
    ]
    refused = [row for row in rows if "unsupported" in row.get("peer", {})]
    lines += [f"- {row['variant']}: {row['peer']['unsupported']}" for row in refused]
    missed = [
        f"{row['variant']} ({', '.join(name for name, met in row['meets'].items() if not met)})"
        for row in rows
        if not all(row.get("meets", {}).values())
    ]
    lines.append(
        f"- Targets: time and memory at most {TIME_TARGET} of the peer's, perplexity at most "
        f"{100 * PERPLEXITY_TARGET:.1f} % above it. Missed: {'; '.join(missed) or 'none'}."
    )
    return "\n".join(lines) + "\n"
