"""BT2: new queries among old documents without losing what the new encoder knows, against BCT of equal width."""

from __future__ import annotations

from typing import Any

from intaglio.evidence.designs.compatible import BOTH, DIMENSIONS, LOSS, NEW_NEW, NEW_OLD, OLD_OLD, Compatible
from intaglio.evidence.engine.claim import Arm, Claim
from intaglio.methods.retrieval.bt2 import BT2

WEIGHTS = (1.0, 10.0, 50.0)


def head(**fields: Any) -> dict[str, Any]:
    """Return the settings of an arm that trains a head."""
    return {"method": BT2(**fields)}


CLAIM = Claim(
    slug="bt2",
    version=1,
    says="An encoder whose vectors are a rotation of new information beside a few old dimensions is better at searching"
    " old and new documents, on average, than one vector of equal width trained by BCT with its best weight.",
    metric=BOTH,
    delta=0.01,
    design=Compatible(),
    arms={
        "bct": Arm(
            "one vector of equal width, influence loss",
            head(arm="bct"),
            tune={"influence_weight": WEIGHTS, "learning_rate": (3e-4, 1e-3, 3e-3)},
        ),
        "bt2": Arm("basis transformation, 32 dimensions added", head()),
        "bct distilled": Arm("BCT that also imitates the new encoder", head(arm="bct_distill")),
        "naive": Arm("old and new dimensions side by side", head(arm="naive")),
        "procrustes": Arm("a rotation, no training", head(arm="procrustes")),
        "re-embedded": Arm("new encoder, every document encoded again", {"reembed": True}),
    },
    baseline="bct",
    method="bt2",
    ablations=("bct distilled", "naive"),
    reported=("procrustes", "re-embedded"),
    looks=(5, 10),
    tune={"alignment_weight": WEIGHTS, "learning_rate": (3e-4, 1e-3, 3e-3)},
    unit_names=("training of the old encoder and of the head",),
    metrics=(NEW_OLD, NEW_NEW, OLD_OLD, LOSS, DIMENSIONS),
    parity="The same cached vectors of both encoders, pairs, batches and steps; equal dimensions, but for the arm of"
    " blocks side by side and the rotation. Nine trials each on validation pairs. Scores of every arm are plain"
    " products. BT2 sees the new encoder's vectors as a target; so does the distilled BCT.",
    minutes=45,
    use_when="an index is too large to encode again at once, and new queries must search it meanwhile",
    otherwise="encoding every document again",
    reason="Not piloted beyond the benchmark of retrieval, one seed on pilot documents: the old encoder reaches nDCG@10"
    " .23 since it is trained from scratch (.02 before), a head takes 25 seconds, and Procrustes is ahead of BT2.",
    toy={},
    golden={"bct": {LOSS.name: 1.35622}, "bt2": {LOSS.name: 1.39392}},
)
