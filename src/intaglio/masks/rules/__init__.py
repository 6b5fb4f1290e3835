"""Visibility rules: which key positions a query position may attend to, as data.

A rule is a frozen object called with index tensors, `rule(b, h, q, kv) -> bool tensor`: batch row, head, query position
and key position, shaped so that they broadcast (dense masks) or scalar (the tracing of a block-sparse kernel). Rules
combine with `&`, `|` and `~`, compare by value, pickle, and convert to plain data and back (`to_dict`,
`rule_from_dict`).

    Causal() & (Window(64) | Sinks(4))        # a sliding window that always keeps the first four tokens

Positions count from a row's first real token. The model's own window and padding are not part of a rule: they are added
where the rule is applied.

- `base`: the base class; `boolean`: boolean combinations
- `positional`: positional rules; `explicit`: rules given by a tensor
- `scores`: biases on attention scores

Dimension letters: B batch rows, H heads, Q query positions, K key positions, L positions.
"""

from __future__ import annotations

from intaglio.masks.rules.base import Rule, rule_from_dict
from intaglio.masks.rules.boolean import And, IgnoreSlidingWindow, Not, Or
from intaglio.masks.rules.explicit import BlockDiagonal, ExplicitMask
from intaglio.masks.rules.positional import AttentionSinks, Bidirectional, BlockLocal, Causal, Dilated, PrefixLM, Window
from intaglio.masks.rules.scores import Alibi, Score

__all__ = [
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
    "Not",
    "Or",
    "PrefixLM",
    "Rule",
    "Score",
    "Window",
    "rule_from_dict",
]
