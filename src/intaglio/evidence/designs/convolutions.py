"""Design that trains a convolutional classifier without norms and measures its spectrum: `ClassifyConvolutions`.

Three convolutions with circular padding and MaxMin activations, which keep lengths, and a linear head. Beside what
`Classify` measures: the spread of the convolutions' singular values at an image size that was not trained on, and the
accuracy under a projected gradient attack of three strengths, the same for every arm.

Dimension letters: N images, C channels, H and W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from intaglio.data.images import CLASSES, Images
from intaglio.evidence.designs.classify import Classify
from intaglio.evidence.engine.claim import Metric
from intaglio.measures.conv_spectrum import layer_spectra, spread

SPREAD = Metric("spread of singular values", "")
BUDGETS = (0.25, 0.5, 1.0)
"""L2 norms of an attack; pixels are from 0 to 1."""
ROBUST = tuple(Metric(f"accuracy at L2 {budget:g}", "points", "higher", continuous=False) for budget in BUDGETS)
ATTACK_STEPS = 10


class MaxMin(nn.Module):
    """Sorts pairs of channels, `(max(a, b), min(a, b))`: an activation that keeps lengths."""

    def forward(self, features: Tensor) -> Tensor:
        """Return features [N, C, ...] with each pair of channels sorted."""
        pairs = features.unflatten(1, (-1, 2))
        return pairs.sort(dim=2, descending=True).values.flatten(1, 2)


@dataclass(frozen=True)
class ClassifyConvolutions(Classify):
    """Train a convolutional network of `width` channels; a unit is a training seed."""

    width: int = 16
    steps: int = 400
    learning_rate: float = 3e-3
    measured_size: int = 32

    def _start(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return network(self.bed.shape[-1], self.width)

    def _recipe(self, steps: int, seed: int) -> dict[str, Any]:
        return {**super()._recipe(steps, seed), "optimizer": "adamw", "weight_decay": 0.0}

    def measure(self, net: nn.Module, images: Images) -> dict[str, float]:
        """Return accuracy, loss, accuracy under attack and the spread of the singular values."""
        values = super().measure(net, images)
        convolutions = nn.ModuleList([module for module in net.children() if isinstance(module, nn.Conv2d)])
        values[SPREAD.name] = spread(layer_spectra(convolutions, self.measured_size))
        for budget, metric in zip(BUDGETS, ROBUST, strict=True):
            logits = net(attacked(net, images, budget))
            values[metric.name] = 100 * float((logits.argmax(1) == images.true_N).double().mean())
        return values


def network(side: int, width: int) -> nn.Sequential:
    """Return three circular convolutions, the last of stride 2, and a linear head."""
    half = width // 2
    circular = {"padding": 1, "padding_mode": "circular"}
    return nn.Sequential(
        nn.Conv2d(1, half, 3, **circular), MaxMin(), nn.Conv2d(half, width, 3, **circular), MaxMin(),  # type: ignore[arg-type]
        nn.Conv2d(width, width, 3, stride=2, **circular), MaxMin(), nn.Flatten(),  # type: ignore[arg-type]
        nn.Linear(width * (side // 2) ** 2, CLASSES),
    )  # fmt: skip


def attacked(net: nn.Module, images: Images, budget: float) -> Tensor:
    """Return images moved by projected gradient ascent on their loss within an L2 ball, pixels kept from 0 to 1."""
    start, delta = images.pixels_NCHW, torch.zeros_like(images.pixels_NCHW)
    step = 2.5 * budget / ATTACK_STEPS
    for _ in range(ATTACK_STEPS):
        moved = (start + delta).requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(moved), images.true_N, reduction="sum"), moved)
        delta = delta + step * gradient / _norms(gradient)
        delta = delta * (budget / _norms(delta)).clamp(max=1)
        delta = (start + delta).clamp(0, 1) - start
    return (start + delta).detach()


def _norms(images: Tensor) -> Tensor:
    return images.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None, None]
