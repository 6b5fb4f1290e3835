"""Stock SDPA attention over trees, without copying keys and values once for each head that shares them.

Under a mask transformers repeats the keys and values of grouped heads before it calls SDPA. On a CPU SDPA reads the
groups as they are, mask or none, with the same bits as the outcome, so that the copy is for nothing: in a pass of
SmolLM2 over 16 tokens behind 1,500 it takes longer than the attention itself. The function here leaves it out; it is in
use during the reader's own passes alone.

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
"""Further arguments that a mask already accounts for, or that say nothing here; with any other, stock code decides."""


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
    """Stock `sdpa_attention_forward`; where grouped heads meet a mask on a CPU, the same without repeated keys.

    Args:
        module: the attention module.
        query: [B, H, Q, D].
        key: [B, G, K, D].
        value: [B, G, K, D].
        attention_mask: [B, 1, Q, K], or None.
        dropout: of the weights.
        scaling: of the scores. Default: 1 / sqrt(D).
        **more: what the model hands on beside that.
    """
    given = {name for name, found in more.items() if found is not None and found is not False}
    grouped = key.shape[1] < query.shape[1] and query.device.type == "cpu"
    if attention_mask is None or not grouped or given - _UNDERSTOOD:
        stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
        found: tuple[Tensor, Tensor | None] = stock(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
        return found
    seen_BHQD = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=True
    )
    return seen_BHQD.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def configs(model: nn.Module, device: torch.device) -> list[Any]:
    """The configurations to switch during a pass: those of SDPA layers with grouped heads, on a CPU; else none.

    Args:
        model: a causal language model.
        device: where it is.
    """
    if device.type != "cpu":
        return []
    found = {id(c): c for block in blocks(model) if (c := getattr(attention(block), "config", None)) is not None}
    return [
        config
        for config in found.values()
        if config._attn_implementation in ("sdpa", NAME)
        and (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) < config.num_attention_heads
    ]


@contextmanager
def grouped(configs: list[Any]) -> Iterator[None]:
    """Let layers attend by groups for the time of a pass.

    Args:
        configs: from `configs`; another thread may be in a pass of the same model.
    """
    for config in configs:
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for config in configs:
            config._attn_implementation = "sdpa"
