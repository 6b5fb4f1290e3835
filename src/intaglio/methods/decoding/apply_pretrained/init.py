"""Initial weights of the trained networks."""

from __future__ import annotations

import torch
from torch import nn

from intaglio.trainer.rng import generator


@torch.no_grad()
def draw_linears(layers: nn.Sequential, *key: int | str) -> None:
    """Draw the weights of linear layers from N(0, 1 / inputs), by a key, and set their biases to 0."""
    rng = generator(*key)
    for module in layers:
        if isinstance(module, nn.Linear):
            module.weight.normal_(0, module.in_features**-0.5, generator=rng)
            module.bias.zero_()
