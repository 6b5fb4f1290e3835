"""Mixing pairs of rows of a batch: rates, pairs, inputs of images, embeddings of texts.

    x' = l x + (1 - l) x[pairs]         l ~ Beta(alpha, alpha)

Texts are mixed at their embeddings, inside the forward pass: see `ModifierSession`.

Dimension letters: B rows, T tokens, C channels, H and W pixels, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from intaglio.trainer.protocols import Batch

PIXELS = "pixel_values"


def beta_rate(alpha: float, rng: torch.Generator) -> float:
    """Draw a rate from Beta(alpha, alpha), by two gamma variates; 1 where alpha is 0."""
    if alpha == 0:
        return 1.0
    shape = torch.full((2,), alpha, dtype=torch.float64)
    first, second = torch._standard_gamma(shape, generator=rng).tolist()
    return first / (first + second) if first + second else 1.0


def pairs_of(rows: int, rng: torch.Generator) -> Tensor:
    """Draw the partner of each row, a permutation, int64 [B]."""
    return torch.randperm(rows, generator=rng)


def mix(values: Tensor, rate: float, pairs_B: Tensor) -> Tensor:
    """Return `rate * values + (1 - rate) * values[pairs]` along the first dimension."""
    if rate == 1:
        return values
    return rate * values + (1 - rate) * values[pairs_B.to(values.device)]


def mix_inputs(batch: Batch, rate: float, pairs_B: Tensor) -> Batch:
    """Return the inputs of a batch mixed: pixels, or attention masks that cover both texts of a pair."""
    if rate == 1:
        return batch
    if PIXELS in batch:
        return {**batch, PIXELS: mix(batch[PIXELS], rate, pairs_B)}
    mask_BT = batch["attention_mask"]
    return {**batch, "attention_mask": torch.maximum(mask_BT, mask_BT[pairs_B.to(mask_BT.device)])}


@contextmanager
def mixed_embeddings(model: Any, batch: Batch, rate: float, pairs_B: Tensor) -> Iterator[None]:
    """Mix the token embeddings of texts in every pass inside the context; does nothing to images."""
    if PIXELS in batch or rate == 1:
        yield
        return

    def mixed(module: nn.Module, args: Any, output_BTD: Tensor) -> Tensor:
        return mix(output_BTD, rate, pairs_B)

    handle = model.get_input_embeddings().register_forward_hook(mixed)
    try:
        yield
    finally:
        handle.remove()
