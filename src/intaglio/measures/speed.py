"""Prefill and decode tokens per second, batch 1, the model's own forward and cache."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from intaglio.checkpoint import Checkpoint
from intaglio.masks import predicts_next
from intaglio.modeling.anatomy import CACHE, anatomy

PREFILL = 256
DECODE = 24
WARM = 2
"""Steps of the warm-up: enough to use every weight in both shapes."""
REPEATS = 3


@dataclass(frozen=True)
class Speed:
    """Tokens per second of a prefill of `PREFILL` tokens (at most the context) and of greedy decoding after it."""

    prefill: float
    decode: float | None


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def speed(checkpoint: Checkpoint, repeats: int = REPEATS) -> Speed:
    """Time the model: a short warm-up, then the median of `repeats`."""
    model, device = checkpoint.model, checkpoint.device
    causal = predicts_next(anatomy(model))
    length = max(2, min(PREFILL, checkpoint.context - DECODE - 1))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(checkpoint.vocabulary, (1, length), generator=generator).to(device)
    options = {"use_cache": True, "logits_to_keep": 1} if causal else {}
    prefill, decode = [], []
    for steps in (WARM, *[DECODE] * repeats):
        start = _now(device)
        output = model(input_ids=ids, **options)
        middle = _now(device)
        if causal:
            cache = {CACHE: output[CACHE]}
            token = output.logits[:, -1:].argmax(-1)
            for _ in range(steps):
                output = model(input_ids=token, use_cache=True, **cache)
                token = output.logits[:, -1:].argmax(-1)
        end = _now(device)
        prefill.append(length / (middle - start))
        decode.append(steps / (end - middle))
    del prefill[0], decode[0]
    return Speed(statistics.median(prefill), statistics.median(decode) if causal else None)
