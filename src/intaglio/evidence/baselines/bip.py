"""Loops of pruning that `Classify` runs instead of the library's trainer: baselines of BiP.

- `iterative`: iterative magnitude pruning (Han et al., 2015): each round keeps 80 % of the remaining weights and
  retrains, with a cosine learning rate of its own.
- `hydra`: scores are learned on fixed weights, G = theta * g, then weights on a fixed mask (Sehwag et al., 2020).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from intaglio.data.images import Images
from intaglio.evidence.designs.classify import Classify, batches
from intaglio.methods.weights.bip import MaskedModel
from intaglio.methods.weights.bip.masked_model import masked, score_gradients, score_rate

ROUND = 0.8
"""The share of the remaining weights that a round of iterative magnitude pruning keeps."""
MOMENTUM, DECAY = 0.9, 1e-4
"""Of SGD on the weights, as in BiP's code."""


def iterative(
    net: nn.Module,
    images: Images,
    seed: int,
    design: Classify,
    *,
    keep: float,
    learning_rate: float,
    rewind: bool = False,
) -> int:
    """Prune a trained dense network in rounds that share `design.steps` passes; return their number.

    `keep` is the share of the weights kept; with `rewind` each round restarts from the dense network's weights.
    """
    model, data, targets = MaskedModel(net, 1 - keep, implicit=False), _batches(images, seed, design), rounds(keep)
    dense = {name: value.detach().clone() for name, value in net.state_dict().items()}
    for number, (target, steps) in enumerate(zip(targets, shares(design.steps, len(targets)), strict=True)):
        model.sparsity = 1 - target
        if number:
            with torch.no_grad():
                for name, score in model.scores.items():
                    score.copy_(masked(model.weights[name], model.masks[name]))
        model.refresh()
        if number and rewind:
            net.load_state_dict(dense)
        _retrain(net, data, steps, learning_rate)
    model.bake()
    return design.steps


def hydra(
    net: nn.Module, images: Images, seed: int, design: Classify, *, keep: float, learning_rate: float, lr_mask: float
) -> int:
    """Learn the scores of a trained dense network for half of the passes, then its weights; return the passes."""
    model, data = MaskedModel(net, 1 - keep, implicit=False), _batches(images, seed, design)
    scored = design.steps // 2
    for step in range(scored):
        with model.gradient_probe() as leaves:
            gradients = score_gradients(_loss(net, next(data)), leaves)
        model.learn(gradients, lr_mask * score_rate("step", step / scored))
    _retrain(net, data, design.steps - scored, learning_rate)
    model.bake()
    return design.steps


def _batches(images: Images, seed: int, design: Classify) -> Iterator[Any]:
    return iter(batches(images, design.batch_size, f"pruning order:{seed}"))


def _loss(net: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def _retrain(net: nn.Module, data: Iterator[Any], steps: int, learning_rate: float) -> None:
    """Train the weights under the mask."""
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    sgd = torch.optim.SGD(trained, lr=learning_rate, momentum=MOMENTUM, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, steps)
    for _ in range(steps):
        sgd.zero_grad()
        _loss(net, next(data)).backward()
        sgd.step()
        schedule.step()
    sgd.zero_grad()


def rounds(keep: float) -> list[float]:
    """Return the share kept after each round of iterative magnitude pruning: 0.8, 0.64, ..., `keep`."""
    count = max(1, math.ceil(math.log(keep) / math.log(ROUND) - 1e-9))
    return [max(keep, ROUND**number) for number in range(1, count)] + [keep]


def shares(passes: int, count: int) -> list[int]:
    """Return the passes of each round, as even as possible."""
    return [passes * (number + 1) // count - passes * number // count for number in range(count)]
