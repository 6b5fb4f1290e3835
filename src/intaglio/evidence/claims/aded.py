"""ADED: drafts from an adaptive n-gram table against prompt lookup, at equal rows verified."""

from __future__ import annotations

from intaglio.evidence.designs.drafters import NODES, aded, prompt_lookup
from intaglio.evidence.designs.replay import BEFORE_LOOP, TOKENS, Replay
from intaglio.evidence.engine.claim import Arm, Claim
from intaglio.evidence.testbeds.prompts import Prompts

CLAIM = Claim(
    slug="aded",
    version=2,
    says="Drafting from a tri-gram table that adapts to the text emits more tokens per pass of the target than prompt"
    " lookup.",
    metric=TOKENS,
    delta=0.1,
    design=Replay(Prompts(), new=64),
    arms={
        "lookup": Arm(
            "prompt lookup: the continuations of the latest matches, merged into a tree",
            {"drafter": prompt_lookup},
            tune={"candidates": (1, 3), "length": (5, 10, 15)},
        ),
        "aded": Arm("ADED, its table counted in training articles and modules", {"drafter": aded}),
        "static": Arm("ADED without the adaptive update", {"drafter": aded, "adaptive": False}),
        "window": Arm("ADED learning from the window alone, as in the paper", {"drafter": aded, "prompt": 0}),
        "best-first": Arm("ADED with best-first search instead of tree search", {"drafter": aded, "search": "best"}),
        "greedy": Arm("ADED with one greedy chain", {"drafter": aded, "search": "greedy"}),
    },
    baseline="lookup",
    method="aded",
    ablations=("static", "window", "best-first", "greedy"),
    unit_names=("article or module",),
    tune_units=4,
    metrics=(BEFORE_LOOP,),
    equal=("tokens", "parameters"),
    minutes=40,
    parity=f"Every arm may verify {NODES} drafted tokens a pass and emits the target's own greedy text.",
    use_when="you have text like the output to count a table in, and no draft model",
    otherwise="prompt lookup",
    reason="Version 1 measured 38 articles and 22 prompts; now 40 articles and modules with five prompts of five kinds"
    " each, by replay, and prompt lookup tuned.",
    golden={"lookup": {}, "aded": {}},
)
