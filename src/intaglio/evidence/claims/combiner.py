"""Combiner: summaries of spans against strided sparse attention (Sparse Transformer), at equal score entries.

A context of 256 tokens, so that both kinds of segments count, makes a run take about a minute: two looks.
"""

from __future__ import annotations

from typing import Any

from intaglio.evidence.baselines.strided_attention import StridedAttention
from intaglio.evidence.designs.measures import BITS
from intaglio.evidence.designs.training import Pretrain
from intaglio.evidence.engine.claim import Arm, Claim
from intaglio.evidence.testbeds.source_code import SourceCode
from intaglio.masks.method import Visibility
from intaglio.methods.attention.combiner import Combiner
from intaglio.trainer import CausalLM

CONTEXT, SEGMENT = 256, 16
ENTRIES = SEGMENT + CONTEXT // SEGMENT
"""Score entries of a query: its segment and one for each segment."""


ROWS: dict[str, Any] = {"objective": CausalLM(pack=False)}
"""Visibility rules do not separate packed documents; every row is a window of one file in all arms."""


def combiner(**fields: Any) -> dict[str, Any]:
    """Return the settings of an arm."""
    return {**ROWS, "apply": Combiner(**fields)}


CLAIM = Claim(
    slug="combiner",
    version=1,
    says="With as many attention scores, a language model that also reads summaries of all earlier segments predicts"
    " better than one with strided sparse attention.",
    metric=BITS,
    delta=0.02,
    design=Pretrain(SourceCode(width=64, depth=3, context=CONTEXT, tokens=CONTEXT, steps=500, batch=8)),
    arms={
        "strided": Arm(
            "own segment and the last token of each earlier segment (Sparse Transformer)",
            {**ROWS, "prepare": StridedAttention(SEGMENT)},
        ),
        "combiner": Arm("own segment and a summary of each earlier segment", combiner(segment=SEGMENT)),
        "full": Arm(f"full attention, {CONTEXT} score entries a query", ROWS),
        "logn": Arm("the logarithmic variant, 9 entries a query", combiner(variant="logn")),
        "mixture": Arm("the axial mixture, 80 entries a query", combiner(variant="mixture", segment=SEGMENT)),
        "size bias": Arm("log |S| added to the scores of spans", combiner(segment=SEGMENT, size_bias=True)),
        "window": Arm(
            f"the last {ENTRIES} tokens",
            {**ROWS, "apply": Visibility(rule={"sliding": {"window": ENTRIES}})},
        ),
    },
    baseline="strided",
    method="combiner",
    ceiling="full",
    ablations=("logn", "mixture", "size bias"),
    reported=("window",),
    looks=(5, 10),
    tune={"learning_rate": (2e-3, 4e-3, 8e-3)},
    equal=("tokens",),
    parity=f"At most {ENTRIES} score entries a query in both; three layers, of which strided attention needs two to"
    " reach every token. Equal parameters, tokens and order. Positions are rotary, where the paper learned them.",
    minutes=60,
    use_when="a long context has to be read in one layer at sub-quadratic cost",
    otherwise="strided sparse attention, or full attention where it can be afforded",
    toy={"width": 32, "context": 64, "tokens": 64, "steps": 40},
    golden={
        "strided": {BITS.name: 5.33649},
        "combiner": {BITS.name: 5.33614},
        "logn": {BITS.name: 5.31611},
        "size bias": {BITS.name: 5.34527},
    },
)
