"""Mistral-SPLADE: echoed texts make a better learned-sparse encoder of a decoder, at equal steps and equal sparsity."""

from __future__ import annotations

from typing import Any

from intaglio.evidence.designs.encoders import as_it_is, trained
from intaglio.evidence.designs.retrieve import DOCUMENT_TERMS, MRR, NDCG, QUERY_TERMS, RANKING_LOSS, Retrieve
from intaglio.evidence.engine.claim import Arm, Claim
from intaglio.evidence.testbeds.docstring_models import DocstringModels
from intaglio.methods.retrieval.mistral_splade import MistralSplade

PRUNED: dict[str, Any] = {"query_terms": 64, "document_terms": 128}
"""Terms of the searched vectors, the same in every arm."""
SIZES: dict[str, Any] = {"query_length": 24, "document_length": 48, "logit_scale": "width"}


def splade(variant: str, model: str = "llama", **fields: Any) -> dict[str, Any]:
    """Return the settings of a SPLADE arm."""
    objective = MistralSplade(variant=variant, **SIZES, **PRUNED, **fields)  # type: ignore[arg-type]
    return {"retriever": trained, "objective": objective, "model": model}


CLAIM = Claim(
    slug="mistral_splade",
    version=2,
    says="A decoder that reads each text twice becomes a better learned-sparse encoder than the same decoder that reads"
    " it once, at equal steps and equal numbers of terms.",
    metric=MRR,
    delta=0.02,
    design=Retrieve(DocstringModels()),
    arms={
        "once": Arm("SPLADE from the decoder, each text read once under the causal mask", splade("plain")),
        "echo": Arm("Mistral-SPLADE: each text read twice, the second copy pooled", splade("echo")),
        "bidirectional": Arm("SPLADE from the decoder with later tokens in sight", splade("bidirectional")),
        "encoder": Arm("SPLADE from a masked language model of the same size", splade("plain", "modernbert")),
        "BM25": Arm("BM25", {"retriever": as_it_is}),
        "SPLADE-tiny": Arm(
            "a small BERT trained on MS MARCO, as it is", {"retriever": as_it_is, "encoder": "splade-tiny"}
        ),
    },
    baseline="once",
    method="echo",
    reported=("bidirectional", "encoder", "BM25", "SPLADE-tiny"),
    metrics=(NDCG, RANKING_LOSS, QUERY_TERMS, DOCUMENT_TERMS),
    looks=(5, 10),
    tune={"learning_rate": (1e-3, 3e-3), "document_weight": (1e-3, 1e-2)},
    parity="The same pretrained decoder, pairs, batches and steps; vectors pruned to 64 terms of a query and 128 of a"
    " document. Echo reads twice the tokens, which the cost shows. Packages of the test are not those of the training.",
    minutes=60,
    use_when="a decoder is at hand and twice the encoding time is no matter",
    otherwise="the same decoder with a bidirectional mask, or BM25",
    reason="Version 1, never run, took a BERT for the encoder; see the test bed. SmolLM2 is not an arm, as a"
    " training of it takes minutes; the benchmark of retrieval shows a short run.",
    toy={},
    golden={"once": {RANKING_LOSS.name: 1.36159}, "echo": {RANKING_LOSS.name: 1.36237}},
)
