"""Design that trains an image classifier and measures its accuracy: `Classify`.

Settings of an arm, all optional:

- `train`: a function `(net, images, seed, design, **settings) -> passes` that replaces the library's trainer, for
  baselines with a loop of their own, and takes `design.steps` passes.
- `modifiers`: training modifiers; `objective`: an objective that classifies.
- `stopped`: whether the result is the epoch that is most accurate on the validation images, whose labels are as noisy
  as those trained on; `clean`: whether the true labels are trained on.
- `share` of the design's steps, and `passes` that a step counts as, both 1 by default; names of `RECIPE`.
- everything else is a field of the methods, or an argument of `train`.

Dimension letters: N images, C classes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from intaglio.checkpoint import Checkpoint
from intaglio.data.images import CLASSES, Images
from intaglio.evidence.designs.base import Configured, Settings
from intaglio.evidence.designs.training import RECIPE
from intaglio.evidence.engine.claim import Arm, Cost, Metric, Result, RunKey
from intaglio.evidence.testbeds.digits import Digits
from intaglio.evidence.testbeds.rings import Rings
from intaglio.evidence.testbeds.splits import generator
from intaglio.measures.memory import peak_memory
from intaglio.trainer import train
from intaglio.trainer.classification import Classification

ACCURACY = Metric("accuracy", "points", "higher", continuous=False)
TEST_LOSS = Metric("negative log-likelihood", "nats")
MEMORISED = Metric("memorised wrong labels", "percent", continuous=False)
DETECTION = Metric("F1 of wrong labels", "", "higher", continuous=False)


@dataclass(frozen=True)
class Classify:
    """Train a network on images, from dense weights after `dense_steps` if any; a unit is a training seed.

    `network` is `mlp` (two hidden layers of `width`) or `cnn` (convolutions of `width` and twice as many channels).
    """

    bed: Digits | Rings = field(default_factory=Digits)
    width: int = 48
    steps: int = 750
    batch_size: int = 32
    learning_rate: float = 0.1
    dense_steps: int = 0
    network: Literal["mlp", "cnn"] = "mlp"

    def run(self, arm: Arm, key: RunKey, settings: Settings) -> Result:
        """Train an arm on a unit and measure it."""
        own, seed = Configured(arm, settings), key.seed
        images, measured = self.bed.training(seed), self.bed.images(key.split, key.base)
        parity = {"training": images.digest, "images": measured.digest}
        net = self._start(seed)
        loop, count = own.pop("train"), own.pop("passes", 1)
        labelled = dataclasses.replace(images, labels_N=images.true_N) if own.pop("clean", False) else images
        validation = self.bed.images("validation", key.base) if own.pop("stopped", False) else None
        objective = own.pop("objective", Classification())
        budget = dataclasses.replace(self, steps=round(self.steps * own.pop("share", 1.0)))
        with peak_memory(torch.device("cpu")) as spent:
            if loop is not None:
                passes = loop(net, labelled, seed, design=budget, **own.arguments(loop))
            else:
                recipe = {**self._recipe(-(-budget.steps // count), seed), **own.pop_all(RECIPE)}
                recipe |= {"modifiers": [own.fill(modifier) for modifier in own.pop("modifiers", ())]}
                recipe |= {"objective": own.fill(objective)}
                own.check()
                passes = count * fit_images(net, labelled, recipe, validation)
        values = {**self.measure(net, measured), **(memorised(net, images) if self.bed.noise else {})}
        parameters = sum(int(p.count_nonzero()) for p in net.parameters())
        flops = float(passes * self.batch_size * pass_flops(net, self.bed.shape))
        cost = Cost(passes * self.batch_size, flops, parameters, spent.seconds, spent.bytes)
        return Result(values, cost, parity)

    def measure(self, net: nn.Module, images: Images) -> dict[str, float]:
        """Return the metrics of a trained network."""
        loss, accuracy = evaluate(net, images)
        return {ACCURACY.name: accuracy, TEST_LOSS.name: loss}

    def _start(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = NETWORKS[self.network](self.bed.shape, self.width, self.bed.classes)
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
    fit_images(net, design.bed.training(seed), design._recipe(design.dense_steps, seed))
    return net.state_dict()


def fit_images(net: nn.Module, images: Images, recipe: Mapping[str, Any], validation: Images | None = None) -> int:
    """Train a network by the library's loop, by default on cross-entropy, and return the steps.

    With validation images, it ends with the weights of its best epoch on them.
    """
    recipe = {"objective": Classification(), **recipe}
    pairs = zip(images.pixels_NCHW, images.labels_N, strict=True)
    rows = [{"pixel_values": pixels, "label": int(label)} for pixels, label in pairs]
    best: dict[str, Any] = {"accuracy": -1.0}

    def keep_best(checkpoint: Checkpoint) -> dict[str, float]:
        accuracy = evaluate(net, validation)[1] if validation is not None else 0.0
        if accuracy > best["accuracy"]:
            best.update(accuracy=accuracy, weights={name: value.clone() for name, value in net.state_dict().items()})
        return {"accuracy": accuracy}

    if validation is None:
        return train(Checkpoint(net), rows, **recipe).steps
    epoch = max(1, -(-len(rows) // recipe["batch_size"]))
    steps = train(Checkpoint(net), rows, evaluate=keep_best, evaluate_every=epoch, **recipe).steps
    net.load_state_dict(best["weights"])
    return steps


@torch.no_grad()
def memorised(net: nn.Module, images: Images) -> dict[str, float]:
    """Return what a network made of the wrong labels among its training images.

    `memorised wrong labels`: their share, in percent, that it predicts; `F1 of wrong labels`: labels that it does not
    predict, as a search for the wrong ones.
    """
    chosen_N, wrong_N = net.eval()(images.pixels_NCHW).argmax(1), images.labels_N != images.true_N
    doubted_N = chosen_N != images.labels_N
    hits = float((doubted_N & wrong_N).sum())
    share = 100 * float((~doubted_N & wrong_N).sum()) / max(1, int(wrong_N.sum()))
    f1 = 2 * hits / max(1, int(doubted_N.sum()) + int(wrong_N.sum()))
    return {MEMORISED.name: share, DETECTION.name: f1}


def batches(images: Images, size: int, key: str) -> Iterable[tuple[Tensor, Tensor]]:
    """Yield endless batches of pixels and labels, shuffled anew each epoch, for loops of baselines."""
    draws = generator(key)
    while True:
        order = torch.from_numpy(draws.permutation(len(images)))
        for chosen in order[: len(images) // size * size].split(size):
            yield images.pixels_NCHW[chosen], images.labels_N[chosen]


@torch.no_grad()
def evaluate(net: nn.Module, images: Images) -> tuple[float, float]:
    """Return the negative log-likelihood and the accuracy in percent, by the labels: wrong ones too in validation."""
    logits_NC = net.eval()(images.pixels_NCHW)
    accuracy = 100 * float((logits_NC.argmax(1) == images.labels_N).double().mean())
    return float(F.cross_entropy(logits_NC, images.labels_N)), accuracy


def mlp(shape: Sequence[int], width: int, classes: int = CLASSES) -> nn.Module:
    """Return a perceptron with two hidden layers, for images of a shape."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(math.prod(shape), width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, classes),
    )  # fmt: skip


def cnn(shape: Sequence[int], width: int, classes: int = CLASSES) -> nn.Module:
    """Return a network of two convolutions, each with pooling, and a linear layer, for images [C, H, W]."""
    channels, height, side = shape
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(2 * width * (height // 4) * (side // 4), classes),
    )  # fmt: skip


NETWORKS = {"mlp": mlp, "cnn": cnn}


def pass_flops(net: nn.Module, shape: Sequence[int]) -> int:
    """Return the operations of a forward and backward pass of one image; zeros are multiplied like any number."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, *shape))
    return 3 * int(counter.get_total_flops())
