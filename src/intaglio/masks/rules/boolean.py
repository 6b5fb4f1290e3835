"""Combinations of rules: and, or, not, and a rule beyond a layer's own window."""

# ruff: noqa: D102 - overrides are documented in `Rule`
from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from intaglio.errors import IntaglioError
from intaglio.masks.rules.base import Rule, rule_from_dict


class _Composite(Rule):
    """Several rules under one operator."""

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        if len(self.rules) < 2 or not all(isinstance(rule, Rule) for rule in self.rules):
            raise IntaglioError(f"rules of the rule {self.kind!r} is {self.rules!r}; two or more rules are accepted")

    @property
    def shift_invariant(self) -> bool:
        return all(rule.shift_invariant for rule in self.rules)

    @property
    def per_head(self) -> bool:
        return any(rule.per_head for rule in self.rules)

    @property
    def bounded(self) -> bool:
        return any(rule.bounded for rule in self.rules)

    @property
    def ignores_window(self) -> bool:
        return any(rule.ignores_window for rule in self.rules)

    def check(self, rows: int, heads: int, length: int) -> None:
        for rule in self.rules:
            rule.check(rows, heads, length)

    def to(self, device: torch.device | str) -> Rule:
        moved = tuple(rule.to(device) for rule in self.rules)
        return self if all(a is b for a, b in zip(moved, self.rules, strict=True)) else type(self)(moved)  # type: ignore[call-arg]

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "rules": [rule.to_dict() for rule in self.rules]}

    @classmethod
    def _from_fields(cls, fields: Mapping[str, Any]) -> Self:
        if set(fields) != {"rules"} or not isinstance(fields["rules"], (list, tuple)):
            wrong = ", ".join(sorted(fields)) or "nothing"
            raise IntaglioError(f"the rule {cls.kind!r} takes a list named rules, not {wrong}")
        return cls(tuple(rule_from_dict(rule) for rule in fields["rules"]))  # type: ignore[call-arg]


@dataclasses.dataclass(frozen=True)
class And(_Composite, kind="and"):
    """Visible where all of the rules allow it.

    Args:
        rules: two or more.
    """

    rules: tuple[Rule, ...]

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return functools.reduce(operator.and_, (rule(b, h, q, kv) for rule in self.rules))

    @property
    def is_noncausal(self) -> bool:
        return all(rule.is_noncausal for rule in self.rules)

    @property
    def prefix_stable_after(self) -> int | None:
        return min(
            (rule.prefix_stable_after for rule in self.rules if rule.prefix_stable_after is not None), default=None
        )

    @property
    def extent(self) -> float | None:
        return min((rule.extent for rule in self.rules if rule.extent is not None), default=None)


@dataclasses.dataclass(frozen=True)
class Or(_Composite, kind="or"):
    """Visible where any of the rules allows it.

    Args:
        rules: two or more.
    """

    rules: tuple[Rule, ...]

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return functools.reduce(operator.or_, (rule(b, h, q, kv) for rule in self.rules))

    @property
    def is_noncausal(self) -> bool:
        return any(rule.is_noncausal for rule in self.rules)

    @property
    def prefix_stable_after(self) -> int | None:
        known = [rule.prefix_stable_after for rule in self.rules if rule.prefix_stable_after is not None]
        return max(known) if len(known) == len(self.rules) else None

    @property
    def extent(self) -> float | None:
        return max((rule.extent for rule in self.rules if rule.extent is not None), default=None)


class _Wrapping(Rule):
    """A rule that modifies another."""

    rule: Rule

    @property
    def shift_invariant(self) -> bool:
        return self.rule.shift_invariant

    @property
    def per_head(self) -> bool:
        return self.rule.per_head

    @property
    def bounded(self) -> bool:
        return self.rule.bounded

    def check(self, rows: int, heads: int, length: int) -> None:
        self.rule.check(rows, heads, length)

    def to(self, device: torch.device | str) -> Rule:
        moved = self.rule.to(device)
        return self if moved is self.rule else type(self)(moved)  # type: ignore[call-arg]

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "rule": self.rule.to_dict()}

    @classmethod
    def _from_fields(cls, fields: Mapping[str, Any]) -> Self:
        if set(fields) != {"rule"}:
            wrong = ", ".join(sorted(fields)) or "nothing"
            raise IntaglioError(f"the rule {cls.kind!r} takes rule, not {wrong}")
        return cls(rule_from_dict(fields["rule"]))  # type: ignore[call-arg]


@dataclasses.dataclass(frozen=True)
class Not(_Wrapping, kind="not"):
    """Visible where the rule forbids it; always treated as seeing later tokens.

    Args:
        rule: the negated rule.
    """

    rule: Rule

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return ~self.rule(b, h, q, kv)


@dataclasses.dataclass(frozen=True)
class IgnoreSlidingWindow(_Wrapping, kind="wide"):
    """The same rule, ignoring a layer's own sliding window; runs without a cache, which is limited to the window.

    Args:
        rule: the rule.
    """

    rule: Rule
    ignores_window = True

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return self.rule(b, h, q, kv)
