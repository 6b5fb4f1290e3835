"""Which model heads belong to: a hash over a few numbers of every parameter, cheap enough for every run.

The numbers are rounded to bfloat16 first, so a model loaded in bfloat16, float32 or float64 is the same model. Through
float16, whose smallest numbers are coarser and whose own rounding comes first, some numbers end elsewhere: a model
loaded so has another fingerprint, which `through` gives without loading it.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn

SAMPLES = 32
"""Numbers taken of each parameter, evenly spaced."""


@torch.no_grad()
def fingerprint(model: nn.Module, through: torch.dtype | None = None) -> str:
    """Return 64 hexadecimal digits that another model, or the same one carved or trained since, does not share.

    Args:
        model: a model with its parameters.
        through: a precision that the numbers are rounded to before: what a model loaded in it has. Default: none.
    """
    total = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        places = torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat)), dtype=torch.float64).long()
        found = flat[places.to(flat.device)]
        if through is not None:
            found = found.to(through)
        found = found.to(torch.bfloat16).cpu().contiguous().view(torch.uint8)
        total.update(f"{name}:{list(parameter.shape)}:".encode())
        total.update(found.numpy().tobytes())
    return total.hexdigest()
