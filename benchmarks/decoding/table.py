"""From finished runs to ratios of medians and the two tables (JSON and Markdown)."""

from __future__ import annotations

from statistics import mean, median
from typing import Any

Run = dict[str, Any]
BASE = "greedy"
SHARES = ("drafting_share", "loop_share")
"""Of the time of a call: in the drafter, and in the loop outside drafter and model."""


def per_prompt(runs: list[Run], clock: str = "seconds") -> dict[tuple[str, str], dict[str, Any]]:
    """Return, for each (prompt, mode), the median seconds over its repeats and what does not vary.

    Args:
        runs: lines of the journal.
        clock: `seconds` on the wall or `cpu_seconds`.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run["prompt"], run["mode"]), []).append(run)
    return {
        key: {
            "kind": group[0]["kind"],
            "repeats": len(group),
            "seconds": median(run[clock] for run in group),
            "tokens_per_pass": group[0]["new_tokens"] / group[0]["passes"],
            **{name: median(run[name] for run in group) if name in group[0] else None for name in SHARES},
            "ids": group[0]["ids"],
        }
        for key, group in groups.items()
    }


def results(runs: list[Run], clock: str = "seconds") -> dict[str, Any]:
    """Return, for each mode and kind of prompt, tokens a pass and the speed against stock greedy.

    The ratio of a prompt is that of its median seconds a token; a kind's is the median over its prompts. `differ`
    counts prompts whose text is not that of stock greedy (two logits that are nearly tied can change places).

    Args:
        runs: lines of the journal.
        clock: as `per_prompt`.
    """
    found = per_prompt(runs, clock)
    modes = list(dict.fromkeys(mode for _, mode in found))
    kinds = [*dict.fromkeys(one["kind"] for one in found.values()), "all"]
    table: dict[str, Any] = {}
    for mode in modes:
        table[mode] = {}
        for kind in kinds:
            names = [name for name, m in found if m == mode and kind in ("all", found[name, m]["kind"])]
            pairs = [(found[name, mode], found[name, BASE]) for name in names if (name, BASE) in found]
            if not pairs:
                continue
            shares = {name: [one[name] for one, _ in pairs if one[name] is not None] for name in SHARES}
            table[mode][kind] = {
                "prompts": len(pairs),
                "tokens_per_pass": mean(one["tokens_per_pass"] for one, _ in pairs),
                "speed": median(
                    (base["seconds"] / len(base["ids"])) / (one["seconds"] / len(one["ids"])) for one, base in pairs
                ),
                **{name: median(values) if values else None for name, values in shares.items()},
                "differ": sum(one["ids"] != base["ids"] for one, base in pairs),
            }
    return table


def markdown(table: dict[str, Any]) -> str:
    """Return the table for people.

    Args:
        table: from `results`.
    """
    kinds = list(next(iter(table.values())))
    lines = [
        f"| mode | {' | '.join(f'{kind}: tokens a pass' for kind in kinds)} | "
        f"{' | '.join(f'{kind}: speed' for kind in kinds)} | drafting | loop | other text |",
        f"| --- |{' --- |' * (2 * len(kinds) + 3)}",
    ]
    for mode, by_kind in table.items():
        rates = [f"{by_kind[kind]['tokens_per_pass']:.2f}" if kind in by_kind else "–" for kind in kinds]
        speeds = [f"{by_kind[kind]['speed']:.2f}" if kind in by_kind else "–" for kind in kinds]
        shares = ["–" if (share := by_kind["all"][name]) is None else f"{share:.1%}" for name in SHARES]
        lines.append(f"| {mode} | {' | '.join([*rates, *speeds, *shares])} | {by_kind['all']['differ']} |")
    return "\n".join(lines) + "\n"
