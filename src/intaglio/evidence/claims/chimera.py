"""Chimera: draft heads that read the whole context against Medusa heads of equal parameters and training tokens."""

from __future__ import annotations

from typing import Any

from intaglio.evidence.designs.drafters import HEADS_CLAIM, HEADS_PARITY, medusa, trained_heads
from intaglio.evidence.designs.replay import Replay
from intaglio.evidence.engine.claim import Arm, Claim
from intaglio.evidence.testbeds.source_code import SourceCode
from intaglio.methods.decoding.chimera import Chimera

HEADS = 4
BATCH = 4
"""Texts of a step: a training of Chimera's decoder layer takes a minute and a half."""
WHOLE = Chimera(heads=HEADS)


def chimera(method: Chimera) -> dict[str, Any]:
    """Return the settings of an arm."""
    return {"drafter": trained_heads, "method": method, "batch_size": BATCH}


CLAIM = Claim(
    slug="chimera",
    version=4,
    says="Draft heads that read the whole context and the drafted tri-gram emit more tokens per pass than Medusa heads"
    " of as many parameters.",
    design=Replay(SourceCode(tokens=64, documents_run=100), new=96),
    arms={
        "medusa": Arm(
            f"Medusa: {HEADS} heads with as many residual blocks and as large an output change as that allows",
            {"drafter": medusa, "like": WHOLE, "heads": HEADS, "batch_size": BATCH},
        ),
        "chimera": Arm(f"Chimera: {HEADS} heads that share a low-rank output change", chimera(WHOLE)),
        "no tri-gram": Arm(
            "the drafted token alone instead of its tri-gram", chimera(Chimera(heads=HEADS, encoders="no_trigram"))
        ),
        "no context": Arm(
            "without the decoder layer over all tokens", chimera(Chimera(heads=HEADS, encoders="no_context"))
        ),
    },
    baseline="medusa",
    method="chimera",
    ablations=("no tri-gram", "no context"),
    parity=f"{HEADS_PARITY} Chimera's own passes cost seconds, not passes of the target.",
    use_when="a pass of the target costs far more than a small decoder layer",
    reason="The heads of version 1 were trained once and too briefly, and Chimera's start was mis-scaled; since"
    " version 2, five trainings on a small Llama of source code; of 300 steps with four texts, as 1,000 with"
    " eight took too long: versions 2 and 3 were stopped while they were tuned, Chimera ahead in what had run.",
    **HEADS_CLAIM,
    toy={"depth": 2},
    golden={"medusa": {}, "chimera": {}},
)
