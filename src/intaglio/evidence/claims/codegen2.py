"""CodeGen2: at equal tokens the mixture with span corruption fills holes as well as fill-in-the-middle training.

In pilots with a byte model trained from scratch the suffix did not help within minutes of training: such a model copies
too little from its context. Adapters on SmolLM2 start from a model that does.
"""

from __future__ import annotations

from typing import Any

from intaglio.evidence.baselines.fim import FillInMiddleTraining
from intaglio.evidence.designs.infill import LINE, SINGLE, middle_lines
from intaglio.evidence.designs.measures import LOG_PERPLEXITY, log_perplexity
from intaglio.evidence.designs.training import Finetune
from intaglio.evidence.engine.claim import Arm, Claim
from intaglio.evidence.testbeds.smollm2 import SmolLM2Source
from intaglio.methods.objectives.codegen2 import CodeGen2

LENGTH = 128
"""Tokens of a row, special ones included, so that every arm processes as many."""
ROWS: dict[str, Any] = {"pack": False, "length": LENGTH}
HOLES: dict[str, Any] = {**ROWS, "sentinels": 8}


def adapted(objective: CodeGen2) -> dict[str, Any]:
    """Return the settings of an arm: an objective that trains adapters and the rows of its special tokens."""
    return {"objective": objective, "lora": {"r": 16}}


CLAIM = Claim(
    slug="codegen2",
    version=2,
    says="A mixture of next-token prediction and span corruption teaches a causal model to fill holes as well as"
    " fill-in-the-middle training does.",
    kind="as good as",
    metric=LINE,
    delta=0.02,
    design=Finetune(
        SmolLM2Source(length=LENGTH, tokens=LENGTH, documents_run=48, documents_pilot=24),
        measures=(middle_lines, log_perplexity),
        steps=50,
    ),
    arms={
        "FIM": Arm("fill-in-the-middle, half of the rows, both orders", adapted(FillInMiddleTraining(**ROWS))),
        "codegen2": Arm("CodeGen2, half of the rows corrupted", adapted(CodeGen2(**HOLES))),
        "causal": Arm(
            "next-token prediction; the line is predicted from the text before it",
            adapted(CodeGen2(**HOLES, corruption_ratio=0.0)),
        ),
        "corruption only": Arm("every row corrupted", adapted(CodeGen2(**HOLES, corruption_ratio=1.0))),
    },
    baseline="FIM",
    method="codegen2",
    floor="causal",
    ablations=("corruption only",),
    looks=(5, 10),
    tune={"learning_rate": (5e-4, 1e-3)},
    equal=("tokens",),
    metrics=(SINGLE, LOG_PERPLEXITY),
    parity="Equal processed tokens: the same windows in the same order, of which corrupted rows lose their end to their"
    " special tokens. The same middle lines, their tokens alone scored; FIM in the better of its two orders. The"
    " log-perplexity, left to right, shows the cost.",
    minutes=300,
    reason="at the size of version 1, a byte model trained from scratch, the suffix did not help within minutes",
    use_when="several holes are filled at once",
    otherwise="fill-in-the-middle training",
    toy={"context": LENGTH, "tokens": LENGTH - 8, "batch": 4},
    golden={
        "FIM": {LINE.name: 5.2204, LOG_PERPLEXITY.name: 5.22014},
        "codegen2": {LINE.name: 5.25434, LOG_PERPLEXITY.name: 5.24579},
    },
)
