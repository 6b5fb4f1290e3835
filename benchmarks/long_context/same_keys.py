"""Kept keys of our SnapKV against kvpress' with matching settings, on random Llama attention layers.

    python benchmarks/long_context/same_keys.py --peer-python PATH

kvpress pools the scores of the keys before its window alone and keeps the whole window, so settings match without
pooling (`kernel_size: 1`), with `recent` equal to `num_queries` and without sinks. With pooling, positions whose
neighbourhood reaches into the window may differ; their number is reported.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding, apply_rotary_pos_emb

from intaglio.methods.attention.sparse_frontier.cache import SnapKV

HERE = Path(__file__).resolve().parent
WIDTH, HEADS, GROUPS, HEAD_DIM, LENGTH = 96, 6, 2, 16, 700


def compare(python: Path, seed: int, window: int, kernel: int, budget: int) -> int:
    """Return the number of positions that only one side keeps."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=HEAD_DIM,
        max_position_embeddings=LENGTH,
    )
    module = LlamaAttention(config, 0).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    hidden = torch.randn(1, LENGTH, WIDTH)
    with torch.no_grad():
        shape = (1, LENGTH, -1, HEAD_DIM)
        query, key = (project(hidden).view(shape).transpose(1, 2) for project in (module.q_proj, module.k_proj))
        query, key = apply_rotary_pos_emb(query, key, *LlamaRotaryEmbedding(config)(hidden, torch.arange(LENGTH)[None]))
    policy = SnapKV(budget=budget, num_queries=window, kernel_size=kernel, sinks=0, recent=window)
    ours = policy.keep(query[0], key[0], module.scaling)
    assert ours is not None  # the budget is below the length
    sizes = {"width": WIDTH, "heads": HEADS, "groups": GROUPS, "head_dim": HEAD_DIM, "length": LENGTH}
    settings = {**sizes, "window": window, "kernel": kernel, "budget": budget}
    with tempfile.TemporaryDirectory() as folder:
        source, target = (Path(folder) / name for name in ("in.safetensors", "out.safetensors"))
        tensors = {f"weight.{name}": tensor for name, tensor in module.state_dict().items()}
        tensors |= {"hidden": hidden, "keys": key.contiguous()}
        save_file(tensors, source, {name: str(value) for name, value in settings.items()})
        subprocess.run([python, HERE / "worker_peer.py", source, target], check=True)
        theirs = load_file(target)["kept"]
    return sum(len(set(a.tolist()) ^ set(b.tolist())) // 2 for a, b in zip(ours, theirs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, required=True, help="python of an environment with kvpress")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    print("| window | kernel | kept of a head | differing positions |\n| --- | --- | --- | --- |")
    for window, kernel, budget in ((32, 1, 100), (64, 1, 350), (32, 5, 100), (64, 21, 350)):
        differ = [compare(given.peer_python, seed, window, kernel, budget) for seed in range(given.seeds)]
        print(f"| {window} | {kernel} | {budget} | {', '.join(map(str, differ))} |", flush=True)


if __name__ == "__main__":
    main()
