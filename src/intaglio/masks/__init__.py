"""Masks over attention: which positions each layer of a stock model sees, set from outside.

    from intaglio.masks import Causal, Bidirectional, Window, Sinks, set_visibility

    set_visibility(model, {28: Bidirectional(), 29: Bidirectional()})   # the last two layers look right
    set_visibility(model, Causal() & (Window(64) | Sinks(4)))           # all layers: a window with sinks
    clear_visibility(model)                                             # the stock model again

- `rules`: the rules themselves; `named`: by name, as recipes write them.
- `attend`: how a rule gets into stock attention layers; `visibility`: set, read, cleared, guarded.
- `step`: the step `visibility` of a recipe, and rules as a live part of a checkpoint.
- `picture`: what each layer sees, drawn.

Importing the package makes the attention implementations `intaglio_sdpa`, `intaglio_eager` and
`intaglio_flex_attention` known to transformers.
"""

from __future__ import annotations

from intaglio.masks.attention_interface import RULE, SCORE, MaskRequest, register
from intaglio.masks.rules import (
    Alibi,
    And,
    AttentionSinks,
    Bidirectional,
    BlockDiagonal,
    BlockLocal,
    Causal,
    Dilated,
    ExplicitMask,
    IgnoreSlidingWindow,
    Not,
    Or,
    PrefixLM,
    Rule,
    Score,
    Window,
    rule_from_dict,
)
from intaglio.masks.visibility import (
    clear_visibility,
    get_visibility,
    is_noncausal,
    predicts_next,
    refuse_to_generate,
    set_scores,
    set_visibility,
    visible,
)

__all__ = [
    "RULE",
    "SCORE",
    "Alibi",
    "And",
    "AttentionSinks",
    "Bidirectional",
    "BlockDiagonal",
    "BlockLocal",
    "Causal",
    "Dilated",
    "ExplicitMask",
    "IgnoreSlidingWindow",
    "MaskRequest",
    "Not",
    "Or",
    "PrefixLM",
    "Rule",
    "Score",
    "Window",
    "clear_visibility",
    "get_visibility",
    "is_noncausal",
    "predicts_next",
    "refuse_to_generate",
    "rule_from_dict",
    "set_scores",
    "set_visibility",
    "visible",
]

register()
