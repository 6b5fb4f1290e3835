"""Grouped-query SDPA attention over trees, without a copy of keys and values for each query head.

Under a mask transformers repeats the keys and values of grouped heads before it calls SDPA. On a CPU SDPA reads the
groups directly, with or without a mask, with bit-identical results, so the copy is useless: in a pass of SmolLM2 over
16 tokens after 1,500 it takes longer than the attention itself. The function here leaves it out; it is in use only
during the cached model's own passes.

Dimension letters: B rows, H query heads, G key heads, Q query positions, K key positions, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from intaglio.modeling.anatomy import attention, blocks

NAME = "intaglio_grouped_sdpa"
_UNDERSTOOD = frozenset({"sliding_window", "position_ids", "use_cache", "output_attentions", "is_causal"})
"""Further arguments that a mask already accounts for, or that change nothing; any other goes to stock code."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute stock `sdpa_attention_forward`; for grouped heads under a mask on a CPU, without repeated keys.

    Shapes: query [B, H, Q, D], key and value [B, G, K, D], mask [B, 1, Q, K] or None.
    """
    used = {name for name, value_ in more.items() if value_ is not None and value_ is not False}
    grouped = key.shape[1] < query.shape[1] and query.device.type == "cpu"
    if attention_mask is None or not grouped or used - _UNDERSTOOD:
        stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
        result: tuple[Tensor, Tensor | None] = stock(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
        return result
    attended_BHQD = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=True
    )
    return attended_BHQD.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def configs(model: nn.Module, device: torch.device) -> list[Any]:
    """Return the configurations to switch during a pass: those of SDPA layers with grouped heads, on a CPU."""
    if device.type != "cpu":
        return []
    unique = {id(c): c for block in blocks(model) if (c := getattr(attention(block), "config", None)) is not None}
    return [
        config
        for config in unique.values()
        if config._attn_implementation in ("sdpa", NAME)
        and (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) < config.num_attention_heads
    ]


@contextmanager
def grouped(configs: list[Any]) -> Iterator[None]:
    """Switch configurations to `attend` during a pass; another thread may be in a pass of the same model."""
    for config in configs:
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for config in configs:
            config._attn_implementation = "sdpa"
