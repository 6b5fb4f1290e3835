"""sae_lens in its own environment: trains on activations from disk, or reads dictionaries; one JSON line."""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import torch
from sae_lens import SAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file


def trained(arguments: argparse.Namespace) -> dict[str, float]:
    """Train on the batches in their order, and measure on the last rows."""
    x_ND = load_file(arguments.activations)["x"]
    training, held_out = x_ND[: -arguments.held_out], x_ND[-arguments.held_out :]
    batches = training.split(arguments.batch)[: arguments.steps]
    torch.manual_seed(0)
    config = TopKTrainingSAEConfig(
        d_in=x_ND.shape[1], d_sae=arguments.width, k=arguments.k, use_sparse_activations=False,
        normalize_activations="none", decoder_init_norm=1.0,
    )  # fmt: skip
    sae = TopKTrainingSAE(config)
    settings = SAETrainerConfig(
        total_training_samples=sum(map(len, batches)), train_batch_size_samples=arguments.batch,
        lr=arguments.rate, lr_end=arguments.rate,
    )  # fmt: skip
    trainer = SAETrainer(cfg=settings, sae=sae, data_provider=iter(batches))
    trainer.step(batches[0])
    trainer.n_training_steps += 1
    begun, cpu = time.perf_counter(), time.process_time()
    for batch in batches[1:]:
        trainer.step(batch)
        trainer.n_training_steps += 1
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    (peak,) = re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())  # ru_maxrss includes the parent's
    with torch.no_grad():
        decoded = torch.cat([sae(part) for part in held_out.split(1024)])
    fvu = (held_out - decoded).square().sum() / (held_out - held_out.mean(0)).square().sum()
    tokens = sum(map(len, batches[1:]))
    return {
        "tokens_per_s": tokens / seconds, "cpu_us_per_token": 1e6 * cpu / tokens, "fvu": float(fvu),
        "l0": float(arguments.k), "peak_bytes": 1024 * int(peak),
    }  # fmt: skip


def read(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Load every saved dictionary, and compare codes and reconstructions."""
    results = {}
    for file in sorted(arguments.out.glob("*.safetensors")):
        expected = load_file(file)
        sae = SAE.load_from_disk(arguments.out / file.stem)
        with torch.no_grad():
            codes = sae.encode(expected["x"])
            decoded = sae.decode(codes)
        codes = codes.to_dense() if codes.is_sparse else codes
        results[file.stem] = {
            "architecture": sae.cfg.architecture(),
            "codes": float((codes - expected["codes"]).abs().max()),
            "decoded": float((decoded - expected["decoded"]).abs().max()),
            "highest": float(expected["codes"].max()),
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs the peer.")
    parser.add_argument("what", choices=("trained", "read"))
    parser.add_argument("--activations", type=Path)
    parser.add_argument("--out", type=Path)
    for name, default in {"width": 2048, "k": 32, "batch": 4096, "steps": 12, "held-out": 4096, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(json.dumps(trained(arguments) if arguments.what == "trained" else read(arguments)))


if __name__ == "__main__":
    main()
