"""Hidden Transfer: pseudo hidden states inside the target's pass against Medusa heads of equal parameters."""

from __future__ import annotations

from typing import Any

from intaglio.evidence.designs.drafters import HEADS_CLAIM, HEADS_PARITY, medusa, trained_heads
from intaglio.evidence.designs.replay import Replay
from intaglio.evidence.engine.claim import Arm, Claim
from intaglio.evidence.testbeds.source_code import SourceCode
from intaglio.methods.decoding.hidden_transfer import HiddenTransfer

AHEAD, DEPTH = 3, 6
WHOLE = HiddenTransfer(ahead=AHEAD)


def transfer(**fields: Any) -> dict[str, Any]:
    """Return the settings of an arm."""
    return {"drafter": trained_heads, "method": HiddenTransfer(ahead=AHEAD, **fields)}


CLAIM = Claim(
    slug="hidden_transfer",
    version=3,
    says="Predicting the hidden states of coming tokens in the middle of the model, and refining them in its upper"
    " blocks, emits more tokens per pass than Medusa heads of as many parameters.",
    design=Replay(SourceCode(depth=DEPTH, tokens=64, documents_run=100), new=96),
    arms={
        "medusa": Arm(
            f"Medusa: {AHEAD} heads on the target's own output matrix, trained on its distribution like the others",
            {"drafter": medusa, "like": WHOLE, "heads": AHEAD, "goal": "model"},
        ),
        "transfer": Arm(f"Hidden Transfer: {AHEAD} steps, layers as by default", transfer()),
        "early": Arm("all transfers after a third of the blocks", transfer(layers=[DEPTH // 3] * AHEAD)),
        "linear": Arm("after the last block: linear heads, nothing is refined", transfer(layers=[DEPTH] * AHEAD)),
    },
    baseline="medusa",
    method="transfer",
    ablations=("early", "linear"),
    parity=f"{HEADS_PARITY} Pseudo states take rows in the target's upper blocks.",
    use_when="rows of the upper blocks are free",
    reason="The heads of version 1 were trained once; since version 2, five trainings on a small Llama of source"
    " code; of 300 steps, as 1,000 took too long: version 2 was stopped while it was tuned.",
    **HEADS_CLAIM,
    toy={"depth": DEPTH},
    golden={"medusa": {}, "transfer": {}},
)
