"""Helpers of both workers and the judge; imports neither library, because it runs in both environments.

Dimension letters: N sequences, T tokens of a sequence.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

METHODS = ("magnitude", "wanda", "sparsegpt")
IDS = "input_ids"


def worker_arguments(description: str) -> argparse.Namespace:
    """Return the parsed command line of a worker."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory (safetensors)")
    parser.add_argument("--calibration", type=Path, required=True, help="safetensors file with input_ids [N, T]")
    parser.add_argument("--method", choices=METHODS, required=True)
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument("--sparsity", type=float, help="share of zeros, between 0 and 1")
    amount.add_argument("--pattern", help="N:M, N kept of every M consecutive inputs")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per forward pass")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--output", type=Path, help="where to save the pruned checkpoint (not timed); default: nowhere")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return arguments


def load_ids(path: Path) -> torch.Tensor:
    """Return the token ids [N, T] (int64) of a file."""
    return load_file(path)[IDS].long()


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return int(rest.split()[0])
    raise RuntimeError(f"/proc/self/status has no line {field}")


def resident_mib() -> float:
    """Return the resident memory of this process (after the imports: that of the libraries)."""
    return round(_status_kib("VmRSS") / 1024, 1)


def measure(call: Callable[[], object]) -> dict[str, float]:
    """Run `call` once and return its cost.

    The kernel's high-water mark of resident memory is reset right before the call (`/proc/self/clear_refs`, Linux
    only), so that neither loading the model nor imports count, except for what they still hold.

    Returns:
        `seconds` (wall), `cpu_seconds` (user and system, all threads), `before_mib` (resident before the call),
        `peak_mib` (highest resident during it).
    """
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_mib()
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    peak = _status_kib("VmHWM")
    return {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "before_mib": before,
        "peak_mib": round(peak / 1024, 1),
    }


def block_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linears that both sides must prune: every `nn.Linear` but the output head."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
            yield name, module


def zeros(model: nn.Module) -> dict[str, Any]:
    """Return how many linears a model has and the lowest, mean and highest share of zeros in one of them."""
    shares = [(module.weight == 0).double().mean().item() for _, module in block_linears(model)]
    return {
        "linears": len(shares),
        "zeros_lowest": min(shares),
        "zeros_mean": sum(shares) / len(shares),
        "zeros_highest": max(shares),
    }


def emit(result: dict[str, Any]) -> None:
    """Print one JSON line and flush it: the last line of a worker's standard output is its answer."""
    line = {**result, "torch": torch.__version__, "threads": torch.get_num_threads(), "load_average": os.getloadavg()}
    print(json.dumps(line), flush=True)
