"""Causal2Vec: a Contextual token in front of a causal decoder beats last-token pooling of the same decoder."""

from __future__ import annotations

from typing import Any

from intaglio.evidence.baselines.late_concatenation import LateConcatenation
from intaglio.evidence.designs.encoders import trained
from intaglio.evidence.designs.retrieve import MRR, NDCG, RANKING_LOSS, Retrieve
from intaglio.evidence.engine.claim import Arm, Claim
from intaglio.evidence.testbeds.docstring_models import DocstringModels
from intaglio.methods.retrieval.causal2vec import Causal2Vec
from intaglio.trainer.contrastive import Contrastive

SIZES: dict[str, Any] = {"query_length": 24, "document_length": 48}
BED = DocstringModels()


def context(objective: type[Causal2Vec] = Causal2Vec, **fields: Any) -> dict[str, Any]:
    """Return the settings of an arm with the pretrained encoder as light encoder, trained at the decoder's rate."""
    method = objective(**{**SIZES, "encoder_lr_ratio": 1.0, **fields})
    return {"retriever": trained, "objective": method, "model": "llama", "light_encoder": "modernbert"}


def alone(objective: Any, model: str = "llama") -> dict[str, Any]:
    """Return the settings of an arm of a single model."""
    return {"retriever": trained, "objective": objective, "model": model}


CLAIM = Claim(
    slug="causal2vec",
    version=2,
    says="A decoder that reads a light encoder's Contextual token before each text retrieves better than last-token"
    " pooling of the same decoder, at equal steps.",
    metric=MRR,
    delta=0.02,
    design=Retrieve(BED),
    arms={
        "last token": Arm(
            "state of the end token, no Contextual token",
            alone(Causal2Vec(ctx_position="none", pooling="eos", **SIZES)),
        ),
        "causal2vec": Arm("states of the Contextual and the end token, of twice the width", context()),
        "projected": Arm("both states, projected to the decoder's width", context(output_size=BED.width)),
        "encoder alone": Arm(
            "the light encoder, mean pooling", alone(Contrastive(pooling="mean", **SIZES), "modernbert")
        ),
        "late concatenation": Arm(
            "last token of the decoder joined with the light encoder's vector", context(LateConcatenation)
        ),
        "echo": Arm(
            "the decoder reads each text twice, mean of the second copy",
            alone(Contrastive(variant="echo", pooling="mean", **SIZES)),
        ),
    },
    baseline="last token",
    method="causal2vec",
    ablations=("projected",),
    reported=("encoder alone", "late concatenation", "echo"),
    metrics=(NDCG, RANKING_LOSS),
    looks=(5, 10),
    tune={"learning_rate": (3e-4, 1e-3, 3e-3)},
    parity="The same pretrained decoder, pairs, batches and steps. Causal2Vec adds a pretrained ModernBERT of the"
    " decoder's size and a projector, so the ModernBERT alone and its late concatenation are shown beside; its vectors"
    " have twice the dimensions, so a projection to the same width is an ablation. Test packages are not those of the"
    " training.",
    minutes=60,
    use_when="vectors are to come from a decoder whose weights or causal mask must stay as they are",
    otherwise="the encoder alone",
    reason="Piloted for the baseline: 37 seconds a training, MRR@10 .11 of 200 documents. Version 1, never run, took a"
    " BERT whose pretraining had learned the frequencies of words alone.",
    toy={},
    golden={"last token": {RANKING_LOSS.name: 1.38964}, "causal2vec": {RANKING_LOSS.name: 1.37779}},
)
