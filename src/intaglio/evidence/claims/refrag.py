"""Refrag: a context as one embedding a chunk holds more facts than as many of its tokens."""

from __future__ import annotations

from typing import Any

from intaglio.evidence.claims.meap import BED
from intaglio.evidence.designs.compressed_facts import POSITIONS, CompressedFacts
from intaglio.evidence.designs.measures import NEEDLE_SCORE, NEEDLES
from intaglio.evidence.engine.claim import Arm, Claim
from intaglio.methods.retrieval.refrag import Refrag

SIZE = 4


def compressed(**settings: Any) -> dict[str, Any]:
    """Return the settings of an arm that reads chunks, none of them expanded."""
    return {"method": Refrag(chunk_size=SIZE, expand=0.0), **settings}


CLAIM = Claim(
    slug="refrag",
    version=1,
    says="A small decoder that reads a context as one embedding per chunk answers more questions about its facts than"
    " one that reads as many of the context's last tokens.",
    metric=NEEDLES,
    delta=5.0,
    design=CompressedFacts(BED, chunk_size=SIZE),
    arms={
        "truncated": Arm("as many of the last tokens as there are chunks", {"context": "last"}),
        "refrag": Arm("one embedding per chunk of 4 tokens", compressed()),
        "full": Arm("every token of the context", {"context": "all"}),
        "no curriculum": Arm("all chunks from the first step", compressed(curriculum=False)),
        "no reconstruction": Arm("without the first stage", compressed(stages=("continual",))),
        "policy": Arm("an eighth of the chunks stays tokens, by the policy", compressed(expand=0.125, policy=True)),
        "random": Arm("an eighth of the chunks stays tokens, drawn", compressed(expand=0.125, expander="random")),
    },
    baseline="truncated",
    method="refrag",
    ceiling="full",
    ablations=("no curriculum", "no reconstruction", "policy", "random"),
    looks=(5, 10),
    tune={"learning_rate": (1e-3, 3e-3)},
    equal=("tokens",),
    metrics=(NEEDLE_SCORE, POSITIONS),
    parity="From one decoder trained on whole contexts; equal documents and optimizer steps in all, the compressor's"
    " stages included. Positions before a question are printed. The question is never compressed, and its answer is"
    " never in it.",
    minutes=45,
    use_when="passages are retrieved again and again and the time to the first token matters",
    otherwise="the passages' own tokens, fewer of them",
    reason="Not piloted from the trained decoder. From an untrained one, on eight facts in chunks of three tokens, 800"
    " steps taught no arm to answer (compressed 4 points, truncated 17, whole 25), so the bed may train too little.",
    toy={"length": 48, "facts": 6, "questions": 2},
    golden={"truncated": {NEEDLE_SCORE.name: -4.24204}, "refrag": {NEEDLE_SCORE.name: -4.23864}},
)
