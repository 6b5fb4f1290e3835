"""The claim of BitNet b1.58 Reloaded: at twice the width a ternary language model is as good as one in full precision.

A run is a training seed. Byte-level Llamas of width h or 2h are trained on the same windows of Python source in one
order for equally many steps, each with the learning rate that validation files chose for its arm among the same three
and are measured, packed, on files that no arm has seen. The ternary layers have the layer norm of the paper's package
in front of them, so the arm in full precision that they are held against has the same norms in the same places; another
arm is the plain model without them.

Twice the width is about four times the parameters of the blocks: what is saved is bytes, and the record has them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.data.segments import Segments
from intaglio.evidence.experiment import Cost, Experiment, Outcome, Secondary, Tuning, Unit
from intaglio.evidence.worlds.source_code import SourceCode
from intaglio.measures.language_modeling import quality
from intaglio.measures.memory import peak_memory
from intaglio.methods.weights.bitnet import BitNet
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.replacement import ReplacedLinear, count_parameters, module_names, replace_modules
from intaglio.trainer import ModifierSession, TrainingModifier, TrainingRun, train

BITS = "bits per byte"
BYTES = "bytes of the weights"
LINEAR_BYTES = "bytes of the projections"

RATES = {"2e-3": 2e-3, "5e-3": 5e-3, "12e-3": 12e-3}
"""Learning rates that every arm chooses from."""


class Normed(ReplacedLinear):
    """A projection in full precision with the layer norm that a ternary one has in front of it.

    Args:
        linear: the projection, which keeps its weight.
    """

    slug = "bitnet"

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.weight, self.bias = linear.weight, linear.bias

    def dense(self) -> Tensor:
        """See the base."""
        return self.weight.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        """Return W norm(x) + b.

        Args:
            x: the input.
        """
        return F.linear(F.layer_norm(x, x.shape[-1:]), self.weight, self.bias)


class InnerNorms:
    """Modifier that puts layer norms in front of the projections, as ternary layers have them, and rounds nothing."""

    def attach(self, run: TrainingRun) -> ModifierSession:
        """Put the norms in; they stay as a part of the model."""
        names = module_names(run.model)
        replace_modules(
            run.model, {names[id(one.module)]: Normed(one.module) for _, one in anatomy(run.model).all_linears()}
        )  # type: ignore[arg-type]
        return ModifierSession()


@dataclass(frozen=True)
class Arm:
    """A model and how it is trained.

    Args:
        doubled: whether it has the width 2h.
        ternary: fields of `BitNet`; None: full precision.
        norms: whether a model in full precision has the ternary one's norms.
        what: in words.
    """

    doubled: bool
    ternary: Mapping[str, Any] | None
    norms: bool
    what: str

    def shapers(self) -> list[TrainingModifier]:
        """What shapes its training."""
        if self.ternary is not None:
            return [BitNet.paper(**self.ternary)]
        return [InnerNorms()] if self.norms else []


ARMS: dict[str, Arm] = {
    "full": Arm(False, None, True, "full precision, width h, with the layer norms of the ternary arms"),
    "median-2h": Arm(True, {"scale": "median"}, True, "ternary by the median, width 2h: about 4 times the parameters"),
    "mean-2h": Arm(True, {"scale": "mean"}, True, "ternary by the mean, width 2h: about 4 times the parameters"),
    "median-h": Arm(False, {"scale": "median"}, True, "ternary by the median, width h"),
    "full-2h": Arm(True, None, True, "full precision, width 2h, with the layer norms of the ternary arms"),
    "plain": Arm(False, None, False, "full precision, width h, the plain model without further norms"),
}
BASELINE, METHOD = "full", "median-2h"


@dataclass(frozen=True)
class Pretrain:
    """The runner: train one arm from scratch, measure it as it would be saved.

    Args:
        world: source code, the model's size at width h, and how it is trained.
    """

    world: SourceCode

    def __call__(self, arm: str, unit: Unit, seed: int) -> Outcome:
        """Run one arm with one training seed.

        Args:
            arm: a key of `ARMS`.
            unit: of which run; its choice is a key of `RATES`.
            seed: of weights, windows and order.
        """
        one = ARMS[arm]
        world = replace(self.world, learning_rate=RATES[unit.choice])
        windows = world.training(seed)
        checkpoint = world.new(seed % 2**32, width=world.width * (2 if one.doubled else 1))
        dense = sum(linear.shape[0] * linear.shape[1] for _, linear in anatomy(checkpoint.model).all_linears())
        with peak_memory(checkpoint.device) as peak:
            done = train(checkpoint, windows, shape=one.shapers(), **world.recipe(seed % 2**32))
        measured = self._measured_on(unit)
        losses = quality(checkpoint, measured, batch_size=16).losses
        finite = [loss for loss in losses if loss is not None]
        parameters = count_parameters(checkpoint.model)
        return Outcome(
            values={
                BITS: {"seed": fmean(finite) / math.log(2) if len(finite) == len(losses) else None},
                BYTES: {"seed": float(checkpoint.bytes)},
                LINEAR_BYTES: {"seed": float(projection_bytes(checkpoint))},
            },
            cost=Cost(
                tokens=done.tokens,
                # Forward and backward of the blocks and the head; rounding is no product.
                flops=6.0 * (dense + checkpoint.vocabulary * checkpoint.config.hidden_size) * done.tokens,
                parameters=parameters,
                seconds=done.seconds,
                peak_bytes=peak.bytes,
            ),
            shared={"windows": windows.digest, "measured": measured.digest},
        )

    def _measured_on(self, unit: Unit) -> Segments:
        if unit.stage == "tuning":
            return self.world.validation(unit.base).segments
        return self.world.documents(unit.stage, unit.base).segments


def projection_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the blocks' projections, scales and biases with them.

    Args:
        checkpoint: any.
    """
    blocks = anatomy(checkpoint.model).blocks
    found = {id(p): p for block in blocks for m in block.modules() for p in _own(m)}
    return sum(p.numel() * p.element_size() for p in found.values())


def _own(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False)) if isinstance(module, (nn.Linear, ReplacedLinear)) else []


def experiment(world: SourceCode) -> Experiment:
    """The claim in a world.

    Args:
        world: the source and the model's size at width h.
    """
    return Experiment(
        slug="bitnet",
        claim=f"Trained on the same bytes of Python source, a ternary Llama (median scale, 8-bit activations) of width "
        f"{2 * world.width} predicts held-out files as well as one in full precision of width {world.width} with the "
        "same inner norms: not worse by more than 0.02 bits per byte.",
        metric=BITS,
        unit="bits per byte",
        direction="lower",
        delta=0.02,
        design="independent",
        factors=("training seed",),
        arms={name: arm.what for name, arm in ARMS.items()},
        baseline=BASELINE,
        method=METHOD,
        kind="as good as",
        parity="All arms of a seed see the same windows in the same order for equally many steps; last step. The "
        "ternary arms of width 2h have about four times the parameters of the blocks and of the operations.",
        equal=("tokens",),
        secondaries=(
            Secondary("the median against the mean, width 2h", "mean-2h", "median-2h"),
            Secondary("ternary against full precision at the same width h", "full", "median-h"),
            Secondary("ternary against full precision at the same width 2h", "full-2h", "median-2h"),
            Secondary("ternary of width 2h against the plain model of width h, without inner norms", "plain", METHOD),
            Secondary(
                "bytes of the projections: ternary of width 2h against full precision of h",
                "full",
                METHOD,
                LINEAR_BYTES,
            ),
            Secondary("bytes of all weights: ternary of width 2h against full precision of h", "full", METHOD, BYTES),
        ),
        run_unit=Pretrain(world),
        pilot_runs=5,
        most_runs=16,
        secondary_runs=5,
        threads=1,
        settings={
            "world": asdict(world),
            "learning rates": list(RATES.values()),
            "ternary": {name: arm.shapers()[0].model_dump() for name, arm in ARMS.items() if arm.ternary is not None},  # type: ignore[attr-defined]
        },
        why="Claim, delta and tier are as named. Widths are among the smallest of the paper, so that all runs together "
        "fit the tier's time.",
        tuning=Tuning({arm: {rate: f"learning rate {rate}" for rate in RATES} for arm in ARMS}),
    )


WORLD = SourceCode(width=32, depth=3, context=256, steps=800, batch=8, documents_run=100, documents_pilot=40)
EXPERIMENTS = {"cpu": experiment(WORLD)}
"""By tier."""
