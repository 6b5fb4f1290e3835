"""Kept positions of kvpress' SnapKV, run in the peer's environment: `worker_peer.py INPUT OUTPUT`.

INPUT holds states of one attention layer (safetensors): hidden states, keys and the weights of a Llama attention;
OUTPUT the positions that the press keeps of each key-value head.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from kvpress import SnapKVPress
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding


def main(source: str, target: str) -> None:
    """Score the keys as the press does and save the positions with the highest scores."""
    tensors = load_file(source)
    with safe_open(source, "pt") as file:
        settings = {key: int(value) for key, value in file.metadata().items()}
    config = LlamaConfig(
        hidden_size=settings["width"],
        num_attention_heads=settings["heads"],
        num_key_value_heads=settings["groups"],
        head_dim=settings["head_dim"],
        max_position_embeddings=settings["length"],
        attn_implementation="sdpa",
    )
    module: Any = LlamaAttention(config, 0).eval()
    module.load_state_dict(
        {name.removeprefix("weight."): t for name, t in tensors.items() if name.startswith("weight.")}
    )
    module.rotary_emb = LlamaRotaryEmbedding(config)
    press = SnapKVPress(0.5, window_size=settings["window"], kernel_size=settings["kernel"])
    hidden, keys = tensors["hidden"], tensors["keys"]
    positions = torch.arange(hidden.shape[1])[None]
    with torch.no_grad():
        cos_sin = module.rotary_emb(hidden, positions)
        scores = press.score(module, hidden, keys, torch.zeros_like(keys), None, {"position_embeddings": cos_sin})
    kept = scores.topk(settings["budget"], dim=-1).indices.sort(-1).values
    save_file({"kept": kept[0].contiguous()}, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
