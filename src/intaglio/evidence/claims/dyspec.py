"""DySpec: token trees that grow where the draft model is sure against the best fixed tree, at equal rows verified."""

from __future__ import annotations

from typing import Any

from intaglio.evidence.designs.drafters import dyspec, fixed_tree
from intaglio.evidence.designs.replay import BEFORE_LOOP, DRAFT_PASSES, TOKENS, Replay
from intaglio.evidence.engine.claim import Arm, Claim
from intaglio.evidence.testbeds.prompts import Prompts

NODES = 32


def dynamic(**fields: Any) -> dict[str, Any]:
    """Return the settings of an arm of DySpec."""
    return {"drafter": dyspec, "nodes": NODES, **fields}


CLAIM = Claim(
    slug="dyspec",
    version=2,
    says="With the same draft model, a tree that is grown anew for each pass emits more tokens per pass of the target"
    " than the best fixed tree.",
    metric=TOKENS,
    delta=0.1,
    design=Replay(Prompts(), new=64),
    arms={
        "fixed": Arm(
            f"of all fixed trees of {NODES} nodes (Sequoia's of every depth, by widths, a chain) the one with the"
            " fewest passes on training prompts",
            {"drafter": fixed_tree, "nodes": NODES},
        ),
        "dyspec": Arm("DySpec's heap, its chances of acceptance the draft's probabilities", dynamic()),
        "fitted": Arm("chances of acceptance counted where the fixed trees are fitted", dynamic(fitted=True)),
        "threshold": Arm("by the threshold 1/32, level by level", dynamic(algorithm="threshold")),
        "learnt": Arm("acceptance learnt on the way", dynamic(calibrate=True)),
        "chain": Arm(f"one chain of {NODES}", {"drafter": fixed_tree, "nodes": NODES, "tree": "chain"}),
    },
    baseline="fixed",
    method="dyspec",
    ablations=("fitted", "threshold", "learnt"),
    reported=("chain",),
    unit_names=("article or module",),
    metrics=(BEFORE_LOOP, DRAFT_PASSES),
    equal=("tokens", "parameters"),
    parity=f"The same draft model, {NODES} drafted tokens a pass, the target's own greedy text.",
    minutes=60,
    use_when="passes of the target cost far more than passes of the draft model",
    otherwise="the best fixed tree, fitted on text like yours",
    reason="Version 1 measured 17 prompts; now 40 articles and modules with five prompts of five kinds each, by"
    " replay.",
    golden={"fixed": {}, "dyspec": {}},
)
