"""Design that trains an image classifier and measures its accuracy: `Classify`.

Settings of an arm, all optional: `train`, a function `(net, images, seed, design, **settings) -> passes` that replaces
the library's trainer, for baselines with a loop of their own, and takes `design.steps` passes; `modifiers`, training
modifiers; `share` of the design's steps, and `passes` that a step counts as, both 1 by default; names of `RECIPE`;
everything else is a field of the modifiers, or an argument of `train`.

Dimension letters: N images, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from intaglio.checkpoint import Checkpoint
from intaglio.data.images import CLASSES, Images
from intaglio.evidence.designs.base import Configured, Settings
from intaglio.evidence.designs.training import RECIPE
from intaglio.evidence.engine.claim import Arm, Cost, Metric, Result, RunKey
from intaglio.evidence.testbeds.digits import Digits
from intaglio.evidence.testbeds.splits import generator
from intaglio.measures.memory import peak_memory
from intaglio.trainer import train
from intaglio.trainer.classification import Classification

ACCURACY = Metric("accuracy", "points", "higher", continuous=False)
TEST_LOSS = Metric("negative log-likelihood", "nats")


@dataclass(frozen=True)
class Classify:
    """Train a perceptron on images, from dense weights after `dense_steps` if any; a unit is a training seed."""

    bed: Digits = field(default_factory=Digits)
    width: int = 48
    steps: int = 750
    batch_size: int = 32
    learning_rate: float = 0.1
    dense_steps: int = 0

    def run(self, arm: Arm, key: RunKey, settings: Settings) -> Result:
        """Train an arm on a unit and measure it."""
        own, seed = Configured(arm, settings), key.seed
        images, measured = self.bed.training(seed), self.bed.images(key.split, key.base)
        net = self._start(seed)
        loop, count = own.pop("train"), own.pop("passes", 1)
        budget = dataclasses.replace(self, steps=round(self.steps * own.pop("share", 1.0)))
        with peak_memory(torch.device("cpu")) as spent:
            if loop is not None:
                passes = loop(net, images, seed, design=budget, **own.arguments(loop))
            else:
                recipe = {**self._recipe(-(-budget.steps // count), seed), **own.pop_all(RECIPE)}
                modifiers = [own.fill(modifier) for modifier in own.pop("modifiers", ())]
                own.check()
                passes = count * train_classifier(net, images, recipe, modifiers)
        parameters = sum(int(p.count_nonzero()) for p in net.parameters())
        flops = float(passes * self.batch_size * self.pass_flops(net))
        cost = Cost(passes * self.batch_size, flops, parameters, spent.seconds, spent.bytes)
        parity = {"training": images.digest, "images": measured.digest}
        return Result(self.measure(net, measured), cost, parity)

    def measure(self, net: nn.Module, images: Images) -> dict[str, float]:
        """Return the metrics of a trained network."""
        loss, accuracy = evaluate(net, images)
        return {ACCURACY.name: accuracy, TEST_LOSS.name: loss}

    def pass_flops(self, net: nn.Module) -> int:
        """Return the operations of a forward and backward pass of one image."""
        return pass_flops(net)

    def _start(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = mlp(self.bed.side, self.width)
        if self.dense_steps:
            net.load_state_dict(_dense(self, seed))
        return net

    def _recipe(self, steps: int, seed: int) -> dict[str, Any]:
        return {"steps": steps, "batch_size": self.batch_size, "learning_rate": self.learning_rate,
                "optimizer": "sgd", "weight_decay": 5e-4, "seed": seed}  # fmt: skip

    def toy(self, **changes: Any) -> Classify:
        """Return the design with a small network and few steps."""
        sizes = {"width": 16, "steps": 20, "dense_steps": min(self.dense_steps, 20)}
        return dataclasses.replace(self, bed=self.bed.toy(), **{**sizes, **changes})


@lru_cache(maxsize=4)
def _dense(design: Classify, seed: int) -> Mapping[str, Tensor]:
    """Return the weights that all arms of a unit start from."""
    net = dataclasses.replace(design, dense_steps=0)._start(seed)
    train_classifier(net, design.bed.training(seed), design._recipe(design.dense_steps, seed))
    return net.state_dict()


def train_classifier(net: nn.Module, images: Images, recipe: Mapping[str, Any], modifiers: Sequence[Any] = ()) -> int:
    """Train a network on images by the library's loop; return its steps."""
    pairs = zip(images.pixels_NCHW, images.labels_N, strict=True)
    rows = [{"pixel_values": pixels, "label": int(label)} for pixels, label in pairs]
    return train(Checkpoint(net), rows, objective=Classification(), modifiers=modifiers, **recipe).steps


def batches(images: Images, size: int, key: str) -> Iterable[tuple[Tensor, Tensor]]:
    """Yield endless batches of pixels and labels, shuffled anew each epoch, for loops of baselines."""
    draws = generator(key)
    while True:
        order = torch.from_numpy(draws.permutation(len(images)))
        for chosen in order[: len(images) // size * size].split(size):
            yield images.pixels_NCHW[chosen], images.labels_N[chosen]


@torch.no_grad()
def evaluate(net: nn.Module, images: Images) -> tuple[float, float]:
    """Return the negative log-likelihood and the accuracy in percent, by the true classes."""
    logits_NC = net.eval()(images.pixels_NCHW)
    accuracy = 100 * float((logits_NC.argmax(1) == images.true_N).double().mean())
    return float(F.cross_entropy(logits_NC, images.true_N)), accuracy


def mlp(side: int, width: int) -> nn.Module:
    """Return a perceptron with two hidden layers."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(side * side, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, CLASSES),
    )  # fmt: skip


def pass_flops(net: nn.Module) -> int:
    """Return the operations of a forward and backward pass of one image; zeros are multiplied like any number."""
    return sum(6 * module.weight.numel() for module in net.modules() if isinstance(module, nn.Linear))
