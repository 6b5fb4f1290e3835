"""Evaluate saved checkpoints of either side with the same code; prints one JSON line.

Dimension letters: N sequences, T tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import common
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM


@torch.inference_mode()
def perplexity(directory: Path, ids_NT: torch.Tensor, batch_size: int = 2) -> dict[str, Any]:
    """Return exp of the mean negative log-likelihood of tokens 2..T of every sequence, in float32, and the zeros."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for batch_NT in ids_NT.split(batch_size):
        logits_NTV = model(input_ids=batch_NT, use_cache=False).logits[:, :-1].float()
        target_NT = batch_NT[:, 1:]
        total += torch.nn.functional.cross_entropy(
            logits_NTV.reshape(-1, logits_NTV.shape[-1]), target_NT.reshape(-1), reduction="sum"
        ).item()
        count += target_NT.numel()
    return {"perplexity": math.exp(total / count), "tokens": count, **common.zeros(model)}


def agreement(element: Path, other: Path) -> dict[str, Any]:
    """Compare two pruned checkpoints of the same model entry by entry.

    Returns:
        `masks_differ`: the share of the projections' entries that are zero in exactly one of them; `weights_differ`:
        the norm of the difference of the projections over the norm of the first's; `others_equal`: whether all other
        tensors are equal bit for bit.
    """
    entries, unlike, distance, norm = 0, 0, 0.0, 0.0
    with (
        safe_open(element / "model.safetensors", "pt") as first,
        safe_open(other / "model.safetensors", "pt") as second,
    ):
        others_equal = set(first.keys()) == set(second.keys())
        for name in sorted(set(first.keys()) & set(second.keys())):
            a, b = first.get_tensor(name), second.get_tensor(name)
            if not name.endswith("_proj.weight"):
                others_equal = others_equal and torch.equal(a, b)
                continue
            a, b = a.double(), b.double()
            entries += a.numel()
            unlike += int(((a == 0) != (b == 0)).sum())
            distance += float((a - b).square().sum())
            norm += float(a.square().sum())
    differ = {"masks_differ": unlike / entries, "weights_differ": math.sqrt(distance / norm)}
    return {**differ, "others_equal": others_equal}


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity of checkpoints on the same held-out tokens.")
    parser.add_argument("--evaluation", type=Path, required=True, help="safetensors file with input_ids [N, T]")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="one or two checkpoint directories")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ids_NT = common.load_ids(arguments.evaluation)
    result: dict[str, Any] = {"checkpoints": [perplexity(path, ids_NT) for path in arguments.checkpoints]}
    if len(arguments.checkpoints) == 2:
        result |= agreement(*arguments.checkpoints)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
