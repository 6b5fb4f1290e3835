"""The claim of LOST: trained from scratch, it predicts better than a low-rank pair alone with as many parameters.

A run is a training seed. Every arm begins with the weights that the seed draws for a byte-level Llama, replaces the
projections of its blocks in its own way, and is trained on the same windows of Python source in the same order. The
pair alone has rank 32; every other arm of the family has exactly as many numbers in each projection: what its sparse
part takes is taken from the rank. That comes out even since the inner width of the MLP is three times the model's.

Every arm chooses its learning rate on validation files, from the same rates. Since a decomposition gives factors of
another scale than drawing them does, what arms begin as is told beside: the norm of the low-rank part over that of the
weight it stands for.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from torch import nn

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.evidence.experiment import Cost, Experiment, Outcome, Secondary, Tuning, Unit
from intaglio.evidence.worlds.source_code import SourceCode
from intaglio.measures.language_modeling import quality
from intaglio.measures.memory import peak_memory
from intaglio.methods.weights.lost import LOST, ElementsLinear, LostLinear
from intaglio.modeling.anatomy import anatomy
from intaglio.trainer import train

BITS = "bits a byte"
NORM = "norm of the low-rank part at the start, over the weight's"
INNER = 3
"""The inner width of the MLP over the model's: with it, the columns of every projection are worth whole ranks."""
RATES = ("0.002", "0.005", "0.012")
EVALUATED = 16
"""Windows that are measured at a time."""

LOW_RANK, COLUMNS = 32, 4
"""Of a model of width 128: a quarter of it, as in the paper, and about 3 % of its inputs."""
SHARE = COLUMNS / 128


@dataclass(frozen=True)
class Arm:
    """One way of training the model.

    Args:
        what: it is.
        method: what replaces the projections; None: nothing does.
        width: of the model. Default: the world's.
    """

    what: str
    method: LOST | None = None
    width: int | None = None


_PAID: dict[str, Any] = {"rank": LOW_RANK, "columns": SHARE, "within_rank": True}
ARMS: dict[str, Arm] = {
    "low-rank": Arm("a low-rank pair alone, both factors drawn as linear layers are", LOST.low_rank(rank=LOW_RANK)),
    "lost": Arm("LOST: SVD start, columns by the complement's norms, SiLU between the factors", LOST(**_PAID)),
    "low-rank-svd": Arm("the pair alone with LOST's SVD start", LOST.low_rank("svd", rank=LOW_RANK)),
    "lost-identity": Arm("LOST without an activation", LOST(activation="identity", **_PAID)),
    "lost-random": Arm("LOST with columns at random", LOST(columns_by="random", **_PAID)),
    "cola": Arm("CoLA: a pair with SiLU between its factors and its own start", LOST.cola(rank=LOW_RANK)),
    "sltrain": Arm(
        "SLTrain: a pair and as many single weights at random places as LOST's columns have",
        LOST.sltrain(rank=LOW_RANK, elements=SHARE, within_rank=True),
    ),
    "full": Arm("the model as it is, of full rank"),
    "narrow": Arm("a narrower model of full rank whose blocks have 1.4 % more parameters than the pairs", width=80),
}
FAMILY = tuple(name for name, arm in ARMS.items() if arm.method is not None)
"""Arms with equally many numbers in each projection."""


@dataclass(frozen=True)
class Pretrain:
    """The runner: make the run's model, replace its projections, train it, measure it.

    Args:
        world: source code, the model's size and how it is trained.
    """

    world: SourceCode

    def __call__(self, arm: str, unit: Unit, seed: int) -> Outcome:
        """Run one arm with one training seed.

        Args:
            arm: a key of `ARMS`.
            unit: of which run, with the learning rate that the arm tries or has chosen.
            seed: of weights, windows, their order, and what an arm draws.
        """
        world = self.world
        checkpoint = self.begin(arm, seed)
        norm = low_rank_norm(self.begin("full", seed), checkpoint)
        recipe = world.recipe(seed % 2**32)
        if unit.choice:
            recipe["learning_rate"] = float(unit.choice)
        windows = world.training(seed)
        with peak_memory(checkpoint.device) as peak:
            done = train(checkpoint, windows, **recipe)
        documents = world.documents(unit.stage, unit.base)
        nats = quality(checkpoint, documents.segments, batch_size=EVALUATED).losses
        return Outcome(
            values={BITS: {"seed": fmean(nats) / math.log(2)}, NORM: {"seed": norm}},
            cost=Cost(
                tokens=done.tokens,
                flops=flops(checkpoint.model, done.tokens, done.steps),
                parameters=sum(p.numel() for p in checkpoint.model.parameters()),
                seconds=done.seconds,
                peak_bytes=peak.bytes,
            ),
            shared={"windows": windows.digest, "documents": documents.segments.digest},
        )

    def begin(self, arm: str, seed: int) -> Checkpoint:
        """What an arm is before it is trained.

        Args:
            arm: a key of `ARMS`.
            seed: of the weights, and of what the arm draws.

        Raises:
            IntaglioError: an arm of the family has other numbers than the pair alone.
        """
        chosen = ARMS[arm]
        width = chosen.width or self.world.width
        # As many heads whatever the width, so that the narrow model differs in that alone.
        checkpoint = self.world.new(seed % 2**32, width=width, heads=4, intermediate_size=INNER * width)
        if chosen.method is None:
            return checkpoint
        linears = [linear.shape for _, linear in anatomy(checkpoint.model).all_linears()]
        chosen.method.apply(checkpoint, seed=seed)
        found = checkpoint.record.steps[-1].chosen["parameters"]
        equal = sum(LOW_RANK * (outputs + inputs) for outputs, inputs in linears)
        if found != equal:
            raise IntaglioError(f"the arm {arm} has {found} numbers, and a pair of rank {LOW_RANK} has {equal}")
        return checkpoint


def flops(model: nn.Module, tokens: int, steps: int) -> float:
    """Operations of a training: 6 a number that a token is multiplied with; a matrix that is made from factors counts
    as dense, and the making of it beside that in every step.

    Args:
        model: what was trained.
        tokens: that passed.
        steps: of the optimizer.
    """
    multiplied = sum(p.numel() for p in model.parameters())
    made = 0.0
    for module in model.modules():
        if isinstance(module, ElementsLinear):
            dense = module.in_features * module.out_features
            multiplied += dense - module.trained_parameters
            # Forward, made again backward, and a product for the gradient of each factor.
            made += 8.0 * module.rank * dense
    return 6.0 * multiplied * tokens + made * steps


@torch.no_grad()
def low_rank_norm(dense: Checkpoint, replaced: Checkpoint) -> float:
    """The mean of ‖γ BA‖ / ‖W0‖ over all projections; 1 where nothing was replaced.

    Args:
        dense: W0.
        replaced: made from the same weights.
    """
    modules = [m for m in replaced.model.modules() if isinstance(m, (LostLinear, ElementsLinear))]
    if not modules:
        return 1.0
    weights = [linear.read() for _, linear in anatomy(dense.model).all_linears()]
    pairs = zip(modules, weights, strict=True)
    return fmean(float((m.config.scales[0] * m.B @ m.A).norm() / weight.norm()) for m, weight in pairs)


def experiment(world: SourceCode) -> Experiment:
    """The claim in a world.

    Args:
        world: source code, the model's size and how it is trained.
    """
    return Experiment(
        slug="lost",
        claim="Trained from scratch on the same bytes of Python source, a small Llama predicts held-out files better"
        " with LOST than with low-rank pairs alone of equally many parameters, by more than 0.02 bits a byte.",
        metric=BITS,
        unit="bits a byte",
        direction="lower",
        delta=0.02,
        design="independent",
        factors=("training seed",),
        arms={name: arm.what for name, arm in ARMS.items()},
        baseline="low-rank",
        method="lost",
        parity="All arms of a seed begin with the same drawn weights and see the same windows in the same order; last"
        " step. Low-rank arms have exactly equal parameters in every projection; embeddings, norms and head are the"
        " same for all, but for the narrow model.",
        equal=("tokens",),
        secondaries=(
            Secondary("the SVD start alone: a pair that has it against one that is drawn", "low-rank", "low-rank-svd"),
            Secondary("LOST against the pair with its SVD start", "low-rank-svd", "lost"),
            Secondary("columns alone: the same start, no activation", "low-rank-svd", "lost-identity"),
            Secondary("the activation", "lost-identity", "lost"),
            Secondary("columns by the complement against columns at random", "lost-random", "lost"),
            Secondary("LOST against CoLA", "cola", "lost"),
            Secondary("LOST against SLTrain", "sltrain", "lost"),
            Secondary("LOST against a narrower model of full rank", "narrow", "lost"),
            Secondary("LOST against full rank", "full", "lost"),
        ),
        run_unit=Pretrain(world),
        pilot_runs=5,
        # An arm takes about a minute on one core: tuning, pilot and ten runs, five of them with all arms, are some
        # hundred of them.
        most_runs=10,
        secondary_runs=5,
        threads=1,
        settings={
            "world": asdict(world),
            "recipe": world.recipe(0),
            "inner width over width": INNER,
            "methods": {name: arm.method.model_dump() for name, arm in ARMS.items() if arm.method is not None},
            "width of the narrow model": ARMS["narrow"].width,
        },
        tuning=Tuning({arm: {rate: f"learning rate {rate}" for rate in RATES} for arm in ARMS}),
    )


WORLD = SourceCode(width=128, depth=4, context=256, steps=600, batch=4)
EXPERIMENTS = {"cpu": experiment(WORLD)}
"""By tier."""
