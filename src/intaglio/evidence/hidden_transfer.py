"""The claim of Hidden Transfer: more tokens a pass than Medusa heads of as many parameters and training tokens, at
equally many tree nodes verified.

Medusa heads draft from the prefill on; Hidden Transfer has nothing to draft from in its first pass, which counts.
"""

from __future__ import annotations

from intaglio.evidence.experiment import Experiment, Secondary
from intaglio.evidence.trained_heads import NEW, NODES, WORLD, Arm, Training, against_medusa
from intaglio.evidence.worlds.smollm2 import SmolLM2Wikipedia
from intaglio.methods.decoding.hidden_transfer import HiddenTransfer

AHEAD = 3


def arms(blocks: int) -> dict[str, Arm]:
    """The arms for a target of so many blocks.

    Args:
        blocks: of the target.
    """
    whole = HiddenTransfer(ahead=AHEAD)
    early = HiddenTransfer(ahead=AHEAD, layers=[round(blocks / 3)] * AHEAD)
    linear = HiddenTransfer(ahead=AHEAD, layers=[blocks] * AHEAD)
    return {
        "medusa": Arm(
            f"Medusa: {AHEAD} heads of one residual block each on the target's own output matrix, trained on the "
            "target's distribution like the others",
            medusa={"heads": AHEAD, "goal": "model", "decay": 1.0},
            like=whole,
        ),
        "hidden_transfer": Arm(f"Hidden Transfer: {AHEAD} steps, layers as by default", whole),
        "early": Arm("the same with all transfers after a third of the blocks", early),
        "linear": Arm("the same behind the last block: linear heads, nothing is refined", linear),
    }


def experiment(world: SmolLM2Wikipedia, training: Training, blocks: int = 30, new: int = NEW) -> Experiment:
    """The claim in a world.

    Args:
        world: target and texts.
        training: of all arms.
        blocks: of the target. Default 30.
        new: tokens that are generated. Default 96.
    """
    return against_medusa(
        "hidden_transfer",
        "Hidden Transfer",
        arms(blocks),
        (
            Secondary("refinement: against linear heads", "linear", "hidden_transfer"),
            Secondary("the layers: against early transfers", "early", "hidden_transfer"),
        ),
        f"Every arm verifies trees of {NODES} drafted tokens made from its own chances on held-out texts, has "
        "as many parameters to within one percent, saw the same training tokens, and had the same learning rates "
        "tried. Pseudo states take rows in the target's upper blocks: they are in the operations and in the seconds.",
        world,
        training,
        new,
    )


EXPERIMENTS = {"cpu": experiment(WORLD, Training())}
"""By tier."""
