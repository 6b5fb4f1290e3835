"""MarkovLM: hidden states align with the true predictive kernel, against regression of random targets."""

from __future__ import annotations

from intaglio.evidence.designs.predictive_alignment import (
    ALIGNMENT,
    HALF,
    LEFT,
    PERMUTED,
    TENTH,
    WEIGHTED,
    PredictiveAlignment,
)
from intaglio.evidence.engine.claim import Arm, Claim

CLAIM = Claim(
    slug="markov_lm",
    version=1,
    says="Training by cross-entropy aligns hidden states with the similarity of contexts by their true next-token"
    " distributions, beyond what training the same network on unrelated targets does at equal reduction of its loss.",
    metric=ALIGNMENT,
    delta=0.10,
    design=PredictiveAlignment(),
    arms={
        "targets": Arm("squared error to random targets of the same rank", {"trains": "targets"}),
        "distributions": Arm("cross-entropy with the true distributions", {"trains": "distributions"}),
        "oracle": Arm("square roots of the distributions as hidden states", {"trains": "oracle"}),
        "linear kernel": Arm(
            "the same, inner products of distributions as the kernel", {"trains": "distributions", "kernel": "linear"}
        ),
        "Jensen-Shannon": Arm(
            "the same, exp(-JS) as the kernel", {"trains": "distributions", "kernel": "jensen_shannon"}
        ),
        "permuted": Arm("cross-entropy with the distributions of other contexts", {"trains": "permuted"}),
        "untrained": Arm("the network before training", {"trains": "nothing"}),
    },
    baseline="targets",
    method="distributions",
    ceiling="oracle",
    ablations=("linear kernel", "Jensen-Shannon"),
    reported=("permuted", "untrained"),
    unit_names=("random source and network",),
    metrics=(HALF, TENTH, WEIGHTED, PERMUTED, LEFT),
    parity="The same network, rate and contexts; each arm trains until 2 % of its reducible loss is left (KL to true"
    " distributions, or squared error), and the alignment on the way is reported. The kernel is of the true"
    " distributions, never of the model's own.",
    minutes=10,
    use_when="you want to see whether a model's hidden states are arranged by what they predict",
    otherwise="the loss alone",
    golden={
        "targets": {ALIGNMENT.name: 0.105163, WEIGHTED.name: 0.101325},
        "distributions": {HALF.name: 0.622394, ALIGNMENT.name: 0.954103, LEFT.name: 0.0184835},
    },
)
