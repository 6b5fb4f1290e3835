"""ELR: with wrong labels, targets from early predictions against stopping early on a noisy validation split."""

from __future__ import annotations

from intaglio.evidence.designs.classify import ACCURACY, DETECTION, MEMORISED, TEST_LOSS, Classify
from intaglio.evidence.engine.claim import Arm, Claim
from intaglio.evidence.testbeds.digits import Digits
from intaglio.methods.training.elr import ELR
from intaglio.trainer.classification import Classification

NOISE = 0.4
PLUS_PASSES = 3
"""Passes of a step of ELR+: two networks, and the forward passes of their averages."""

CLAIM = Claim(
    slug="elr",
    version=1,
    says="Trained on images of which 40 % have a wrong label, a network with early-learning regularisation is more"
    " accurate than with cross-entropy stopped on a validation split with as many wrong labels.",
    metric=ACCURACY,
    delta=1.0,
    design=Classify(Digits(noise=NOISE, run_images=400), width=256, steps=1000, batch_size=128),
    arms={
        "stopped": Arm(
            "cross-entropy, the epoch that is best on 250 validation images with 40 % wrong labels", {"stopped": True}
        ),
        "elr": Arm("ELR, beta 0.7 and lambda 3 as published", {"modifiers": (ELR(),)}),
        "clean labels": Arm("cross-entropy on the true labels", {"clean": True}),
        "no average": Arm("ELR with beta 0: the target is the current prediction", {"modifiers": (ELR(beta=0.0),)}),
        "cross-entropy": Arm("cross-entropy to the last step"),
        "label smoothing": Arm(
            "cross-entropy with smoothed labels to the last step",
            {"objective": Classification(label_smoothing=0.2)},
        ),
        "elr plus": Arm(
            "ELR+, its first network, a third of the steps",
            {"modifiers": (ELR.plus(second_network="all"),), "passes": PLUS_PASSES},
        ),
    },
    baseline="stopped",
    method="elr",
    ceiling="clean labels",
    ablations=("no average",),
    reported=("cross-entropy", "label smoothing", "elr plus"),
    tune={"learning_rate": (0.02, 0.05, 0.1, 0.2)},
    tune_units=2,
    metrics=(TEST_LOSS, MEMORISED, DETECTION),
    parity="The same images with the same wrong labels, network, steps and batch size; the learning rate of both is"
    " tuned on validation images with wrong labels. ELR takes its last step and no validation images; a step of ELR+"
    " counts as three.",
    minutes=30,
    use_when="many labels are wrong and no clean ones are at hand to find a stopping point",
    otherwise="cross-entropy, stopped early",
    toy={"steps": 200, "width": 32},
    golden={
        "stopped": {TEST_LOSS.name: 2.15728},
        "elr": {TEST_LOSS.name: 2.03597},
        "cross-entropy": {TEST_LOSS.name: 2.06228},
    },
)
