"""BiP's masks and steps against torch.nn.utils.prune with a retraining loop.

    python benchmarks/bip/run.py
    python benchmarks/bip/run.py --sizes small --repeats 1

Runs alternate in fresh processes. Writes medians and their ratios to `results.json` and `results.md`.
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

from intaglio import atomic_io

HERE = Path(__file__).resolve().parent
SIDES = ("ours", "ours-bip", "torch")
VALUES = ("weights", "kept", "ms", "mask_ms", "peak_bytes")

Run = dict[str, Any]


def _one(side: str, size: str, threads: int) -> Run:
    command = [sys.executable, str(HERE / "worker.py"), "--side", side, "--size", size, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the worker of {side} failed:\n{done.stderr[-2000:]}")
    results: Run = json.loads(done.stdout.splitlines()[-1])
    return results


def summary(runs: list[Run]) -> dict[str, Any]:
    """Return medians of each side by size."""
    return {
        size: {
            side: {
                name: median(run[name] for run in runs if (run["size"], run["side"]) == (size, side)) for name in VALUES
            }
            for side in SIDES
        }
        for size in dict.fromkeys(run["size"] for run in runs)
    }


def markdown(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| weights | side | kept | CPU ms per step | over torch | ms per mask | over torch | peak MiB | over torch |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for sides in results.values():
        peer = sides["torch"]
        for side, its in sides.items():
            lines.append(
                f"| {its['weights'] / 1e6:.1f}M | {side} | {its['kept']:.0f} | {its['ms']:.2f} | "
                f"{its['ms'] / peer['ms']:.2f} | {its['mask_ms']:.1f} | {its['mask_ms'] / peer['mask_ms']:.2f} | "
                f"{its['peak_bytes'] / 2**20:.0f} | {its['peak_bytes'] / peer['peak_bytes']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="BiP beside torch.nn.utils.prune.")
    parser.add_argument("--sizes", default="small,large", help="comma-separated; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "out")
    arguments = parser.parse_args()
    runs = []
    for size in arguments.sizes.split(","):
        for repeat in range(arguments.repeats):
            # Another one begins each time, so that none is always first.
            for side in (*SIDES[repeat % 3 :], *SIDES[: repeat % 3]):
                runs.append(_one(side, size, arguments.threads))
                print(f"{size} {side}: {runs[-1]['ms']:.2f} ms a step", file=sys.stderr)
    results = summary(runs)
    about = {"torch": torch.__version__, "threads": arguments.threads}
    arguments.out.mkdir(parents=True, exist_ok=True)
    atomic_io.write_json(arguments.out / "results.json", {"about": about, "summary": results, "runs": runs})
    atomic_io.write_text(arguments.out / "results.md", markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
