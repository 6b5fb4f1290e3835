"""BERT4Rec: masked-item training ranks the next item better than SASRec with sampled negatives, at equal seconds."""

from __future__ import annotations

from typing import Any

from intaglio.evidence.designs.recommend import HIT_RATIO, ITEM_LOSS, NDCG, Recommend
from intaglio.evidence.engine.claim import Arm, Claim
from intaglio.evidence.testbeds.movielens import MovieLens
from intaglio.methods.objectives.bert4rec import BERT4Rec
from intaglio.methods.objectives.sasrec import SASRec

STEPS = {"bert4rec": 400, "bce": 312, "softmax": 210}
"""Steps that take equal seconds: 96, 123 and 183 ms each, alternated on one core of two, the other one busy."""


def causal(loss_type: Any) -> dict[str, Any]:
    """Return the settings of SASRec with a loss."""
    return {"model": {"family": "gpt2"}, "objective": SASRec(loss_type=loss_type), "steps": STEPS[loss_type]}


def masked(**fields: Any) -> dict[str, Any]:
    """Return the settings of BERT4Rec."""
    return {"model": {"family": "bert"}, "objective": BERT4Rec(**fields), "steps": STEPS["bert4rec"]}


CLAIM = Claim(
    slug="bert4rec",
    version=1,
    says="A bidirectional encoder trained to fill in masked items ranks a user's next item better than SASRec, a causal"
    " decoder trained with sampled negatives.",
    metric=NDCG,
    delta=0.005,
    design=Recommend(MovieLens()),
    arms={
        "SASRec, BCE": Arm("SASRec with binary cross-entropy and a sampled negative, as in the paper", causal("bce")),
        "BERT4Rec": Arm("BERT4Rec: 20 % of the items masked, the last alone in a window of eleven", masked()),
        "no last-item samples": Arm(
            "BERT4Rec without windows whose last item alone is masked", masked(last_only_ratio=0.0)
        ),
        "SASRec, softmax": Arm("SASRec with a softmax over all items", causal("softmax")),
        "popularity": Arm("items by their number of interactions", {"popularity": True}),
    },
    baseline="SASRec, BCE",
    method="BERT4Rec",
    ablations=("no last-item samples",),
    reported=("SASRec, softmax", "popularity"),
    metrics=(HIT_RATIO, ITEM_LOSS),
    looks=(5, 10),
    tune={"learning_rate": (1e-3, 2e-3, 4e-3)},
    parity="The same users' sequences without their last two items, width, depth, heads, dropout and batch; steps for"
    " equal seconds. All units rank the same users' last items among all unseen items; what varies is the training.",
    minutes=60,
    use_when="a recommender may train for long on logs of interactions",
    otherwise="SASRec with a full softmax",
    toy={"steps": 20, "learning_rate": 1e-2},
    golden={"SASRec, BCE": {ITEM_LOSS.name: 2.36486}, "BERT4Rec": {ITEM_LOSS.name: 3.50836}},
)
