"""The cost of the training loop: `intaglio.train` against a bare loop and `transformers.Trainer`, alternated.

    python benchmarks/training/run.py                          # five repeats of each, small and large
    python benchmarks/training/run.py --repeats 1 --sizes small

Each training is a fresh process (`worker.py`). For time, a bare loop takes a step after each step of the measured loop,
and the median of the paired differences is reported, because two processes differ by more than the loops do. For
memory, each loop runs once more alone. Writes `results.json` and `results.md`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from intaglio import atomic_io

HERE = Path(__file__).resolve().parent
LOOPS = ("bare", "trainer", "ours")
MOST_MS, MOST_MEMORY = 1.5, 1.05
"""Targets: milliseconds a step above a bare loop at a million parameters; peak memory over Trainer's."""

TIMES = ("ms", "cpu_ms", "above_bare_ms", "cpu_above_bare_ms")
OTHERS = ("parameters", "peak_bytes", "loss")

Run = dict[str, Any]


def _one(loop: str, size: str, threads: int, between: bool) -> Run:
    command = [sys.executable, str(HERE / "worker.py"), "--loop", loop, "--size", size, "--threads", str(threads)]
    command += ["--between"] if between else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the worker of {loop} failed:\n{done.stderr[-2000:]}")
    results: Run = json.loads(done.stdout.splitlines()[-1])
    return results


def summary(runs: list[Run]) -> dict[str, Any]:
    """Return medians of each loop by size, and ours relative to the others."""
    results: dict[str, Any] = {}
    for size in dict.fromkeys(run["size"] for run in runs):
        loops = {}
        for loop in LOOPS:
            own = [run for run in runs if (run["size"], run["loop"]) == (size, loop)]
            loops[loop] = {name: median(run[name] for run in own if run["between"]) for name in TIMES}
            loops[loop] |= {name: median(run[name] for run in own if not run["between"]) for name in OTHERS}
        ours, trainer = loops["ours"], loops["trainer"]
        results[size] = {
            "loops": loops,
            "time over bare": ours["ms"] / (ours["ms"] - ours["above_bare_ms"]),
            "memory over trainer": ours["peak_bytes"] / trainer["peak_bytes"],
            "same loss": abs(ours["loss"] - loops["bare"]["loss"]) < 1e-3,
        }
    return results


def markdown(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| parameters | loop | ms per step | above bare | CPU ms above bare | peak MiB | last loss |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for item in results.values():
        for loop, its in item["loops"].items():
            lines.append(
                f"| {its['parameters'] / 1e6:.1f}M | {loop} | {its['ms']:.2f} | {its['above_bare_ms']:+.2f} | "
                f"{its['cpu_above_bare_ms']:+.2f} | {its['peak_bytes'] / 2**20:.0f} | {its['loss']:.4f} |"
            )
    for size, item in results.items():
        losses = "agree" if item["same loss"] else "DIFFER"
        lines += [
            "",
            f"{size}: ours takes {item['time over bare']:.3f} of a bare step's time and "
            f"{item['memory over trainer']:.3f} of Trainer's memory; the losses {losses}.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="What the training loop costs.")
    parser.add_argument("--sizes", default="small,large", help="comma-separated; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="of the times; default: %(default)s")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "out")
    arguments = parser.parse_args()
    runs = []
    for size in arguments.sizes.split(","):
        for repeat in range(arguments.repeats + 1):
            # Another one begins each time, so that none is always first.
            for loop in (*LOOPS[repeat % 3 :], *LOOPS[: repeat % 3]):
                runs.append(_one(loop, size, arguments.threads, between=repeat < arguments.repeats))
                print(f"{size} {loop}: {runs[-1]['ms']:.2f} ms a step", file=sys.stderr)
    results = summary(runs)
    about = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": arguments.threads}
    arguments.out.mkdir(parents=True, exist_ok=True)
    atomic_io.write_json(arguments.out / "results.json", {"about": about, "summary": results, "runs": runs})
    atomic_io.write_text(arguments.out / "results.md", markdown(results))
    print(markdown(results))
    for size, item in results.items():
        if size == "small":
            met = item["loops"]["ours"]["above_bare_ms"] <= MOST_MS
            print(f"at most {MOST_MS} ms above a bare loop at a million parameters: {'met' if met else 'MISSED'}")
        met = item["memory over trainer"] <= MOST_MEMORY
        print(f"{size}: at most {MOST_MEMORY} of Trainer's peak memory: {'met' if met else 'MISSED'}")


if __name__ == "__main__":
    main()
