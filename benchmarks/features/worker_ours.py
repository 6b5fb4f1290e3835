"""TopK autoencoders by Intaglio on activations from disk, or dictionaries for the round trip; one JSON line."""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from intaglio.dictionaries.baselines import L1SAE, BatchTopKSAE, GatedSAE, JumpReLUSAE, TopKSAE
from intaglio.dictionaries.training import TrainingRun
from intaglio.measures.dictionaries import reconstruction
from intaglio.methods.activations.gba_sae import GBASAE

SIZES = {"width": 256, "tokens": 30_000, "batch_tokens": 256}
NEVER = 10_000_000
"""Activations after which a latent is dead: the peer's 1,000 steps do not pass here either."""
DICTIONARIES = {
    "l1": L1SAE(**SIZES),
    "topk": TopKSAE(k=16, **SIZES),
    "batch_topk": BatchTopKSAE(k=16, **SIZES),
    "jumprelu": JumpReLUSAE(l0=16.0, **SIZES),
    "gated": GatedSAE(**SIZES),
    "gba": GBASAE(adapt_every=2, **SIZES),
    "gba_relu": GBASAE(adapt_every=2, activation="relu", **SIZES),
}


def trained(arguments: argparse.Namespace) -> dict[str, float]:
    """Train on the batches in their order, and measure on the last rows."""
    x_ND = load_file(arguments.activations)["x"]
    training, held_out = x_ND[: -arguments.held_out], x_ND[-arguments.held_out :]
    batches = training.split(arguments.batch)[: arguments.steps]
    method = TopKSAE(
        width=arguments.width, k=arguments.k, batch_tokens=arguments.batch, tokens=len(training),
        learning_rate=arguments.rate, warmup=0, decay=0.0, dead_after=NEVER,
    )  # fmt: skip
    run = TrainingRun(method, training[:4096], 0, len(batches))
    run.update(batches[0])
    begun, cpu = time.perf_counter(), time.process_time()
    for batch in batches[1:]:
        run.update(batch)
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    (peak,) = re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())  # ru_maxrss includes the parent's
    measured = reconstruction(run.dictionary(), held_out)
    tokens = sum(map(len, batches[1:]))
    return {
        "tokens_per_s": tokens / seconds, "cpu_us_per_token": 1e6 * cpu / tokens, "fvu": measured.fvu,
        "l0": measured.l0, "peak_bytes": 1024 * int(peak),
    }  # fmt: skip


def saved(arguments: argparse.Namespace) -> dict[str, float]:
    """Train a dictionary of each kind, and save it with its codes and reconstructions."""
    x_ND = load_file(arguments.activations)["x"][:2048]
    shares = {}
    for name, method in DICTIONARIES.items():
        dictionary = method.fit_activations(x_ND).dictionary()
        dictionary.save(arguments.out / name, overwrite=True)
        codes = dictionary.encode(x_ND)
        save_file(
            {"x": x_ND, "codes": codes, "decoded": dictionary.decode(codes)}, arguments.out / f"{name}.safetensors"
        )
        shares[name] = float((codes != 0).float().mean())
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs Intaglio.")
    parser.add_argument("what", choices=("trained", "saved"))
    parser.add_argument("--activations", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    for name, default in {"width": 2048, "k": 32, "batch": 4096, "steps": 12, "held-out": 4096, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(json.dumps(trained(arguments) if arguments.what == "trained" else saved(arguments)))


if __name__ == "__main__":
    main()
