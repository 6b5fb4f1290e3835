"""The cost of a LOST training step against SLTrain's formulation, a low-rank pair and the dense model.

    python benchmarks/lost/run.py                         # three rounds at two widths
    python benchmarks/lost/run.py --widths 256 --repeats 1

Each training is a fresh process (`worker.py`); variants alternate, starting with another one each round. The low-rank
variants have the same number of parameters. Writes `out/results.json` and `out/results.md`.
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
from worker import WAYS

from intaglio import atomic_io

HERE = Path(__file__).resolve().parent
NUMBERS = ("step_ms", "cpu_ms", "decode_ms", "peak_bytes", "parameters", "block_parameters")
NAMES = {
    "full": "full rank",
    "low-rank": "low-rank pair",
    "lost": "LOST",
    "sltrain": "SLTrain",
    "sltrain-kept": "SLTrain, matrix kept",
}

Run = dict[str, Any]


def run_worker(way: str, width: int, arguments: argparse.Namespace) -> Run:
    """Run one worker."""
    command = [sys.executable, str(HERE / "worker.py"), "--way", way, "--width", str(width)]
    for name in ("depth", "steps", "threads", "device"):
        command += [f"--{name}", str(getattr(arguments, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the worker of {way} failed:\n{done.stderr[-2000:]}")
    results: Run = json.loads(done.stdout.splitlines()[-1])
    return results | {"width": width}


def markdown(runs: list[Run]) -> str:
    """Return the medians as a Markdown table."""
    lines = [
        "| width | way | block parameters | step ms | CPU ms | over full | decode ms | peak MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for width in dict.fromkeys(run["width"] for run in runs):
        summary = {}
        for way in WAYS:
            own = [run for run in runs if (run["width"], run["way"]) == (width, way)]
            summary[way] = {name: median(run[name] for run in own) for name in NUMBERS}
        for way, its in summary.items():
            lines.append(
                f"| {width} | {NAMES[way]} | {its['block_parameters'] / 1e6:.2f}M | {its['step_ms']:.0f} | "
                f"{its['cpu_ms']:.0f} | {its['cpu_ms'] / summary['full']['cpu_ms']:.2f} | {its['decode_ms']:.2f} | "
                f"{its['peak_bytes'] / 2**20:.0f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="What a training step of LOST costs.")
    parser.add_argument("--widths", default="256,512", help="comma-separated; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    arguments = parser.parse_args()
    runs = []
    for width in map(int, arguments.widths.split(",")):
        for repeat in range(arguments.repeats):
            start = repeat % len(WAYS)
            for way in (*WAYS[start:], *WAYS[:start]):
                runs.append(run_worker(way, width, arguments))
                print(f"{width} {way}: {runs[-1]['cpu_ms']:.0f} ms", file=sys.stderr)
    about = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": arguments.threads}
    arguments.out.mkdir(parents=True, exist_ok=True)
    atomic_io.write_json(arguments.out / "results.json", {"about": about, "runs": runs})
    atomic_io.write_text(arguments.out / "results.md", markdown(runs))
    print(markdown(runs))


if __name__ == "__main__":
    main()
