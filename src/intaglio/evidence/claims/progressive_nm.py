"""Progressive N:M training: fading pruned weights out against SR-STE, at 1:64 and equal steps."""

from __future__ import annotations

from typing import Any

from intaglio.evidence.designs.classify import ACCURACY, TEST_LOSS, Classify
from intaglio.evidence.engine.claim import Arm, Claim
from intaglio.evidence.testbeds.digits import Digits
from intaglio.methods.weights.progressive_nm import ProgressiveNM

RATES = (0.02, 0.05, 0.1, 0.2)


def sparse(recipe: str, **fields: Any) -> dict[str, Any]:
    """Return the settings of an arm; the output layer, module 5, stays dense."""
    return {"modifiers": (ProgressiveNM(pattern="1:64", recipe=recipe, ignore=["5"], **fields),)}  # type: ignore[arg-type]


CLAIM = Claim(
    slug="progressive_nm",
    version=2,
    says="At equal steps, a network that keeps 1 of 64 weights is more accurate if its pruned weights fade out"
    " gradually than if it is trained with SR-STE.",
    metric=ACCURACY,
    delta=1.0,
    design=Classify(Digits(), width=192, steps=750, batch_size=32),
    arms={
        "SR-STE": Arm(
            "SR-STE, its λ tuned", sparse("sr-ste"), tune={"learning_rate": RATES, "sr_decay": (2e-4, 2e-3, 2e-2)}
        ),
        "mdgf-exp": Arm(
            "MdGf-Exponential under the chain rule",
            sparse("mdgf-exp"),
            tune={"learning_rate": RATES, "finetune": (0.1, 0.25, 0.5)},
        ),
        "dense": Arm("no pruning"),
        "linear": Arm("MdGf-Linear", sparse("mdgf-linear")),
        "straight-through": Arm("MdGf-Exponential, gradient of the authors' code", sparse("mdgf-exp", gradient="ste")),
        "published λ": Arm("SR-STE with its published λ", {**sparse("sr-ste"), "sr_decay": 2e-4}),
        "STE": Arm("the straight-through estimator", sparse("ste")),
    },
    baseline="SR-STE",
    method="mdgf-exp",
    ceiling="dense",
    ablations=("linear", "straight-through"),
    reported=("published λ", "STE"),
    looks=(5, 10, 20),
    tune_units=3,
    metrics=(TEST_LOSS,),
    equal=("tokens",),
    parity="The same weights, images, order and steps; twelve trials each.",
    minutes=30,
    use_when="you train with far fewer weights than 2:4 keeps (tested at 1 of 64)",
    otherwise="SR-STE with its λ tuned",
    reason="Version 1 trained models of 3.4 bits a byte that sparsity does not hurt (dense 3.40, 1:16 3.39).",
    toy={"width": 64},
    golden={"SR-STE": {TEST_LOSS.name: 2.2949}, "mdgf-exp": {TEST_LOSS.name: 2.29473}},
)
