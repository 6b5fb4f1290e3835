"""Designs that train a small model and measure it: `Pretrain` from scratch, `Finetune` from a trained one.

Settings of an arm, all optional:

- `model`: arguments of the test bed's `new`, such as `{"width": 80}` (`Pretrain`); `start`: a function `(bed, seed,
  model) -> Checkpoint` that replaces the test bed's untrained or trained model.
- `apply`: a method applied before training (its `apply(checkpoint, seed=...)`); `prepare`: any callable `(checkpoint,
  seed)` instead, which may return another checkpoint.
- `modifiers`: training modifiers; `objective`: what is predicted; `select`: a selector of the training examples, which
  may compare with the test bed's `original()`.
- names of `RECIPE`: arguments of `intaglio.trainer.train` over the test bed's recipe; everything else is a field of the
  methods above.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from intaglio.checkpoint import Checkpoint
from intaglio.evidence.designs.base import BedDesign, Configured, Measure, Measured, Settings, training_cost
from intaglio.evidence.designs.measures import bits_per_byte
from intaglio.evidence.engine.claim import Arm, Result, RunKey
from intaglio.evidence.testbeds.cache import digest
from intaglio.evidence.testbeds.cached_models import copied
from intaglio.evidence.testbeds.source_code import SourceCode
from intaglio.measures.memory import peak_memory
from intaglio.trainer import train

RECIPE = (
    *("learning_rate", "steps", "batch_size", "warmup", "weight_decay", "betas", "final_share", "clip", "lora"),
    *("precision", "min_lr_ratio", "max_grad_norm"),
)


@dataclass(frozen=True)
class Pretrain(BedDesign):
    """Train what the test bed's `new(seed, **model)` gives on its `training(seed)` by its `recipe(seed)`; measure."""

    bed: Any = field(default_factory=SourceCode)
    measures: tuple[Measure, ...] = (bits_per_byte,)

    def run(self, arm: Arm, key: RunKey, settings: Settings) -> Result:
        """Train an arm on a unit and measure it."""
        own, seed = Configured(arm, settings), key.seed
        every = dict(own.settings)
        start, model = own.pop("start"), own.pop("model", {})
        checkpoint = start(self.bed, seed, model) if start else self._start(seed, model)
        recipe = {**self.bed.recipe(seed), **own.pop_all(RECIPE)}
        apply, prepare = own.pop("apply"), own.pop("prepare")
        modifiers = [own.fill(modifier) for modifier in own.pop("modifiers", ())]
        objective, select = own.pop("objective"), own.pop("select")
        if objective is not None:
            recipe["objective"] = own.fill(objective)
        if select is not None:
            recipe |= {"select": own.fill(select), "original": self.bed.original}
        if apply is not None:
            own.fill(apply).apply(checkpoint, seed=seed)
        if prepare is not None:
            checkpoint = own.fill(prepare)(checkpoint, seed) or checkpoint
        own.check()
        data = self._data(seed, recipe["steps"])
        with peak_memory(checkpoint.device) as spent:
            trained = train(checkpoint, data, modifiers=modifiers, **recipe)
        checkpoint.model.eval()
        measured = Measured(checkpoint, self.bed, key, every)
        values = {name: value for measure in self.measures for name, value in measure(measured).items()}
        return Result(values, training_cost(checkpoint, trained.tokens, spent), {"data": data_digest(data)})

    def _start(self, seed: int, model: Settings) -> Checkpoint:
        checkpoint: Checkpoint = self.bed.new(seed, **model)
        return checkpoint

    def _data(self, seed: int, steps: int) -> Any:
        return self.bed.training(seed)


@dataclass(frozen=True)
class Finetune(Pretrain):
    """Train the model of the test bed's `load()` with its `finetuning(seed, steps)` or `training`, and measure it."""

    steps: int = 200
    learning_rate: float = 3e-4

    def run(self, arm: Arm, key: RunKey, settings: Settings) -> Result:
        """Train an arm on a unit and measure it."""
        return super().run(arm, key, {"steps": self.steps, "learning_rate": self.learning_rate, **settings})

    def _start(self, seed: int, model: Settings) -> Checkpoint:
        return copied(self.bed.load())

    def _data(self, seed: int, steps: int) -> Any:
        finetuning = getattr(self.bed, "finetuning", None)
        return finetuning(seed, steps) if finetuning else self.bed.training(seed, steps)

    def toy(self, **changes: Any) -> Any:
        """Return the design on the test bed in miniature."""
        steps = changes.pop("steps", 3)
        return dataclasses.replace(self, bed=self.bed.toy(**changes), steps=steps)


def data_digest(data: Any) -> str:
    """Return a digest of training data, so that the arms of a unit can be checked to share it."""
    own = getattr(data, "digest", None)
    if own is not None:
        return str(own)
    rows = [dict(example).items() for example in data]
    return digest([{name: v.tolist() if hasattr(v, "tolist") else v for name, v in row} for row in rows])
