"""The claim of progressive N:M: at 1:16 and equal training operations, fading pruned weights out beats SR-STE.

A run is a training seed. From the same weights, on the same windows of Python source in the same order, a byte-level
Llama is trained with each arm's recipe in its feed-forward layers, and measured on files that no arm has seen, as the
sparse model that is baked at the end. What differs is the recipe; and the number of steps, which is the largest whose
operations are within those of SR-STE. Every arm tries four settings on validation files, the learning rate among them.

Operations are products over the weights that are not zero, and the gradients of all weights, in every arm: while z > 0
all of MdGf's products are dense, after that its steps cost what those of SR-STE do. Under the chain rule a pruned
weight needs no gradient once z = 0, which would leave the method more steps (`Schedule.work`); what it spends by that
count is told beside. Masks and the optimizer's work are left out.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.evidence.experiment import Cost, Experiment, Outcome, Secondary, Tuning, Unit
from intaglio.evidence.worlds.source_code import SourceCode
from intaglio.measures.language_modeling import quality
from intaglio.measures.memory import peak_memory
from intaglio.methods.weights.progressive_nm import ProgressiveNM
from intaglio.methods.weights.progressive_nm.schedule import Gradient
from intaglio.modeling.anatomy import anatomy
from intaglio.trainer import train

BITS = "bits a byte"
NOISE = "second moment of gradients where pruned"
STEPS = "steps"
SPENT = "operations over the budget"
SPENT_NEEDED = "operations over the budget, gradients that are zero left out"

INNER = 384
"""Inner width of the feed-forward layers: a multiple of 16, which the habit of 8/3 of the width is not."""
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
"""Learning rates of arms that have nothing else to choose; the others try the middle two with two values of theirs."""
LAMBDAS = (2e-4, 2e-3)
"""Of SR-STE: as published, and ten times that."""
FINETUNES = (0.25, 0.75)
"""Shares of fine-tuning: the paper's, and one that leaves more steps within the budget."""

Budget = Literal["operations", "steps"]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Arm:
    """A recipe, and what it may spend.

    Args:
        what: it is, in a sentence.
        shape: fields of `ProgressiveNM`; None: the model stays dense.
        budget: equal `operations`, or equal `steps`. Default operations.
    """

    what: str
    shape: Settings | None
    budget: Budget = "operations"

    @property
    def choices(self) -> dict[str, dict[str, Any]]:
        """`{choice: {learning_rate, and a field of the recipe}}`: four, whatever the arm."""
        recipe = None if self.shape is None else self.shape["recipe"]
        if recipe in (None, "ste"):
            return {f"rate {rate:g}": {"learning_rate": rate} for rate in RATES}
        name, values = ("sr_decay", LAMBDAS) if recipe == "sr-ste" else ("finetune", FINETUNES)
        return {
            f"rate {rate:g}, {name} {value:g}": {"learning_rate": rate, name: value}
            for rate in RATES[1:3]
            for value in values
        }


ARMS: dict[str, Arm] = {
    "sr-ste": Arm("SR-STE at 1:16, whose steps are the budget", {"pattern": "1:16", "recipe": "sr-ste"}),
    "mdgf-exp": Arm(
        "MdGf-Exponential at 1:16 under the chain rule, as the paper states its mechanism",
        {"pattern": "1:16", "recipe": "mdgf-exp"},
    ),
    "dense": Arm("no pruning", None),
    "ste": Arm("the straight-through estimator at 1:16", {"pattern": "1:16", "recipe": "ste"}),
    "mdgf-exp-ste": Arm(
        "MdGf-Exponential with the straight-through gradient of the authors' code",
        {"pattern": "1:16", "recipe": "mdgf-exp", "gradient": "ste"},
    ),
    "mdgf-linear": Arm("MdGf-Linear at 1:16 under the chain rule", {"pattern": "1:16", "recipe": "mdgf-linear"}),
    "sdgf-stepwise": Arm(
        "SdGf-Stepwise under the chain rule: 15:16, 8:16, 4:16, 2:16, 1:16",
        {"pattern": "1:16", "recipe": "sdgf-stepwise"},
    ),
    "mdgf-exp-steps": Arm(
        "MdGf-Exponential with as many steps as SR-STE, so more operations where it is denser",
        {"pattern": "1:16", "recipe": "mdgf-exp"},
        "steps",
    ),
    "sr-ste-2of4": Arm("SR-STE at 2:4", {"pattern": "2:4", "recipe": "sr-ste"}),
    "mdgf-exp-2of4": Arm("MdGf-Exponential at 2:4 under the chain rule", {"pattern": "2:4", "recipe": "mdgf-exp"}),
}
REFERENCE = {"1:16": "sr-ste", "2:4": "sr-ste-2of4"}
"""Whose steps are the budget, by pattern; the dense arm has that of 1:16."""


@dataclass(frozen=True)
class Sizes:
    """What the operations of a step are made of.

    Args:
        dense: weights in products that are never pruned, the head among them.
        pruned: weights that a recipe prunes.
        attention: operations a token of a forward pass that have no weights: scores and their products with values.
    """

    dense: int
    pruned: int
    attention: float

    def operations(self, work: float) -> float:
        """Of a step, a token.

        Args:
            work: of the pruned layers, as a share of a dense step's.
        """
        return 6.0 * (self.dense + self.pruned * work) + 3.0 * self.attention


def sizes(checkpoint: Checkpoint, context: int) -> Sizes:
    """Count a model's weights, those of the feed-forward layers apart.

    Args:
        checkpoint: the model.
        context: tokens of a row; each looks at half of them on average.
    """
    parts = anatomy(checkpoint.model)
    counted = {"mlp": 0, "attention": 0}
    for _, linear in parts.all_linears():
        rows, columns = linear.shape
        counted[linear.part] += rows * columns
    width = int(parts.config.hidden_size)
    head = int(parts.config.vocab_size) * width
    return Sizes(counted["attention"] + head, counted["mlp"], len(parts.blocks) * 2.0 * 2.0 * width * context / 2)


def spent(found: Sizes, method: ProgressiveNM | None, steps: int, *, all_gradients: bool = True) -> float:
    """Operations a token of a step's batch, over a whole training.

    Args:
        found: of the model.
        method: the recipe; None: dense.
        steps: of the training.
        all_gradients: whether the gradient of every weight is counted, zero or not. Default True.
    """
    if method is None:
        return steps * found.operations(1.0)
    schedule = method.schedule(steps)
    gradient: Gradient = "ste" if all_gradients else method.gradient
    return math.fsum(found.operations(schedule.work(t, gradient)) for t in range(1, steps + 1))


def steps_within(budget: float, cost: Callable[[int], float], most: int) -> int:
    """The largest number of steps whose cost is within a budget.

    Args:
        budget: of operations.
        cost: of so many steps, growing with them.
        most: steps that there are data for.

    Raises:
        IntaglioError: more steps would fit than there are data for, or not even one.
    """
    found = bisect_right(range(1, most + 1), budget, key=cost)
    if not 0 < found < most:
        raise IntaglioError(f"{found} of {most} steps fit the budget; the world's steps are too few, or the budget is")
    return found


@dataclass(frozen=True)
class Sparse:
    """The runner: train one arm from scratch within its budget, and measure the baked model.

    Args:
        world: source code and the model's size; its steps are the windows that there are, more than any arm takes.
        steps: of SR-STE.
    """

    world: SourceCode
    steps: int

    def __call__(self, arm: str, unit: Unit, seed: int) -> Outcome:
        """Run one arm with one training seed.

        Args:
            arm: a key of `ARMS`.
            unit: of which run; its choice is one of the arm's, the first where it has none.
            seed: of weights, windows and order.
        """
        choice = ARMS[arm].choices[unit.choice or next(iter(ARMS[arm].choices))]
        seed %= 2**32
        checkpoint = self.world.new(seed, intermediate_size=INNER)
        method, rate = method_of(arm, choice), choice["learning_rate"]
        found = sizes(checkpoint, self.world.context)
        steps, budget = self.plan(arm, method, found)
        recipe = {**self.world.recipe(seed), "steps": steps, "learning_rate": rate}
        training = self.world.training(seed)
        with peak_memory(checkpoint.device) as peak:
            done = train(checkpoint, training, shape=[] if method is None else [method], **recipe)
        documents = self.world.documents(unit.stage, unit.base)
        nats = [loss for loss in quality(checkpoint, documents.segments, batch_size=16).losses if loss is not None]
        noise = [line.parts[PART] for line in done.history if PART in line.parts]
        operations = spent(found, method, steps)
        values = {
            BITS: fmean(nats) / math.log(2),
            STEPS: float(steps),
            SPENT: operations / budget,
            SPENT_NEEDED: spent(found, method, steps, all_gradients=False) / self.plan(arm, method, found, False)[1],
            **({NOISE: fmean(noise)} if noise else {}),
        }
        return Outcome(
            values={metric: {"seed": value} for metric, value in values.items()},
            cost=Cost(
                tokens=done.tokens,
                flops=operations * self.world.batch * self.world.context,
                parameters=sum(int((p != 0).sum()) for p in checkpoint.model.parameters()),
                seconds=done.seconds,
                peak_bytes=peak.bytes,
            ),
            shared={"windows": training.digest, "documents": documents.segments.digest},
        )

    def plan(
        self, arm: str, method: ProgressiveNM | None, found: Sizes, all_gradients: bool = True
    ) -> tuple[int, float]:
        """How many steps an arm takes, and the budget in operations a token of a step's batch.

        Args:
            arm: a key of `ARMS`.
            method: its recipe.
            found: of the model.
            all_gradients: as in `spent`.
        """

        def cost(one: ProgressiveNM | None, steps: int) -> float:
            return spent(found, one, steps, all_gradients=all_gradients)

        reference = REFERENCE["1:16" if method is None else str(method.pattern)]
        budget = cost(method_of(reference, {}), self.steps)
        if arm == reference or ARMS[arm].budget == "steps":
            return self.steps, budget
        most = self.world.steps
        return steps_within(budget, lambda steps: cost(method, steps), most), budget


PART = "second moment where pruned"
"""What the shaper logs it as."""


def method_of(arm: str, choice: Settings) -> ProgressiveNM | None:
    """An arm's recipe with what it chose.

    Args:
        arm: a key of `ARMS`.
        choice: of the arm.
    """
    shape = ARMS[arm].shape
    return (
        None if shape is None else ProgressiveNM(**shape, **{k: v for k, v in choice.items() if k != "learning_rate"})
    )


def experiment(run: Sparse) -> Experiment:
    """The claim in a world.

    Args:
        run: the world and what is done in it.
    """
    return Experiment(
        slug="progressive_nm",
        claim="At equal training operations, a byte-level Llama whose feed-forward layers keep 1 of 16 weights predicts"
        " Python source better if it is trained with MdGf-Exponential than with SR-STE, by more than 0.01 bits a byte.",
        metric=BITS,
        unit="bits a byte",
        direction="lower",
        delta=0.01,
        design="independent",
        factors=("training seed",),
        arms={name: arm.what for name, arm in ARMS.items()},
        baseline="sr-ste",
        method="mdgf-exp",
        parity="Training operations, to within a step: an arm takes the largest number of steps whose operations, the"
        " gradients of all weights among them, are within those of SR-STE. Same weights, windows, order and trials;"
        " last step.",
        secondaries=(
            Secondary("at equally many steps", "sr-ste", "mdgf-exp-steps"),
            Secondary("against the straight-through estimator", "ste", "mdgf-exp"),
            Secondary("SR-STE against the straight-through estimator", "ste", "sr-ste"),
            Secondary("chain rule against the code's straight-through gradient", "mdgf-exp-ste", "mdgf-exp"),
            Secondary("exponential against linear", "mdgf-linear", "mdgf-exp"),
            Secondary("SdGf-Stepwise against SR-STE", "sr-ste", "sdgf-stepwise"),
            Secondary("what sparsity costs: dense against MdGf", "mdgf-exp", "dense"),
            Secondary("at 2:4, where the paper has a tie", "sr-ste-2of4", "mdgf-exp-2of4"),
            Secondary("noise: gradients where pruned", "sr-ste", "mdgf-exp", NOISE),
        ),
        run_unit=run,
        tuning=Tuning({name: {choice: choice for choice in arm.choices} for name, arm in ARMS.items()}),
        pilot_runs=5,
        most_runs=12,
        secondary_runs=3,
        threads=1,
        settings={
            "world": asdict(run.world),
            "steps of SR-STE": run.steps,
            "inner width": INNER,
            "learning rates": list(RATES),
            "lambdas": list(LAMBDAS),
            "shares of fine-tuning": list(FINETUNES),
            "arms": {
                name: {"shape": None if arm.shape is None else dict(arm.shape), "budget": arm.budget}
                for name, arm in ARMS.items()
            },
            "operations": "2 a token and weight that is not zero, for the output and for the gradient of the input; 2 a"
            " weight for its gradient; the head and attention's own products in full; masks and optimizer not",
        },
        why="Claim, delta and tier are as named. The method's arm is the paper's headline, MdGf-Exponential, with the"
        " gradient of the chain rule, chosen before any run: so the paper states its mechanism (restricting the flow"
        " of gradients to pruned weights by degrees), while its released code hands the whole gradient on, in an arm of"
        " its own here. The gradients of all weights are counted in every arm, though the chain rule needs fewer:"
        " the count that favours the method less. The other is told beside it. Files measured on are as many as the"
        " library has in each sealed set with some to spare; more were asked for at first, and no run could start.",
    )


WORLD = SourceCode(
    width=128, depth=4, context=128, steps=600, batch=4, tokens=128, documents_run=110, documents_pilot=50
)
EXPERIMENTS = {"cpu": experiment(Sparse(WORLD, 400))}
"""By tier."""
