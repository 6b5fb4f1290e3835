"""A Llama forward pass in plain tensor algebra, as a reference for methods that change what a model sees.

Dimension letters: B rows, L tokens, S cached or inserted positions, D width, H heads, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.families import HEAD_DIM, HEADS, KV_HEADS


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def rotated(x_BHLD: Tensor, start: int, theta: float) -> Tensor:
    """Turn each pair (i, i + D/2) of position t by the angle t theta^(-2i/D)."""
    half = HEAD_DIM // 2
    rates = theta ** (-torch.arange(half, dtype=x_BHLD.dtype) * 2 / HEAD_DIM)
    angles = (start + torch.arange(x_BHLD.shape[2]))[:, None] * rates
    a, b = x_BHLD[..., :half], x_BHLD[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0, seen: Tensor | None = None) -> Tensor:
    """Softmax attention [B, H, L, D]; by default the last L keys are causal, those before them are seen by all."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    length, earlier = q.shape[2], k.shape[2] - q.shape[2]
    if seen is None:
        seen = torch.cat([torch.ones(length, earlier), torch.ones(length, length).tril()], 1).bool()
    scores = (q @ k.mT / math.sqrt(q.shape[-1]) + bias).masked_fill(~seen, -math.inf)
    return scores.softmax(-1) @ v


def llama(
    model: Any,
    x: Tensor,
    start: int = 0,
    past: list[Tensor] | None = None,
    slots: dict[int, Any] | None = None,
    seen: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Normed last hidden states, hidden states after each block, and each block's own keys and values.

    Args:
        model: a `LlamaForCausalLM`.
        x: input embeddings [B, L, D].
        start: position of the first token.
        past: earlier keys and values, those of each block in turn.
        slots: state [B, S, D] and bias [S] of the blocks that have inserted positions.
        seen: visible keys [L, L] instead of the causal ones.
    """
    eps, theta = model.config.rms_norm_eps, model.config.rope_parameters["rope_theta"]
    hidden, own = [], []
    for number, block in enumerate(model.model.layers):
        a, n = block.self_attn, F.rms_norm(x, x.shape[-1:], block.input_layernorm.weight, eps)
        q = rotated(heads(n @ a.q_proj.weight.T, HEADS), start, theta)
        k = rotated(heads(n @ a.k_proj.weight.T, KV_HEADS), start, theta)
        v, bias = heads(n @ a.v_proj.weight.T, KV_HEADS), torch.zeros(x.shape[1], dtype=x.dtype)
        own += [k, v]
        if past:
            k, v = torch.cat([past[2 * number], k], 2), torch.cat([past[2 * number + 1], v], 2)
            bias = F.pad(bias, (past[0].shape[2], 0))
        if slots and number in slots:
            state, slot_bias = slots[number]
            k = torch.cat([heads(state @ a.k_proj.weight.T, KV_HEADS), k], 2)
            v = torch.cat([heads(state @ a.v_proj.weight.T, KV_HEADS), v], 2)
            bias = torch.cat([slot_bias, bias])
        x = x + attend(q, k, v, bias, seen).transpose(1, 2).flatten(2) @ a.o_proj.weight.T
        n, m = F.rms_norm(x, x.shape[-1:], block.post_attention_layernorm.weight, eps), block.mlp
        x = x + (F.silu(n @ m.gate_proj.weight.T) * (n @ m.up_proj.weight.T)) @ m.down_proj.weight.T
        hidden.append(x)
    return F.rms_norm(x, x.shape[-1:], model.model.norm.weight, eps), hidden, own
