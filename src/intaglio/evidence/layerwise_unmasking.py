"""The claim of layer-wise unmasking: a subset of layers chosen on validation data labels words better than the causal
model with its labels where it has read the whole word.

A run is a seed: it draws the training passages, the validation passages, the heads and the order of the data. All
arms of a run start from the same pretrained model and may train equally often; what they choose, they choose on the
validation passages, and every arm's choice is measured on the same test passages of files that no arm has seen.

The world is an easy one for looking right: many roles of a name in source code are decided by the token behind it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from intaglio.checkpoint import Checkpoint
from intaglio.data.token_classification import Place
from intaglio.evidence.experiment import Cost, Experiment, Outcome, Secondary, Stage, Unit, digest
from intaglio.evidence.worlds.roles import ROLES, Roles
from intaglio.evidence.worlds.sealing import MEASURED, Part
from intaglio.masks.method import keep
from intaglio.measures.memory import peak_memory
from intaglio.methods.attention.layerwise_unmasking import LayerwiseUnmasking
from intaglio.methods.attention.layerwise_unmasking.search import SearchResult, Trial, best_of
from intaglio.modeling.anatomy import anatomy
from intaglio.trainer.token_classification import TokenClassification, make_evaluator

F1 = "macro-F1"
ACCURACY = "accuracy"
GROUPS = 4
RATES = (1e-3, 2e-3, 4e-3)
"""Learning rates that arms without a choice of groups try."""
RATE = 2e-3
"""The one that the arm which tries configurations trains all of them with."""
SEEDS = 2
"""Seeds of fine-tuning that the other arms try for each rate: as many trials as there are configurations."""
TRIED = ("0000", "0001", "0011", "0111", "1111", "1000")
"""Six of the 16 configurations: none, from the output downwards to all, and the group nearest the input."""


class World(Hashable, Protocol):
    """What the experiment asks of a world; it compares by its fields."""

    def trained(self) -> Checkpoint:
        """The pretrained model, shared: not to be changed."""

    def examples(self, part: Part, count: int, seed: int) -> list[dict[str, Any]]:
        """Passages with labelled words out of a sealed set."""


@dataclass(frozen=True)
class Budget:
    """How much every arm trains and is measured on.

    Args:
        training: passages that fine-tuning draws on.
        validation: passages that choose.
        test: passages that are measured on.
        steps: of one fine-tuning.
        batch: passages of a step.
    """

    training: int = 800
    validation: int = 120
    test: int = 300
    steps: int = 100
    batch: int = 8


ARMS: dict[str, tuple[Place, str]] = {
    "causal": (
        "last",
        "plain causal, labels on the last sub-token of a name; 6 trials: 3 learning rates with 2 seeds",
    ),
    "chosen": (
        "first",
        "the subset of 4 groups that validation chooses, labels on the first sub-token; 6 trials: 6 of the 16 subsets",
    ),
    "all": ("first", "all groups unmasked, labels on the first sub-token; 6 trials: 3 learning rates with 2 seeds"),
    "causal-first": ("first", "plain causal, labels on the first sub-token; 3 trials: 3 learning rates"),
    "inference": ("first", "that arm's model, the group nearest the output unmasked at inference only"),
}
"""`{arm: (where labels stand, what it is)}`."""


def trials_of(arm: str, seed: int) -> tuple[Trial, ...]:
    """What an arm tries.

    Args:
        arm: a key of `ARMS`.
        seed: of the run.
    """
    if arm == "chosen":
        return tuple(Trial(bits, bits, {"learning_rate": RATE, "seed": _tuned(seed, 0)}) for bits in TRIED)
    bits = ("1" if arm == "all" else "0") * GROUPS
    seeds = range(SEEDS if arm in ("causal", "all") else 1)
    return tuple(
        Trial(f"rate {rate:g}, seed {number}", bits, {"learning_rate": rate, "seed": _tuned(seed, number)})
        for rate in RATES
        for number in seeds
    )


def _tuned(seed: int, number: int) -> int:
    """The seed of one fine-tuning of a run."""
    return SEEDS * seed + number


@dataclass(frozen=True)
class Label:
    """The runner: try what the arm tries, keep what validation chooses, measure that.

    Args:
        world: gives model and passages.
        budget: how much of them.
    """

    world: World
    budget: Budget = Budget()

    def __call__(self, arm: str, unit: Unit, seed: int) -> Outcome:
        """Run one arm with one seed.

        Args:
            arm: a key of `ARMS`.
            unit: of which run.
            seed: of passages, heads and order.
        """
        own = self.budget
        training = self.world.examples("train", own.training, seed)
        validation = self.world.examples("validation", own.validation, seed)
        test = self.test(unit.stage, unit.base)
        shared = self.world.trained()
        checkpoint = Checkpoint(copy.deepcopy(shared.model), shared.tokenizer, shared.source)
        with peak_memory(checkpoint.device) as peak:
            began = time.perf_counter()
            found = self.tried(arm, checkpoint, training, validation, seed)
            if arm == "inference":
                method = LayerwiseUnmasking(configuration="1".rjust(GROUPS, "0"))
                keep(checkpoint, method.rules(anatomy(checkpoint.model), method.configuration or ""))
            seconds = time.perf_counter() - began
        scores = make_evaluator(test, batch_size=4 * own.batch)(_evaluating(checkpoint))
        parameters = sum(p.numel() for p in checkpoint.model.parameters())
        tokens = sum(trial.tokens for trial in found.trials)
        return Outcome(
            values={F1: {"seed": 100 * scores["macro_f1"]}, ACCURACY: {"seed": 100 * scores["accuracy"]}},
            cost=Cost(
                tokens=tokens,
                flops=6.0 * parameters * tokens,
                parameters=parameters,
                seconds=seconds,
                peak_bytes=peak.bytes,
            ),
            shared={"training": digest(training), "validation": digest(validation), "test": digest(test)},
        )

    def test(self, stage: Stage, base: int) -> list[dict[str, Any]]:
        """The passages that every run of a stage is measured on.

        Args:
            stage: pilots have files of their own.
            base: another seed base gives other passages.
        """
        return self.world.examples(MEASURED[stage], self.budget.test, base)

    def tried(
        self, arm: str, checkpoint: Checkpoint, training: Sequence[Any], validation: Sequence[Any], seed: int
    ) -> SearchResult:
        """Try what an arm tries; the checkpoint becomes the best.

        Args:
            arm: a key of `ARMS`.
            checkpoint: a copy of the pretrained model.
            training: passages.
            validation: others.
            seed: of the run.
        """
        method, parts = LayerwiseUnmasking(groups=GROUPS), anatomy(checkpoint.model)
        return best_of(
            checkpoint,
            training,
            validation,
            trials_of(arm, seed),
            lambda bits: method.rules(parts, bits),
            objective=TokenClassification(place=ARMS[arm][0], labels=list(ROLES)),
            steps=self.budget.steps,
            batch_size=self.budget.batch,
            weight_decay=0.1,
            betas=(0.9, 0.95),
        )


def _evaluating(checkpoint: Checkpoint) -> Checkpoint:
    checkpoint.model.eval()
    return checkpoint


def experiment(world: Roles, budget: Budget = Budget()) -> Experiment:
    """The claim in a world.

    Args:
        world: model and passages.
        budget: how much of them. Default: the claim's.
    """
    return Experiment(
        slug="layerwise_unmasking",
        claim="A small Llama that labels the roles of names in Python source has a macro-F1 more than 2 points higher "
        "with the subset of unmasked layer groups that validation files choose than as a causal model with its labels "
        "on the last sub-token, at equally many trials.",
        metric=F1,
        unit="points",
        direction="higher",
        delta=2.0,
        design="independent",
        factors=("seed",),
        arms={arm: what for arm, (_, what) in ARMS.items()},
        baseline="causal",
        method="chosen",
        parity="Both arms of the claim train equally often (6 fine-tunings) on the same passages with the same number "
        "of steps, choose on the same validation passages, and have the same number of parameters.",
        equal=("parameters",),
        secondaries=(
            Secondary("the chosen subset against all unmasked (margin: 0.5 points)", "all", "chosen"),
            Secondary("accuracy: the chosen subset against causal", "causal", "chosen", ACCURACY, "higher"),
            Secondary("causal: labels on the last sub-token against the first", "causal-first", "causal"),
            Secondary("unmasked at inference only against causal training alone", "causal-first", "inference"),
        ),
        run_unit=Label(world, budget),
        pilot_runs=5,
        most_runs=8,
        secondary_runs=3,
        threads=1,
        settings={
            "world": asdict(world),
            "budget": asdict(budget),
            "groups": GROUPS,
            "configurations": list(TRIED),
            "learning rates": list(RATES),
            "learning rate of every configuration": RATE,
            "seeds of fine-tuning": SEEDS,
            "labels": list(ROLES),
        },
        why="Claim, delta and tier are as named. The world has more right context than most labelling tasks, and the "
        "model is fine-tuned in full, not by low-rank adapters, as it is small. Single fine-tunings on validation "
        "passages, before any run, showed that 40 steps are too few for an unmasked model to adapt, and set the steps "
        "of all arms.",
    )


EXPERIMENTS = {"cpu": experiment(Roles())}
"""By tier."""
