"""Design that tunes the regularization of an image classifier within a budget of operations: `TuneRegularizers`.

Settings of an arm: `tuner`, one of `stn` (default), `replay` (a plain network under STN's schedule), `random`, `tpe`
(searches by whole trainings) and `fixed` (the start values); `start`, of the dropouts; `trials` of a search;
`learning_rate`; everything else is a field of STN.

An STN step costs two plain ones, and every second is followed by a hyper step of four thirds of one, in which no
gradients of weights are needed: 8 against 3 operations a weight and example. So the searches have 8/3 of the steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from intaglio.checkpoint import Checkpoint
from intaglio.data.images import Images
from intaglio.evidence.baselines.hyperparameter_search import search
from intaglio.evidence.designs.base import Configured, Settings
from intaglio.evidence.designs.classify import TEST_LOSS, evaluate, mlp, pass_flops
from intaglio.evidence.engine.claim import Arm, Cost, Metric, Result, RunKey
from intaglio.evidence.testbeds.digits import Digits
from intaglio.measures.memory import peak_memory
from intaglio.methods.training.stn import STN, Regularizer, found_schedule
from intaglio.trainer import LogEntry, train
from intaglio.trainer.classification import Classification
from intaglio.trainer.dataset import hold_out
from intaglio.trainer.history import columns

VALIDATION_LOSS = Metric("validation loss", "nats")
DROPOUTS = {"input dropout": "1", "first hidden dropout": "3", "second hidden dropout": "5"}
"""Dropouts by name, and the layers whose inputs they drop."""
RANGES = {**dict.fromkeys(DROPOUTS, (0.0, 0.9)), "weight decay": (-12.0, -2.0)}
"""Of the searches, weight decay as a logarithm."""
STN_COST, PLAIN_COST = 8, 3
"""Operations a weight and example, in multiply-adds: of an STN step with its share of a hyper step, of a plain step."""


@dataclass(frozen=True)
class TuneRegularizers:
    """Train a perceptron on 40 % of the images, tune on the others, and test; a unit is a training seed with its data.

    Every arm is tested at the point of its least validation loss, of all its trainings.
    """

    bed: Digits = field(default_factory=lambda: Digits(training_images=500))
    width: int = 256
    steps: int = 720
    trials: int = 8
    batch_size: int = 50
    validation: float = 0.6
    evaluate_every: int = 20
    learning_rate: float = 1e-3

    def run(self, arm: Arm, key: RunKey, settings: Settings) -> Result:
        """Tune under an arm on a unit and test."""
        own, seed = Configured(arm, settings), key.seed
        images, measured = self.bed.training(seed), self.bed.images(key.split, key.base)
        tuner, start, trials = own.pop("tuner", "stn"), own.pop("start", 0.05), own.pop("trials", self.trials)
        run = _Trainings(self, images, measured, seed, own.pop("learning_rate", self.learning_rate), start)
        tuned = STN(regularizers=run.regularizers, validation=self.validation)
        tuned = own.fill(tuned) if tuner in ("stn", "replay") else tuned
        own.check()
        operations = PLAIN_COST * self.steps
        with peak_memory(torch.device("cpu")) as spent:
            if tuner in ("stn", "replay"):
                history = run.train(tuned, self.steps)
                operations = STN_COST * self.steps
                if tuner == "replay":
                    run.results.clear()
                    run.train(run.fixed(found_schedule(columns(history))), self.steps)
                    operations += PLAIN_COST * self.steps
            elif tuner == "fixed":
                run.train(run.fixed({name: [item.first] for name, item in run.named.items()}), self.steps)
            else:
                steps = STN_COST * self.steps // (PLAIN_COST * trials)
                search(lambda values: run.trial(values, steps), RANGES, trials, tuner, seed)
                operations = PLAIN_COST * steps * trials
        validation, test = min(run.results)
        net = mlp(self.bed.shape, self.width)
        flops = pass_flops(net, self.bed.shape) / 3 * operations * self.batch_size
        weights = sum(p.numel() for p in net.parameters())
        cost = Cost(operations * self.batch_size, flops, weights, spent.seconds, spent.bytes)
        parity = {"training": images.digest, "images": measured.digest}
        return Result({TEST_LOSS.name: test, VALIDATION_LOSS.name: validation}, cost, parity)

    def toy(self, **changes: Any) -> TuneRegularizers:
        """Return the design with a small network and few steps."""
        sizes = {"width": 16, "steps": 12, "trials": 2, "batch_size": 16, "evaluate_every": 6}
        return dataclasses.replace(self, bed=self.bed.toy(), **{**sizes, **changes})


class _Trainings:
    """Trainings of one unit; `results` are the validation and test losses at every evaluation."""

    def __init__(
        self, design: TuneRegularizers, images: Images, measured: Images, seed: int, rate: float, start: float
    ) -> None:
        self.design, self.measured, self.seed, self.rate = design, measured, seed, rate
        pairs = zip(images.pixels_NCHW, images.labels_N, strict=True)
        self.rows = [{"pixel_values": pixels, "label": int(label)} for pixels, label in pairs]
        self.kept, held_out = hold_out(self.rows, design.validation, seed)
        self.validation = images.take(held_out)
        self.named = {
            name: Regularizer(kind="dropout", at=[layer], start=start, name=name) for name, layer in DROPOUTS.items()
        } | {"weight decay": Regularizer(kind="weight_decay", name="weight decay")}
        self.regularizers = list(self.named.values())
        self.results: list[tuple[float, float]] = []

    def fixed(self, schedule: Mapping[str, list[float]]) -> STN:
        """Return the training of a plain network under constant values or a schedule."""
        return STN(regularizers=self.regularizers, schedule={"step": [0.0], **schedule})

    def trial(self, values: Mapping[str, float], steps: int) -> float:
        """Train under constant values, and return the least validation loss."""
        before = len(self.results)
        self.train(self.fixed({name: [value] for name, value in values.items()}), steps)
        return min(self.results[before:])[0]

    def train(self, method: STN, steps: int) -> tuple[LogEntry, ...]:
        """Train a new network, add its results, and return the history."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            net = mlp(self.design.bed.shape, self.design.width)

        def measure(checkpoint: Checkpoint) -> Mapping[str, float]:
            losses = [evaluate(checkpoint.model, images)[0] for images in (self.validation, self.measured)]
            self.results.append((losses[0], losses[1]))
            return {"validation": losses[0]}

        # STN holds its share out itself; all others are given the same rows.
        rows = self.rows if method.held_out_share else [self.rows[n] for n in self.kept]
        return train(
            Checkpoint(net), rows, objective=Classification(), modifiers=[method], evaluate=measure, steps=steps,
            batch_size=self.design.batch_size, learning_rate=self.rate, schedule="constant", seed=self.seed,
            evaluate_every=self.design.evaluate_every,
        ).history  # fmt: skip
