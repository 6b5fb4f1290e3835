"""Model fingerprint: a hash over a few numbers of every parameter, to match heads to models.

The numbers are rounded to bfloat16 first, so a model loaded in bfloat16, float32 or float64 is the same model. Through
float16, whose smallest numbers are coarser and whose own rounding comes first, some numbers differ: a model loaded so
has another fingerprint, which `through` gives without loading it.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn

SAMPLES = 32
"""Numbers of each parameter that are hashed, evenly spaced."""


@torch.no_grad()
def fingerprint(model: nn.Module, through: torch.dtype | None = None) -> str:
    """Return 64 hexadecimal digits that identify a model's weights."""
    total = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        indices = torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat)), dtype=torch.float64).long()
        sample = flat[indices.to(flat.device)]
        if through is not None:
            sample = sample.to(through)
        sample = sample.to(torch.bfloat16).cpu().contiguous().view(torch.uint8)
        total.update(f"{name}:{list(parameter.shape)}:".encode())
        total.update(sample.numpy().tobytes())
    return total.hexdigest()
