"""Small labelled images and networks that tests of mixing share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from intaglio.checkpoint import Checkpoint
from intaglio.trainer import train
from intaglio.trainer.classification import Classification

IMAGES = [
    {"pixel_values": torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(n)) + n % 3, "label": n % 3}
    for n in range(12)
]
"""Images of three classes, float32 [1, 4, 4]."""


def image_network() -> nn.Sequential:
    """A convolution and a linear layer, with weights of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def trained(method: Any, **more: Any) -> Any:
    """Weights and log of four steps with a modifier."""
    net = image_network()
    arguments: dict[str, Any] = {"steps": 4, "batch_size": 4, "log_every": 1, "learning_rate": 0.01, **more}
    result = train(Checkpoint(net), IMAGES, objective=Classification(), modifiers=[method], **arguments)
    return dict(net.state_dict()), [entry.parts for entry in result.history]
