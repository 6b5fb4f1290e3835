"""The claim of Hidden Transfer: more tokens a pass than Medusa heads of as many parameters and training tokens, at
equally many tree nodes verified.

Medusa heads draft from the prefill on; Hidden Transfer has nothing to draft from in its first pass, which counts.
"""

from __future__ import annotations

from dataclasses import asdict

from intaglio.decoding.hidden_transfer import HiddenTransfer
from intaglio.evidence.experiment import Experiment, Secondary
from intaglio.evidence.trained_heads import FRESH, NEW, NODES, SECONDS, SHIFTED, TOKENS, Arm, Continue, Training
from intaglio.evidence.worlds.smollm2 import SmolLM2Wikipedia

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
    chosen = arms(blocks)
    return Experiment(
        slug="hidden_transfer",
        claim="On SmolLM2-135M going on greedily from Wikipedia articles, Hidden Transfer emits more tokens a pass "
        f"than Medusa heads of as many parameters, by more than 0.1, when both verify {NODES} drafted tokens a pass "
        "and were trained on the same text.",
        metric=TOKENS,
        unit="tokens a pass",
        direction="higher",
        delta=0.1,
        design="independent",
        factors=("prompt",),
        arms={name: arm.what for name, arm in chosen.items()},
        baseline="medusa",
        method="hidden_transfer",
        parity=f"Every arm verifies trees of {NODES} drafted tokens made from its own chances on held-out texts, has "
        "as many parameters to within one percent, saw the same training tokens, and had the same learning rates "
        "tried. Pseudo states take rows in the target's upper blocks: they are in the operations and in the seconds.",
        equal=("tokens",),
        secondaries=(
            Secondary("before the text loops", "medusa", "hidden_transfer", FRESH, "higher"),
            Secondary("shifted text: Python files", "medusa", "hidden_transfer", SHIFTED, "higher"),
            Secondary("seconds a token", "medusa", "hidden_transfer", SECONDS),
            Secondary("refinement: against linear heads", "linear", "hidden_transfer"),
            Secondary("the layers: against early transfers", "early", "hidden_transfer"),
        ),
        run_unit=Continue(world, training, "hidden_transfer", tuple(chosen.items()), new),
        pilot_runs=min(world.documents_pilot, 10),
        most_runs=min(world.documents_run, 60),
        threads=1,
        settings={
            "world": asdict(world),
            "training": {**asdict(training), "rates": list(training.rates)},
            "new tokens": new,
            "nodes": NODES,
            "arms": {name: arm.plain() for name, arm in chosen.items()},
        },
    )


EXPERIMENTS = {"cpu": experiment(SmolLM2Wikipedia(documents_run=60, documents_pilot=10, tokens=64), Training())}
"""By tier."""
