"""CodeGen2: at equal tokens the mixture with span corruption fills holes as well as fill-in-the-middle training.

The floor is a causal model that sees the prefix alone: in a pilot of this size it was no worse than FIM, so the probe
has to show first that the suffix helps.
"""

from __future__ import annotations

from typing import Any

from intaglio.evidence.baselines.fim import FillInMiddleTraining
from intaglio.evidence.designs.infill import LINE, SINGLE, middle_lines
from intaglio.evidence.designs.measures import BITS, bits_per_byte
from intaglio.evidence.designs.training import Pretrain
from intaglio.evidence.engine.claim import Arm, Claim
from intaglio.evidence.testbeds.source_code import SourceCode
from intaglio.methods.objectives.codegen2 import CodeGen2

CONTEXT = 128
"""Tokens of a row, special ones included, so that every arm processes as many."""
ROWS: dict[str, Any] = {"pack": False}
HOLES: dict[str, Any] = {**ROWS, "sentinels": 8}

CLAIM = Claim(
    slug="codegen2",
    version=1,
    says="A mixture of next-token prediction and span corruption teaches a causal model to fill holes as well as"
    " fill-in-the-middle training does.",
    kind="as good as",
    metric=LINE,
    delta=0.02,
    design=Pretrain(
        SourceCode(width=64, depth=3, context=CONTEXT, tokens=120, steps=600, batch=8, documents_run=200),
        measures=(middle_lines, bits_per_byte),
    ),
    arms={
        "FIM": Arm("fill-in-the-middle, half of the rows, both orders", {"objective": FillInMiddleTraining(**ROWS)}),
        "codegen2": Arm("CodeGen2, half of the rows corrupted", {"objective": CodeGen2(**HOLES)}),
        "causal": Arm(
            "next-token prediction; the line is predicted from the text before it",
            {"objective": CodeGen2(**HOLES, corruption_ratio=0.0)},
        ),
        "corruption only": Arm("every row corrupted", {"objective": CodeGen2(**HOLES, corruption_ratio=1.0)}),
        "prefix": Arm(
            "Prefix-LM: the text before the answers is seen both ways and not predicted",
            {"objective": CodeGen2(**HOLES, attention="prefix")},
        ),
    },
    baseline="FIM",
    method="codegen2",
    floor="causal",
    ablations=("corruption only", "prefix"),
    looks=(5, 10, 20),
    tune={"learning_rate": (2e-3, 4e-3, 8e-3)},
    equal=("tokens",),
    metrics=(SINGLE, BITS),
    parity="Equal processed tokens: the same windows in the same order, of which corrupted rows lose their end to their"
    " special tokens. The same middle lines, their tokens alone scored; FIM in the better of its two orders. Bits per"
    " byte, left to right, show the cost.",
    minutes=60,
    use_when="several holes are filled at once",
    otherwise="fill-in-the-middle training",
    toy={"context": 64, "tokens": 56},
    golden={
        "FIM": {LINE.name: 5.35209, BITS.name: 7.7235},
        "codegen2": {LINE.name: 5.37956, BITS.name: 7.76145},
    },
)
