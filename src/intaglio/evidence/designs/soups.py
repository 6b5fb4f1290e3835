"""Design that averages classifiers tuned from one start on different data sets: `Soups`.

Settings of an arm: `mode` (`maximum`, `greedy` or `uniform` of `checkpoint.soup`, or `union`, one model trained on all
data sets for as many steps as all candidates together), and `top`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor, nn

from intaglio.checkpoint.soup import average, greedy, maximum, uniform
from intaglio.data.images import Images
from intaglio.evidence.designs.base import Configured, Settings
from intaglio.evidence.designs.classify import ACCURACY, TEST_LOSS, evaluate, fit_images, mlp, pass_flops
from intaglio.evidence.engine.claim import Arm, Cost, Metric, Result, RunKey
from intaglio.evidence.testbeds.label_conventions import SETS, Conventions, joined

ON_CHOICE = Metric("accuracy on the data of the choice", "points", "higher", continuous=False)

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Soups:
    """Tune a trained perceptron on D + d_i for each i, and average; a unit is a training seed."""

    bed: Conventions = field(default_factory=Conventions)
    width: int = 64
    base_steps: int = 300
    steps: int = 100
    batch_size: int = 32
    learning_rate: float = 0.05

    def run(self, arm: Arm, key: RunKey, settings: Settings) -> Result:
        """Train the models of a unit and measure an arm."""
        own, seed = Configured(arm, settings), key.seed
        mode, top, rate = own.pop("mode"), own.pop("top", 1), own.pop("learning_rate", self.learning_rate)
        own.check()
        choice, measured = self.bed.choice(seed), self.bed.images(key.split, key.base)
        net = mlp(self.bed.digits.shape, self.width)

        def score(state: dict[str, Tensor]) -> float:
            net.load_state_dict(state)
            return evaluate(net, choice)[1]

        if mode == "union":
            whole = joined([self.bed.base(seed), *(self.bed.added(seed, n) for n in range(SETS))])
            state = average([_tuned(self, seed, whole, rate, SETS * self.steps)])
            on_choice = score(state)
        else:
            candidates = _candidates(self, seed, rate)
            if mode == "maximum":
                result = maximum(candidates, score, top)
            else:
                result = greedy(candidates, score) if mode == "greedy" else uniform(candidates, score)
            state, on_choice = result.state, result.score
        net.load_state_dict(state)
        loss, accuracy = evaluate(net, measured)
        images = SETS * self.steps * self.batch_size
        cost = Cost(
            images, float(images * pass_flops(net, self.bed.digits.shape)), sum(p.numel() for p in net.parameters())
        )
        values = {ACCURACY.name: accuracy, TEST_LOSS.name: loss, ON_CHOICE.name: on_choice}
        return Result(values, cost, {"base": self.bed.base(seed).digest, "images": measured.digest})

    def start(self, seed: int) -> nn.Module:
        """Return the untrained network of a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return mlp(self.bed.digits.shape, self.width)

    def toy(self, **changes: int) -> Soups:
        """Return the design with a small network and few steps."""
        sizes = {"width": 16, "base_steps": 30, "steps": 15}
        return dataclasses.replace(self, bed=self.bed.toy(), **{**sizes, **changes})


@lru_cache(maxsize=2)
def _candidates(design: Soups, seed: int, rate: float) -> list[State]:
    """Return the models that all arms of a unit are made of."""
    base = design.bed.base(seed)
    sets = (joined([base, design.bed.added(seed, number)]) for number in range(SETS))
    return [_tuned(design, seed, images, rate, design.steps) for images in sets]


@lru_cache(maxsize=2)
def _base(design: Soups, seed: int) -> State:
    """Return the weights that every candidate starts from."""
    net = design.start(seed)
    fit_images(net, design.bed.base(seed), _recipe(design, seed, design.base_steps, 0.1))
    return net.state_dict()


def _tuned(design: Soups, seed: int, images: Images, rate: float, steps: int) -> State:
    net = design.start(seed)
    net.load_state_dict(_base(design, seed))
    fit_images(net, images, _recipe(design, seed, steps, rate))
    return net.state_dict()


def _recipe(design: Soups, seed: int, steps: int, rate: float) -> dict[str, object]:
    return {"steps": steps, "batch_size": design.batch_size, "learning_rate": rate, "optimizer": "sgd", "seed": seed}
