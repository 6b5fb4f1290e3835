"""POINTS: a greedy soup of models tuned on data sets with conflicting labels, against the best of the models."""

from __future__ import annotations

from intaglio.evidence.designs.classify import ACCURACY, TEST_LOSS
from intaglio.evidence.designs.soups import ON_CHOICE, Soups
from intaglio.evidence.engine.claim import Arm, Claim

CLAIM = Claim(
    slug="points",
    version=1,
    says="Of five models tuned from one start on data sets whose label conventions conflict, a greedy soup is more"
    " accurate on held-out images than the best of them, both chosen on the same validation images.",
    metric=ACCURACY,
    delta=0.5,
    design=Soups(),
    arms={
        "best": Arm("the best single model of five", {"mode": "maximum", "top": 1}),
        "greedy": Arm("greedy soup", {"mode": "greedy"}),
        "maximum": Arm("mean of the best three", {"mode": "maximum", "top": 3}),
        "uniform": Arm("mean of all five", {"mode": "uniform"}),
        "union": Arm("one model tuned on all data sets, five times the steps", {"mode": "union"}),
    },
    baseline="best",
    method="greedy",
    ablations=("maximum", "uniform"),
    reported=("union",),
    tune={"learning_rate": (0.02, 0.05, 0.1)},
    tune_units=3,
    metrics=(TEST_LOSS, ON_CHOICE),
    equal=("tokens", "flops"),
    parity="Every arm costs five tunings from the same start, of the same steps and batch size; models are chosen on"
    " images that no model was trained on and that are not measured. Three trials each.",
    minutes=15,
    use_when="several tuned versions of one model exist, each on data of its own, and cannot be trained again together",
    otherwise="train once on all the data",
    toy={"base_steps": 100, "steps": 40},
    golden={
        "best": {TEST_LOSS.name: 2.6497},
        "greedy": {TEST_LOSS.name: 2.51553},
        "maximum": {TEST_LOSS.name: 2.40418},
    },
)
