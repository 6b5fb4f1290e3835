"""BICO: facts read in one order are recalled in the other, at equal optimizer steps.

A run takes minutes, so there is a single look and no tuning. In a pilot BICO recalled hardly any new fact in reverse
before a third of these steps, and three in ten after half of them; with half the width or depth it learned neither
direction.
"""

from __future__ import annotations

from typing import Any

from intaglio.evidence.designs.base import Measured, Values
from intaglio.evidence.designs.training import Pretrain
from intaglio.evidence.engine.claim import Arm, Claim, Metric
from intaglio.evidence.testbeds.two_way_facts import TwoWayFacts, recalled
from intaglio.methods.objectives.bico import BICO

REVERSE = Metric("new facts recalled in reverse", "points", "higher", continuous=False)
FORWARD = Metric("new facts recalled forward", "points", "higher", continuous=False)
BACKGROUND = Metric("background recalled in reverse", "points", "higher", continuous=False)
SCORE = Metric("log-probability of the reverse answer", "nats", "higher")


def recall(measured: Measured) -> Values:
    """Return the percentage of exact answers, and the mean log-probability of those in reverse, on the unit's facts."""
    bed: Any = measured.bed
    both, forward_only = bed.facts(measured.key.seed)
    asked = {REVERSE: (forward_only, True), FORWARD: (forward_only, False), BACKGROUND: (both, True)}
    model = measured.checkpoint.model
    answers = {metric: recalled(model, bed.questions(*questions)) for metric, questions in asked.items()}
    shares = {metric.name: 100 * float(right.float().mean()) for metric, (right, _) in answers.items()}
    return {**shares, SCORE.name: float(answers[REVERSE][1].mean())}


CLAIM = Claim(
    slug="bico",
    version=2,
    says="Facts that a model reads in one order alone are recalled in the other order after training with BICO, and"
    " not after next-token prediction.",
    metric=REVERSE,
    delta=10.0,
    design=Pretrain(TwoWayFacts(steps=3000), measures=(recall,)),
    arms={
        "next token": Arm("next-token prediction", {"objective": BICO(denoise_ratio=0.0)}),
        "bico": Arm("BICO: half of the batches are denoised", {"objective": BICO()}),
        "no flip": Arm("BICO with stock rotations", {"objective": BICO(flip=False)}),
        "MNTP": Arm(
            "MNTP of LLM2Vec: masked tokens are keys, stock rotations",
            {"objective": BICO(flip=False, attend_masked=True)},
        ),
    },
    baseline="next token",
    method="bico",
    ablations=("no flip",),
    reported=("MNTP",),
    looks=(5,),
    equal=("tokens",),
    metrics=(FORWARD, BACKGROUND, SCORE),
    parity="Equal steps and tokens, the same documents in the same order; last step. No document states a new fact in"
    " reverse. Half of BICO's batches are denoised, so it predicts fewer next tokens; answers are exact, two tokens.",
    minutes=60,
    reason="after the 1,500 steps of version 1 neither arm recalled a new fact in reverse; both have twice as many now",
    use_when="facts in the training texts are asked in both orders",
    otherwise="next-token prediction",
    toy={"steps": 200, "width": 32},
    golden={"next token": {SCORE.name: -5.42518}, "bico": {SCORE.name: -6.52724}},
)
