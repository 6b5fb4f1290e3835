"""The claim of Chimera: more tokens a pass than Medusa heads of as many parameters and training tokens, at equally many
tree nodes verified.

What each encoder brings is told by arms without it. Chimera drafts a tree in several small passes of its own layer,
where Medusa needs one product: that is in the seconds.
"""

from __future__ import annotations

from dataclasses import asdict

from intaglio.decoding.chimera import Chimera
from intaglio.evidence.experiment import Experiment, Secondary
from intaglio.evidence.trained_heads import FRESH, NEW, NODES, SECONDS, SHIFTED, TOKENS, Arm, Continue, Training
from intaglio.evidence.worlds.smollm2 import SmolLM2Wikipedia

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
    return Experiment(
        slug="chimera",
        claim="On SmolLM2-135M going on greedily from Wikipedia articles, Chimera emits more tokens a pass than Medusa "
        f"heads of as many parameters, by more than 0.1, when both verify {NODES} drafted tokens a pass and were "
        "trained on the same text.",
        metric=TOKENS,
        unit="tokens a pass",
        direction="higher",
        delta=0.1,
        design="independent",
        factors=("prompt",),
        arms={name: arm.what for name, arm in ARMS.items()},
        baseline="medusa",
        method="chimera",
        parity=f"Medusa and Chimera verify trees of {NODES} drafted tokens made from their own chances on held-out "
        "texts, have as many parameters to within one percent, saw the same training tokens, and had the same learning "
        "rates tried. Chimera's own passes are in the seconds.",
        equal=("tokens",),
        secondaries=(
            Secondary("before the text loops", "medusa", "chimera", FRESH, "higher"),
            Secondary("shifted text: Python files", "medusa", "chimera", SHIFTED, "higher"),
            Secondary("seconds a token", "medusa", "chimera", SECONDS),
            Secondary("the tri-gram encoder", "no-trigram", "chimera"),
            Secondary("the full-context encoder", "no-context", "chimera"),
        ),
        run_unit=Continue(world, training, "chimera", tuple(ARMS.items()), new),
        pilot_runs=min(world.documents_pilot, 10),
        most_runs=min(world.documents_run, 60),
        threads=1,
        settings={
            "world": asdict(world),
            "training": {**asdict(training), "rates": list(training.rates)},
            "new tokens": new,
            "nodes": NODES,
            "arms": {name: arm.plain() for name, arm in ARMS.items()},
        },
    )


EXPERIMENTS = {"cpu": experiment(SmolLM2Wikipedia(documents_run=60, documents_pilot=10, tokens=64), Training())}
"""By tier."""
