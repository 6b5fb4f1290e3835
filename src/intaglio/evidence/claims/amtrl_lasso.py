"""L1-A-MTRL: the Lasso's allocation of source samples against the least-norm one, at equal samples of all sources."""

from __future__ import annotations

from intaglio.evidence.designs.allocate_samples import DENSE_ERROR, TARGET_ERROR, AllocateSamples
from intaglio.evidence.engine.claim import Arm, Claim

CLAIM = Claim(
    slug="amtrl_lasso",
    version=1,
    says="At equal source samples, exploration included, allocating them by the Lasso's relevance gives a lower error"
    " on the target than by the least-norm relevance.",
    metric=TARGET_ERROR,
    delta=0.05,
    design=AllocateSamples(),
    arms={
        "L2": Arm(
            "least-norm relevance, samples by its square (2022)",
            {"strategy": "l2"},
            tune={"explore": (10, 15, 25, 35, 50, 70)},
        ),
        "L1": Arm(
            "Lasso's relevance, samples by its absolute value",
            {"strategy": "l1"},
            tune={"explore": (25, 50, 70), "penalty": (0.05, 0.2)},
        ),
        "known L1": Arm("basis pursuit on the true heads", {"strategy": "l1", "known": True}),
        "validated": Arm("L1, its penalty chosen on target samples", {"strategy": "l1", "penalty_rule": "validation"}),
        "known L2": Arm("least norm on the true heads", {"strategy": "l2", "known": True}),
        "uniform": Arm("equally many of each source", {"strategy": "uniform"}),
    },
    baseline="L2",
    method="L1",
    ceiling="known L1",
    ablations=("validated",),
    reported=("known L2", "uniform"),
    unit_names=("problem",),
    looks=(10, 20, 40),
    tune_units=3,
    metrics=(DENSE_ERROR,),
    equal=("tokens",),
    parity="6,000 samples of 60 sources for each target, those of the exploration included; the same sources, order of"
    " samples, 1,000 target samples and fits. Targets equal the head of one of the sources; a target that does not is"
    " measured beside them.",
    minutes=15,
    use_when="a target is close to few of many source tasks and samples of these are what costs",
    otherwise="equal shares, when the target resembles no source in particular",
    golden={
        "L2": {TARGET_ERROR.name: 0.0332664, DENSE_ERROR.name: 0.0773484},
        "L1": {TARGET_ERROR.name: 0.040402, DENSE_ERROR.name: 0.048489},
    },
)
