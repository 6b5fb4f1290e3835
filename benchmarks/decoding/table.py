"""Tables of finished runs (JSON and Markdown): tokens per pass, then tokens per second."""

from __future__ import annotations

from statistics import geometric_mean, mean, median
from typing import Any

Run = dict[str, Any]
BASE = "greedy"
"""Stock `generate` without help; above temperature 0 it samples."""
CAPTURED = "captured"
"""The same with a static cache, its passes compiled into a CUDA graph."""
TIED = 1e-3
"""Where the target's two highest logits are closer, another text than stock greedy's is rounding."""
ALL = "geometric mean"
SHARES = ("drafting_share", "loop_share")
"""Of the time of a call: in the drafter, and in the loop outside drafter and model."""


def per_prompt(runs: list[Run], clock: str = "seconds") -> dict[tuple[str, str], dict[str, Any]]:
    """Return, for each (prompt, mode), the median tokens per second over repeats, and means of the counts."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run["prompt"], run["mode"]), []).append(run)
    return {
        key: {
            "kind": group[0]["kind"],
            "tokens_per_second": median(run["new_tokens"] / run[clock] for run in group),
            "tokens_per_pass": sum(run["new_tokens"] for run in group) / sum(run["row_passes"] for run in group),
            **{name: median(run[name] for run in group) for name in SHARES if name in group[0]},
            **{name: mean(run[name] for run in group) for name in ("agreement", "threshold") if name in group[0]},
            "gaps": group[0].get("gaps", []),
        }
        for key, group in groups.items()
    }


def results(runs: list[Run], clock: str = "seconds", base: str = BASE) -> dict[str, Any]:
    """Return, for each mode and kind of prompt, tokens a pass, tokens per second and the ratio to `base`.

    Of the prompts of a kind, tokens a pass are the mean, speed is the median, its ratio that of each prompt. `ALL` is
    the geometric mean over the kinds, and what is counted is summed: `differ`, the prompts whose text is not stock
    greedy's, and `unexplained`, those of them where the target's two highest logits are not nearly tied.
    """
    collected = per_prompt(runs, clock)
    kinds = list(dict.fromkeys(item["kind"] for item in collected.values()))
    table: dict[str, Any] = {}
    for mode in dict.fromkeys(mode for _, mode in collected):
        own = [
            (item, collected[name, base])
            for (name, m), item in collected.items()
            if m == mode and (name, base) in collected
        ]
        by_kind = {
            kind: {
                "tokens_per_pass": mean(item["tokens_per_pass"] for item, _ in pairs),
                "tokens_per_second": median(item["tokens_per_second"] for item, _ in pairs),
                "speed": median(item["tokens_per_second"] / other["tokens_per_second"] for item, other in pairs),
            }
            for kind in kinds
            if (pairs := [(item, base) for item, base in own if item["kind"] == kind])
        }
        if not by_kind:
            continue
        names = ("tokens_per_pass", "tokens_per_second", "speed")
        whole: dict[str, Any] = {name: geometric_mean(item[name] for item in by_kind.values()) for name in names}
        for name in (*SHARES, "agreement", "threshold"):
            values = [item[name] for item, _ in own if name in item]
            whole[name] = mean(values) if values else None
        gaps = [gap for item, _ in own for gap in item["gaps"]]
        whole |= {"differ": len(gaps), "unexplained": sum(gap >= TIED for gap in gaps)}
        table[mode] = {**by_kind, ALL: whole}
    return table


def markdown(table: dict[str, Any], batch: int, temperature: float, base: str = BASE) -> str:
    """Return the two tables as Markdown."""
    kinds = list(dict.fromkeys(kind for by_kind in table.values() for kind in by_kind if kind != ALL))
    what = f"batch {batch}, " + (f"temperature {temperature:g}" if temperature else "greedy")
    lossy = any(by_kind[ALL]["agreement"] is not None for by_kind in table.values())
    kept = ["other text"] * (not temperature) + ["agreement"] * lossy
    passes = _head(f"Tokens a pass, {what}", ["mode", *kinds, ALL, *kept])
    names = ["mode", *kinds, ALL, "tokens/s", "drafting", "loop"]
    speed = _head(f"Tokens per second over {base}'s, {what}", names)
    for mode, by_kind in table.items():
        whole = by_kind[ALL]
        cells = [_number(by_kind, kind, "tokens_per_pass") for kind in (*kinds, ALL)]
        if not temperature:
            cells.append(_other(whole))
        if lossy:
            share = whole["agreement"]
            cells.append("–" if share is None else f"{share:.1%} at {whole['threshold']:g}")
        passes.append(f"| {mode} | {' | '.join(cells)} |")
        cells = [_number(by_kind, kind, "speed") for kind in (*kinds, ALL)]
        cells += [f"{whole['tokens_per_second']:.1f}"]
        cells += ["–" if whole[name] is None else f"{whole[name]:.1%}" for name in SHARES]
        speed.append(f"| {mode} | {' | '.join(cells)} |")
    return "\n".join([*passes, "", *speed]) + "\n"


def _head(title: str, names: list[str]) -> list[str]:
    return [f"{title}:", "", f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]


def _number(by_kind: dict[str, Any], kind: str, name: str) -> str:
    return f"{by_kind[kind][name]:.2f}" if kind in by_kind else "–"


def _other(whole: dict[str, Any]) -> str:
    """Return how many prompts gave another text, and how many of these are not explained by near ties."""
    if whole["agreement"] is not None:
        return "–"
    if not whole["unexplained"]:
        return f"{whole['differ']}"
    return f"{whole['differ']}, {whole['unexplained']} not tied"
