"""Our transplant: codes targets, or transplants a whole checkpoint; same options as the peer's worker."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import torch
from safetensors.torch import load_file, save_file


def coded(arguments: argparse.Namespace) -> dict[str, float]:
    """Run the pursuit on tensors from disk."""
    from intaglio.methods.weights.omp_transplant import omp

    given = load_file(arguments.tensors)
    omp(given["targets"][:2], given["atoms"], 2)  # not counted
    begun = time.process_time()
    results = omp(given["targets"], given["atoms"], arguments.k)
    seconds = time.process_time() - begun
    save_file({"support": results.support_TK, "weight": results.weight_TK}, arguments.out)
    return {"cpu_seconds": seconds, "peak_bytes": 1024 * getrusage(RUSAGE_SELF).ru_maxrss}


def whole(arguments: argparse.Namespace) -> dict[str, float]:
    """Run the transplant from checkpoints to checkpoint, imports included."""
    import intaglio

    checkpoint = intaglio.load(arguments.base)
    # Tokens are joined as the peer joins them, so that both have the same anchors.
    intaglio.OMPTransplant(donor=str(arguments.donor), k=arguments.k, join="strings").apply(checkpoint)
    checkpoint.save(arguments.out)
    return {"cpu_seconds": time.process_time(), "peak_bytes": 1024 * getrusage(RUSAGE_SELF).ru_maxrss}


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs ours.")
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
