"""The claim of Chimera: more tokens a pass than Medusa heads of as many parameters and training tokens, at equally many
tree nodes verified.

What each encoder brings is told by arms without it. Chimera drafts a tree in several small passes of its own layer,
where Medusa needs one product: that is in the seconds.
"""

from __future__ import annotations

from intaglio.evidence.experiment import Experiment, Secondary
from intaglio.evidence.trained_heads import NEW, NODES, WORLD, Arm, Training, against_medusa
from intaglio.evidence.worlds.smollm2 import SmolLM2Wikipedia
from intaglio.methods.decoding.chimera import Chimera

HEADS = 4
WHOLE = Chimera(heads=HEADS)
ARMS = {
    "medusa": Arm(
        f"Medusa: {HEADS} heads with as many residual blocks, and as large a change of the output matrix, as Chimera's "
        "parameters allow, trained on the tokens of the text like the others",
        medusa={"heads": HEADS, "goal": "text", "decay": 1.0},
        like=WHOLE,
    ),
    "chimera": Arm(f"Chimera: {HEADS} heads that share a low-rank change of the output matrix", WHOLE),
    "no-trigram": Arm("the same with the drafted token alone in the place of its tri-gram (fewer parameters)",
                      Chimera(heads=HEADS, encoders="no_trigram")),
    "no-context": Arm("the same without the decoder layer over all tokens (fewer parameters)",
                      Chimera(heads=HEADS, encoders="no_context")),
}  # fmt: skip


def experiment(world: SmolLM2Wikipedia, training: Training, new: int = NEW) -> Experiment:
    """The claim in a world.

    Args:
        world: target and texts.
        training: of all arms.
        new: tokens that are generated. Default 96.
    """
    return against_medusa(
        "chimera",
        "Chimera",
        ARMS,
        (
            Secondary("the tri-gram encoder", "no-trigram", "chimera"),
            Secondary("the full-context encoder", "no-context", "chimera"),
        ),
        f"Medusa and Chimera verify trees of {NODES} drafted tokens made from their own chances on held-out "
        "texts, have as many parameters to within one percent, saw the same training tokens, and had the same learning "
        "rates tried. Chimera's own passes are in the seconds.",
        world,
        training,
        new,
    )


EXPERIMENTS = {"cpu": experiment(WORLD, Training())}
"""By tier."""
