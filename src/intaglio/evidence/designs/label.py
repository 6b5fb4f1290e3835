"""Design that fine-tunes a small decoder to label tokens and measures it: `Label`.

Settings of an arm: `trials`, a configuration of layer groups for each fine-tuning, of which validation data chooses;
`place`, the token of a word that carries its label; `learning_rate`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from intaglio.checkpoint import Checkpoint
from intaglio.data.identifier_roles import ROLES
from intaglio.evidence.designs.base import BedDesign, Configured, Settings, training_cost
from intaglio.evidence.engine.claim import Arm, Metric, Result, RunKey
from intaglio.evidence.testbeds.cache import digest
from intaglio.evidence.testbeds.cached_models import copied
from intaglio.evidence.testbeds.identifier_roles import IdentifierRoles
from intaglio.measures.memory import peak_memory
from intaglio.methods.attention.layerwise_unmasking import LayerwiseUnmasking
from intaglio.methods.attention.layerwise_unmasking.search import Trial, best_of
from intaglio.modeling.anatomy import anatomy
from intaglio.trainer.rng import KeyedRNG
from intaglio.trainer.token_classification import TokenClassification, make_evaluator

F1 = Metric("macro-F1", "points", "higher", continuous=False)
ACCURACY = Metric("accuracy", "points", "higher", continuous=False)
UNMASKED = Metric("groups unmasked", "groups", "higher", continuous=False)
LABEL_LOSS = Metric("negative log-likelihood", "nats a word")


@dataclass(frozen=True)
class Label(BedDesign):
    """Fine-tune a model once per trial, keep the best on validation passages, measure it; a unit is a training seed."""

    bed: IdentifierRoles = field(default_factory=IdentifierRoles)
    groups: int = 4
    training: int = 800
    validation: int = 400
    test: int = 600
    steps: int = 100
    batch_size: int = 8
    MINIATURE: ClassVar = {"training": 8, "validation": 8, "test": 8, "steps": 2, "batch_size": 4}

    def run(self, arm: Arm, key: RunKey, settings: Settings) -> Result:
        """Fine-tune an arm on a unit and measure it."""
        own, seed = Configured(arm, settings), key.seed
        tried, place, rate = own.pop("trials"), own.pop("place", "first"), own.pop("learning_rate", 2e-3)
        own.check()
        draw = self.bed.examples
        examples, validation = draw("train", self.training, seed), draw("validation", self.validation, seed)
        # Tuning is measured on the passages that choose, which no trial is trained on.
        test = validation if key.stage == "tune" else draw(key.split, self.test, key.base)
        trials = [
            Trial(f"{number}: {bits}", bits, {"learning_rate": rate, "seed": len(tried) * seed + number})
            for number, bits in enumerate(tried)
        ]
        checkpoint = copied(self.bed.trained())
        method, parts = LayerwiseUnmasking(groups=self.groups), anatomy(checkpoint.model)
        objective = TokenClassification(place=place, labels=list(ROLES))
        with peak_memory(checkpoint.device) as spent:
            best = best_of(
                checkpoint, examples, validation, trials, lambda bits: method.rules(parts, bits), objective=objective,
                steps=self.steps, batch_size=self.batch_size, weight_decay=0.1, betas=(0.9, 0.95),
            )  # fmt: skip
        checkpoint.model.eval()
        scores = make_evaluator(test, batch_size=4 * self.batch_size)(checkpoint)
        values = {
            F1.name: 100 * scores["macro_f1"],
            ACCURACY.name: 100 * scores["accuracy"],
            UNMASKED.name: float(best.bits.count("1")),
            LABEL_LOSS.name: label_loss(checkpoint, objective, test, 4 * self.batch_size),
        }
        parity = {"training": digest(examples), "validation": digest(validation), "test": digest(test)}
        return Result(values, training_cost(checkpoint, sum(trial.tokens for trial in best.trials), spent), parity)


@torch.no_grad()
def label_loss(checkpoint: Checkpoint, objective: TokenClassification, examples: Any, batch_size: int) -> float:
    """Return the mean negative log-likelihood of the labels, in nats a word."""
    rng = KeyedRNG(0, training=False)
    rows = list(objective.prepare(checkpoint, examples, rng))
    batches = [objective.collate(rows[start : start + batch_size], rng) for start in range(0, len(rows), batch_size)]
    losses = [float(objective.loss(checkpoint.model, batch).total) * batch["weight"] for batch in batches]
    return sum(losses) / sum(batch["weight"] for batch in batches)
