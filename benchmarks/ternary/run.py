"""Ternary products from two-bit weights against dense products and the memory-bandwidth bound, on a CPU.

    python benchmarks/ternary/run.py                              # the named shapes, 1 to 16 rows, one and two threads
    python benchmarks/ternary/run.py --shapes 4096x4096 --rows 1,64,512 --threads 1 --seconds 20

A weight in->out times some rows of activations: from two bits with 8-bit activations (a full `linear`: quantizing,
product, scaling), from two bits with float activations, and in torch (`F.linear` in float32 and bfloat16, both also
with weights packed by oneDNN in advance, as in the verify loop; `_int_mm` for the bare integer product). All alternate
over copies of the weight that exceed the last-level cache, so each call reads its weight from memory. The byte bound is
the packed bytes over the best read bandwidth measured in the same rotation.

With one thread, times are the thread's CPU time, which other processes affect least; otherwise wall time. Reported is
the minimum over calls, with the medians in `results.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from intaglio import atomic_io
from intaglio.errors import IntaglioError
from intaglio.kernels import ternary
from intaglio.kernels.ternary_simd import instructions

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from bandwidth import CACHE, Call, in_turns  # noqa: E402
from machine import check_quiet, machine, title  # noqa: E402

SHAPES = ("576x1536", "1536x576", "4096x4096", "4096x14336", "14336x4096")


def variants(inputs: int, outputs: int, rows: int) -> dict[str, tuple[Call, int]]:
    """Return the calls to alternate, each with the bytes of its weight."""
    draws = torch.Generator().manual_seed(0)
    weight_OI = torch.randint(-1, 2, (outputs, inputs), generator=draws, dtype=torch.int8)
    x_BI = torch.randn(rows, inputs, generator=draws)
    q_BI, _ = ternary.quantize(x_BI)

    def over(
        weight: Tensor, call: Callable[[Tensor], Any], fresh: Callable[[Tensor], Tensor] = Tensor.clone
    ) -> tuple[Call, int]:
        copies = [fresh(weight) for _ in range(-(-CACHE // weight.nbytes))]
        return (lambda i: call(copies[i % len(copies)])), weight.nbytes

    def laid_out(weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight, 16)

    packed_OJ, results = ternary.pack(weight_OI), {}
    results["ternary"] = over(packed_OJ, lambda packed: ternary.linear(x_BI, packed, 1.7))
    results["ternary, float x"] = over(packed_OJ, lambda packed: ternary.linear(x_BI, packed, 1.7, bits=None))
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        dense, x = weight_OI.to(dtype), x_BI.to(dtype)
        results[name] = over(dense, lambda weight, x=x: F.linear(x, weight))
        few = F.pad(x, (0, 0, 0, max(0, 4 - rows)))
        results[f"{name}, laid out"] = over(
            dense,
            lambda weight, few=few: torch.ops.mkldnn._linear_pointwise(few, weight, None, "none", [], ""),
            laid_out,
        )
    results["int8"] = over(weight_OI, lambda weight: torch._int_mm(q_BI, weight.T))
    return results


def measure(shape: str, rows: int, threads: int, seconds: float) -> dict[str, Any]:
    """Alternate all calls for some seconds and return their times."""
    inputs, outputs = map(int, shape.split("x"))
    calls = variants(inputs, outputs, rows)
    times, turn, speed = in_turns({name: call for name, (call, _) in calls.items()}, threads, seconds)
    check_quiet(times["float32"], f"the dense product, {shape}, {rows} rows, {threads} threads")
    return {
        "shape": shape, "rows": rows, "threads": threads, "turns": turn, "read_gb_s": speed / 1e9,
        "bound_us": 1e6 * calls["ternary"][1] / speed,
        "least_us": {name: 1e6 * min(times[name]) for name in calls},
        "median_us": {name: 1e6 * median(times[name]) for name in calls},
    }  # fmt: skip


def markdown(runs: list[dict[str, Any]]) -> str:
    """Return the results as Markdown tables."""
    lines: list[str] = []
    for threads in dict.fromkeys(run["threads"] for run in runs):
        some = [run for run in runs if run["threads"] == threads]
        names = [name for name in some[0]["least_us"] if name != "ternary"]
        speed = median(run["read_gb_s"] for run in some)
        lines += [
            f"Threads: {threads}; memory read at {speed:.0f} GB/s. Microseconds of ours, then the others' over it:",
            "",
            f"| weight | rows | ternary µs | of the byte bound | {' | '.join(names)} |",
            "| --- " * (4 + len(names)) + "|",
        ]  # fmt: skip
        for run in some:
            ours = run["least_us"]["ternary"]
            others = " | ".join(f"{run['least_us'][name] / ours:.1f}" for name in names)
            lines.append(
                f"| {run['shape']} | {run['rows']} | {ours:.0f} | {100 * run['bound_us'] / ours:.0f} % | {others} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="inputs x outputs, comma-separated")
    parser.add_argument("--rows", default="1,4,8,16", help="rows of activations, comma-separated")
    parser.add_argument("--threads", default="1,2", help="comma-separated")
    parser.add_argument("--seconds", type=float, default=8.0, help="measuring time of each")
    parser.add_argument("--out", type=Path, default=HERE / "out", help="output directory")
    given = parser.parse_args()
    print(title(), flush=True)
    runs = []
    for threads in map(int, given.threads.split(",")):
        for shape in given.shapes.split(","):
            for rows in map(int, given.rows.split(",")):
                runs.append(measure(shape, rows, threads, given.seconds))
                print(json.dumps(runs[-1]), flush=True)
    kind, size = instructions()
    about = {"machine": machine(), "instructions": f"{kind}, {8 * size} bits"}
    atomic_io.write_text(given.out / "results.json", json.dumps({**about, "runs": runs}, indent=1) + "\n")
    atomic_io.write_text(given.out / "results.md", markdown(runs))
    print(markdown(runs))


if __name__ == "__main__":
    try:
        main()
    except IntaglioError as error:
        sys.exit(f"error: {error}")
