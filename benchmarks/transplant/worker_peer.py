"""mergekit's tokensurgeon in its own environment: codes targets, or transplants a checkpoint; one JSON line."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage

import torch
from safetensors.torch import load_file, save_file


def coded(arguments: argparse.Namespace) -> dict[str, float]:
    """Run its pursuit on tensors from disk, in the batches of its command."""
    from mergekit.tokensurgeon.omp import batch_omp

    given = load_file(arguments.tensors)
    batch_omp(given["targets"][:2], given["atoms"], 2)  # not counted
    begun = time.process_time()
    parts = [batch_omp(part, given["atoms"], arguments.k) for part in given["targets"].split(512)]
    seconds = time.process_time() - begun
    support, weight = (torch.cat([part[place] for part in parts]) for place in (0, 1))
    save_file({"support": support, "weight": weight}, arguments.out)
    return {"cpu_seconds": seconds, "peak_bytes": 1024 * getrusage(RUSAGE_SELF).ru_maxrss}


def whole(arguments: argparse.Namespace) -> dict[str, float]:
    """Run its command, from checkpoints to checkpoint."""
    command = Path(sys.executable).parent / "mergekit-tokensurgeon"
    options = ["-k", str(arguments.k), "-a", "omp", "--batch-size", "512"]
    subprocess.run([command, arguments.base, arguments.donor, arguments.out, *options], check=True, stdout=sys.stderr)
    used = getrusage(RUSAGE_CHILDREN)
    return {"cpu_seconds": used.ru_utime + used.ru_stime, "peak_bytes": 1024 * used.ru_maxrss}


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs the peer.")
    parser.add_argument("what", choices=("coded", "whole"))
    parser.add_argument("--k", type=int, required=True)
    parser.add_argument("--tensors", type=Path)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--donor", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(coded(arguments) if arguments.what == "coded" else whole(arguments)))


if __name__ == "__main__":
    main()
