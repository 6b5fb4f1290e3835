"""AWRS: sampling from the constrained model against sampling from the locally constrained one."""

from __future__ import annotations

from intaglio.evidence.designs.sample import CHECKS, TOTAL_VARIATION, Sample
from intaglio.evidence.engine.claim import Arm, Claim
from intaglio.methods.decoding.awrs import AWRS

CLAIM = Claim(
    slug="awrs",
    version=1,
    says="At equal numbers of outputs and model calls, AWRS with sequential Monte Carlo is nearer to the model's"
    " distribution given the constraint than locally constrained decoding, while checking a few tokens a step.",
    metric=TOTAL_VARIATION,
    delta=0.05,
    design=Sample(),
    arms={
        "local": Arm(
            "locally constrained decoding: draws of the masked model, equally weighted",
            {"method": AWRS(proper_weights=False, ess_threshold=0.0)},
        ),
        "awrs": Arm("AWRS with sequential Monte Carlo", {"method": AWRS()}),
        "importance": Arm("AWRS without resampling", {"method": AWRS(ess_threshold=0.0)}),
        "two-loop": Arm("AWRS with the paper's estimator of two loops", {"method": AWRS(estimator="two_loop")}),
        "five-accepts": Arm("AWRS with five accepted tokens an estimate", {"method": AWRS(max_accepts=5)}),
        "systematic": Arm("AWRS with systematic resampling", {"method": AWRS(resampling="systematic")}),
        "posterior": Arm("draws from the exact distribution", {"exact": True}),
    },
    baseline="local",
    method="awrs",
    ceiling="posterior",
    ablations=("importance", "two-loop", "five-accepts", "systematic"),
    unit_names=("random model and constraint",),
    metrics=(CHECKS,),
    parity="Every arm has ten outputs of at most seven tokens, one model call for each token of an output; the"
    " posterior is exact by enumeration. Both check tokens by rejection, as many as they need.",
    use_when="the constraint is a program or the distribution of the outputs matters, not only their validity",
    otherwise="locally constrained decoding with a grammar mask",
    golden={
        "local": {"total variation to the posterior": 0.211159},
        "awrs": {"total variation to the posterior": 0.170756},
        "two-loop": {"total variation to the posterior": 0.253705},
        "five-accepts": {"total variation to the posterior": 0.265406},
    },
)
