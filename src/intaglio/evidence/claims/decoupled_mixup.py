"""Decoupled mixup: with 20 labels a class, a classifier is more accurate than with the same mixup alone."""

from __future__ import annotations

from typing import Any

from intaglio.evidence.baselines.saliency_mix import SaliencyMix
from intaglio.evidence.designs.classify import ACCURACY, TEST_LOSS, Classify
from intaglio.evidence.engine.claim import Arm, Claim
from intaglio.evidence.testbeds.digits import Digits
from intaglio.methods.training.decoupled_mixup import DecoupledMixup


def mixed(**fields: Any) -> dict[str, Any]:
    """Return the settings of an arm of the modifier."""
    return {"modifiers": (DecoupledMixup(**fields),)}


CLAIM = Claim(
    slug="decoupled_mixup",
    version=1,
    says="With 20 labels a class, a classifier trained with mixup and the decoupled terms is more accurate than with"
    " mixup alone.",
    metric=ACCURACY,
    delta=0.5,
    design=Classify(
        Digits("mnist5k", training_images=200, balanced=True, validation_images=700, run_images=1200, pilot_images=450),
        width=16,
        steps=600,
        batch_size=50,
        network="cnn",
    ),
    arms={
        "mixup": Arm("mixup cross-entropy", mixed(eta=0.0)),
        "decoupled": Arm("mixup with decoupled terms, eta 0.1, in proportion to the shares", mixed()),
        "paper's terms": Arm("the terms of the paper, which do not depend on the shares", mixed(rescale="none")),
        "eta 1": Arm("terms of ten times the weight", mixed(eta=1.0)),
        "dynamic": Arm("mixing of salient blocks, with a second pass a step", {"modifiers": (SaliencyMix(),)}),
        "no mixing": Arm("cross-entropy of the images as they are"),
    },
    baseline="mixup",
    method="decoupled",
    ablations=("paper's terms", "eta 1"),
    reported=("dynamic", "no mixing"),
    tune={"learning_rate": (0.03, 0.1, 0.3), "alpha": (0.2, 1.0)},
    closed=("alpha",),
    metrics=(TEST_LOSS,),
    equal=("tokens", "parameters"),
    parity="The same images, batches, partners and shares, steps and network; eta is not tuned. The dynamic arm takes"
    " about twice the time.",
    minutes=45,
    use_when="a classifier has few labels and is trained with mixup, CutMix or ManifoldMix",
    otherwise="the same mixing without the terms",
    toy={"width": 8, "steps": 100, "batch_size": 20},
    golden={
        "mixup": {TEST_LOSS.name: 1.95911},
        "decoupled": {TEST_LOSS.name: 1.87254},
        "paper's terms": {TEST_LOSS.name: 1.87907},
    },
)
