"""GBA: features that firing-rate targets recover against those that a fixed number of active latents recovers."""

from __future__ import annotations

from typing import Any

from intaglio.dictionaries.baselines import TopKSAE
from intaglio.evidence.designs.recover_features import ACTIVE, ALIVE, LOOSELY, RECOVERED, UNEXPLAINED, RecoverFeatures
from intaglio.evidence.engine.claim import Arm, Claim
from intaglio.evidence.testbeds.sparse_features import SparseFeatures
from intaglio.methods.activations.gba_sae import GBASAE

RATES = (3e-4, 1e-3, 3e-3)
KS = (10, 20, 30, 50)


def topk(*ks: int) -> dict[str, Any]:
    """Return the settings of an arm of TopK dictionaries."""
    return {"dictionaries": tuple(TopKSAE(k=k) for k in ks)}


def gba(**fields: Any) -> dict[str, Any]:
    """Return the settings of an arm of GBA."""
    return {"dictionaries": (GBASAE(**fields),), **fields}


CLAIM = Claim(
    slug="gba_sae",
    version=1,
    says="On sums of known directions with mixed sparsity, and without the true frequencies, GBA recovers more of the"
    " directions than TopK autoencoders whose k is not known.",
    metric=RECOVERED,
    delta=0.05,
    design=RecoverFeatures(),
    arms={
        "topk": Arm(f"TopK, the mean over k = {', '.join(map(str, KS))}", topk(*KS)),
        "gba": Arm(
            "GBA with ten groups, targets from a half to a thousandth",
            gba(),
            tune={"learning_rate": RATES, "adapt_every": (5, 20)},
        ),
        "true directions": Arm("the directions themselves", {"oracle": True}),
        "one group": Arm(
            "BA: one group with the true frequency",
            gba(groups=1, highest_frequency=SparseFeatures().frequency, lowest_frequency=SparseFeatures().frequency),
        ),
        "relu": Arm("GBA with ReLU instead of the jump", gba(activation="relu")),
        "best k": Arm("TopK with k = 10, the nearest of these to the mean sparsity", topk(10)),
        "mean k": Arm("TopK with k = 6, the mean sparsity", topk(6)),
    },
    baseline="topk",
    method="gba",
    ceiling="true directions",
    ablations=("one group", "relu"),
    reported=("best k", "mean k"),
    tune={"learning_rate": (*RATES, 1e-2), "auxiliary": (0.0, 1 / 32)},
    closed=("adapt_every", "auxiliary"),
    looks=(5, 10),
    metrics=(LOOSELY, UNEXPLAINED, ACTIVE, ALIVE),
    equal=("tokens",),
    parity="Equal steps on the same samples from the same directions, 256 latents each; eight and six trials. An arm of"
    " TopK has four trainings a unit, so its runs take longer.",
    minutes=60,
    use_when="the number of active features is not known, or differs from input to input",
    otherwise="TopK with k near the number of active features",
    golden={"topk": {UNEXPLAINED.name: 5.47219}, "gba": {UNEXPLAINED.name: 0.302104}},
)
