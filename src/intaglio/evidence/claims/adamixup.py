"""AdaMixUp: where classes lie between the points of another, a classifier errs less than with mixup."""

from __future__ import annotations

from typing import Any

from intaglio.evidence.designs.classify import ACCURACY, TEST_LOSS, Classify
from intaglio.evidence.engine.claim import Arm, Claim
from intaglio.evidence.testbeds.rings import Rings
from intaglio.methods.training.adamixup import AdaMixUp
from intaglio.methods.training.decoupled_mixup import DecoupledMixup


def learned(**fields: Any) -> dict[str, Any]:
    """Return the settings of an arm of the modifier."""
    return {"modifiers": (AdaMixUp(hidden_size=64, **fields),)}


CLAIM = Claim(
    slug="adamixup",
    version=1,
    says="On classes that lie between points of another class, a classifier trained with AdaMixUp is more accurate than"
    " with mixup.",
    metric=ACCURACY,
    delta=0.5,
    design=Classify(Rings(), width=64, steps=800, batch_size=20),
    arms={
        "mixup": Arm(
            "mixup, alpha chosen on validation points",
            {"modifiers": (DecoupledMixup(eta=0.0),)},
            tune={"learning_rate": (0.03, 0.1, 0.3), "alpha": (0.1, 0.2, 0.4, 1.0)},
        ),
        "adamixup": Arm(
            "shares from a learned region for each pair",
            learned(),
            tune={"learning_rate": (0.03, 0.1, 0.3), "intrusion_weight": (0.25, 0.5, 1.0, 2.0)},
        ),
        # In the arm's settings, which override the weight that is tuned for the method.
        "without discriminator": Arm("the policy without the intrusion loss", learned() | {"intrusion_weight": 0.0}),
        "3 folds": Arm("mixes of three points", learned(folds=3)),
        "mixup and clean": Arm(
            "mixup with alpha 1 and as many unmixed points, as AdaMixUp has them",
            learned(region=[0.0, 1.0, 0.0], intrusion_weight=0.0),
        ),
        "no mixing": Arm("cross-entropy of the points as they are"),
    },
    baseline="mixup",
    method="adamixup",
    ablations=("without discriminator", "3 folds"),
    reported=("mixup and clean", "no mixing"),
    closed=("alpha",),
    metrics=(TEST_LOSS,),
    equal=("tokens", "parameters"),
    parity="The same points, steps and network; the classifier's loss is a mean over 20 rows a step in every arm, in"
    " AdaMixUp 10 mixed and 10 unmixed. Policy and discriminator come on top: about twice the time.",
    minutes=30,
    use_when="mixed examples of a class can look like another class",
    otherwise="mixup with an alpha chosen on validation data",
    toy={"width": 16, "steps": 150, "batch_size": 10},
    golden={"mixup": {TEST_LOSS.name: 0.62541}, "adamixup": {TEST_LOSS.name: 0.845401}},
)
