"""VDR: vectors over words, trained against bags of tokens, retrieve better out of domain than dense vectors."""

from __future__ import annotations

from typing import Any

from intaglio.evidence.designs.encoders import as_it_is, trained
from intaglio.evidence.designs.retrieve import DOCUMENT_TERMS, MRR, NDCG, QUERY_TERMS, RANKING_LOSS, Retrieve
from intaglio.evidence.engine.claim import Arm, Claim
from intaglio.evidence.testbeds.docstring_models import DocstringModels
from intaglio.methods.retrieval.mistral_splade import MistralSplade
from intaglio.methods.retrieval.vdr import VDR
from intaglio.trainer.contrastive import Contrastive

SIZES: dict[str, Any] = {"query_length": 24, "document_length": 48}
TERMS = 128
"""Entries of a sparse view, beside the text's own tokens."""


def encoder(objective: Any) -> dict[str, Any]:
    """Return the settings of an arm that trains the pretrained encoder."""
    return {"retriever": trained, "objective": objective, "model": "modernbert"}


CLAIM = Claim(
    slug="vdr",
    version=2,
    says="A bi-encoder whose dimensions are words, trained against sparse views and bags of tokens, retrieves documents"
    " of packages that it was not trained on better than a dense bi-encoder of the same model.",
    metric=NDCG,
    delta=0.02,
    design=Retrieve(DocstringModels()),
    arms={
        "dense": Arm("mean pooling, normalised, InfoNCE", encoder(Contrastive(pooling="mean", **SIZES))),
        "SVDR": Arm("VDR with documents as bags of tokens in the loss", encoder(VDR(terms=TERMS, **SIZES))),
        "VDR": Arm("without the bags of documents", encoder(VDR(terms=TERMS, semi_parametric=False, **SIZES))),
        "tokens": Arm(
            "SVDR that searches documents as sets of tokens", encoder(VDR(terms=TERMS, document_view="tokens", **SIZES))
        ),
        "SPLADE": Arm(
            "SPLADE with FLOPS",
            {
                **encoder(MistralSplade(variant="plain", **SIZES, query_weight=1e-2, document_weight=1e-2)),
                "temperature": 1.0,
            },
        ),
        "BM25": Arm("BM25", {"retriever": as_it_is}),
    },
    baseline="dense",
    method="SVDR",
    ablations=("VDR", "tokens"),
    reported=("SPLADE", "BM25"),
    metrics=(MRR, RANKING_LOSS, QUERY_TERMS, DOCUMENT_TERMS),
    looks=(5, 10),
    tune={"learning_rate": (3e-4, 1e-3, 3e-3), "temperature": (0.05, 1.0, 10.0)},
    parity="The same pretrained encoder, pairs, batches and steps, weights shared by both sides, no hard negatives; the"
    " temperature of either loss is tuned alike. Vectors of the sparse view have up to 128 entries and the text's own"
    " tokens, against 128 numbers of a dense vector; the terms are reported.",
    minutes=60,
    use_when="matches must be explained by words, or a corpus is searched before it is encoded",
    otherwise="a dense bi-encoder",
    reason="Version 1, never run, took a BERT whose pretraining had learned the frequencies of words alone; now a"
    " ModernBERT, which learns more in the same steps.",
    toy={},
    golden={"dense": {RANKING_LOSS.name: 1.36245}, "SVDR": {RANKING_LOSS.name: 3.15562}},
)
