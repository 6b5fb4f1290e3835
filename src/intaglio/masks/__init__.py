"""Attention masks of stock models, set from outside.

    from intaglio.masks import Causal, Bidirectional, Window, Sinks, set_visibility

    set_visibility(model, {28: Bidirectional(), 29: Bidirectional()})   # the last two layers are bidirectional
    set_visibility(model, Causal() & (Window(64) | Sinks(4)))           # all layers: a window with sinks
    clear_visibility(model)                                             # the stock model again

- `rules`: the rules; `registry`: rules by name, for recipes.
- `attention_interface`: registration with transformers; `visibility`: setting, reading and clearing rules.
- `method`: the recipe step `visibility`.
- `visualize`: drawings of each layer's mask.

Importing the package registers the attention implementations `intaglio_sdpa`, `intaglio_eager` and
`intaglio_flex_attention` with transformers.
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
    attention_functions,
    clear_visibility,
    get_visibility,
    is_noncausal,
    predicts_next,
    refuse_to_generate,
    set_attention,
    set_scores,
    set_visibility,
    temporary_visibility,
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
    "attention_functions",
    "clear_visibility",
    "get_visibility",
    "is_noncausal",
    "predicts_next",
    "refuse_to_generate",
    "rule_from_dict",
    "set_attention",
    "set_scores",
    "set_visibility",
    "temporary_visibility",
    "visible",
]

register()
