"""Rules by name, for recipes, and short descriptions of rules.

    causal                                  # a name without fields
    sliding: {window: 64, sinks: 4}         # a name with its fields
    and: [causal, {blocks: {size: 128}}]    # combined by and, or, not

The output of `Rule.to_dict` is accepted too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from intaglio.errors import IntaglioError, did_you_mean, shorten
from intaglio.masks.rules import (
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
    Window,
    rule_from_dict,
)


def _sliding(window: int, sinks: int = 0, causal: bool = True) -> Rule:
    rule: Rule = Window(window) | AttentionSinks(sinks) if sinks else Window(window)
    return Causal() & rule if causal else rule


def _dilated(size: int, step: int, causal: bool = True) -> Rule:
    rule = Dilated(size, step)
    return Causal() & rule if causal else rule


def _packed(lengths: list[int], causal: bool = True) -> Rule:
    numbers = lengths if isinstance(lengths, list) and lengths else [0]
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
        raise IntaglioError(
            f"lengths of the rule 'packed' is {shorten(repr(lengths))}; a list of lengths from 1 is needed"
        )
    rule = BlockDiagonal(torch.repeat_interleave(torch.arange(len(numbers)), torch.tensor(numbers)))
    return Causal() & rule if causal else rule


def _blocks(size: int, causal: bool = True) -> Rule:
    rule = BlockLocal(size)
    return Causal() & rule if causal else rule


def _arbitrary(visible: Any = None, file: str | None = None) -> Rule:
    if (visible is None) == (file is None):
        raise IntaglioError("the rule 'arbitrary' takes visible, a table, or file, a .npy or .json file with one")
    return ExplicitMask(visible if file is None else _read_table(Path(file)))


def _read_table(path: Path) -> Any:
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False))
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise IntaglioError(f"the table of a visibility rule cannot be read from {path}: {reason}") from error


NAMED: dict[str, tuple[Callable[..., Rule], str]] = {
    "causal": (Causal, "itself and earlier tokens"),
    "bidirectional": (Bidirectional, "everything"),
    "prefix_lm": (PrefixLM, "prefix: number of first tokens that see each other both ways, the rest is causal"),
    "sliding": (
        _sliding,
        "window: tokens back, its own included; sinks: number of first tokens always seen; causal: true",
    ),
    "dilated": (_dilated, "size: number of tokens back; step: distance between them; causal: true"),
    "blocks": (_blocks, "size: positions of a block, within which tokens see each other; causal: true"),
    "packed": (_packed, "lengths: of consecutive documents, within which tokens see each other; causal: true"),
    "arbitrary": (_arbitrary, "visible: a table [L, L], [heads, L, L] or [rows, heads, L, L]; or file: .npy, .json"),
}
"""`{name: (constructor, its fields)}`, besides `and`, `or` and `not`."""
_OPERATORS = {"and": And, "or": Or}


def read_rule(value: Any) -> Rule:
    """Return the rule that a recipe describes."""
    if isinstance(value, Rule):
        return value
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, Mapping) or not value:
        raise IntaglioError(
            f"a visibility rule is a name with its fields, such as sliding: {{window: 64}}, not {value!r}"
        )
    if "kind" in value:
        return rule_from_dict(value)
    names = [*NAMED, *_OPERATORS, "not"]
    name, fields = next(iter(value.items()))
    if len(value) > 1 or name not in names:
        more = "one name is needed" if len(value) > 1 else did_you_mean(str(name), names)
        raise IntaglioError(f"there is no visibility rule {', '.join(map(repr, value))}; {more}")
    if name == "not":
        return Not(read_rule(fields))
    if name in _OPERATORS:
        if not isinstance(fields, list) or len(fields) < 2:
            raise IntaglioError(f"the rule {name!r} joins a list of two or more rules, not {shorten(repr(fields))}")
        rules = [read_rule(item) for item in fields]
        return _OPERATORS[name](tuple(rules))
    make, accepted = NAMED[name]
    fields = {} if fields is None else fields
    if not isinstance(fields, Mapping) or not all(isinstance(key, str) for key in fields):
        raise IntaglioError(f"the fields of the rule {name!r} must be a mapping; it takes {accepted}")
    if "causal" in fields and not isinstance(fields["causal"], bool):
        raise IntaglioError(f"causal of the rule {name!r} is {fields['causal']!r}; true or false is accepted")
    try:
        return make(**fields)
    except TypeError:
        given = ", ".join(sorted(fields)) or "nothing"
        raise IntaglioError(f"the rule {name!r} cannot be made of {given}; it takes {accepted}") from None


def describe(rule: Rule | None) -> str:
    """Return a short description of a rule."""
    if rule is None:
        return "stock"
    if isinstance(rule, And):
        causal_name = _causal_name(rule)
        if causal_name is not None:
            return causal_name
        return " & ".join(_bracketed(part) for part in rule.rules)
    if isinstance(rule, Or):
        return " | ".join(_bracketed(part) for part in rule.rules)
    if isinstance(rule, Not):
        return f"not {_bracketed(rule.rule)}"
    if isinstance(rule, IgnoreSlidingWindow):
        return f"{_bracketed(rule.rule)}, beyond the window"
    words = rule.kind.replace("_", " ")
    if isinstance(rule, (BlockDiagonal, ExplicitMask)):
        return f"{words} ({rule.length} positions)"
    fields = {name: value for name, value in rule.to_dict().items() if name != "kind"}
    return f"{words} ({', '.join(f'{name} {value}' for name, value in fields.items())})" if fields else words


def _causal_name(rule: And) -> str | None:
    """Return the name of a causal rule in `NAMED`; None for any other rule."""
    if len(rule.rules) != 2 or rule.rules[0] != Causal():
        return None
    inner = rule.rules[1]
    if isinstance(inner, Window):
        return f"sliding (window {inner.size})"
    if isinstance(inner, Or) and [type(part) for part in inner.rules] == [Window, AttentionSinks]:
        fields = [part.to_dict() for part in inner.rules]
        return f"sliding (window {fields[0]['size']}, sinks {fields[1]['count']})"
    if isinstance(inner, BlockDiagonal) and inner.document_ids.dim() == 1:
        lengths = torch.unique_consecutive(inner.document_ids, return_counts=True)[1].tolist()
        lengths_shown = [*map(str, lengths[:4]), *(["..."] if len(lengths) > 4 else [])]
        return f"packed (lengths {', '.join(lengths_shown)})"
    return describe(inner) if isinstance(inner, (Dilated, BlockLocal)) else None


def _bracketed(rule: Rule) -> str:
    return f"({describe(rule)})" if isinstance(rule, (And, Or)) else describe(rule)
