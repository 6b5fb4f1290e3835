"""Base class of visibility rules: evaluation on index tensors, combination, conversion to plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from intaglio.errors import IntaglioError, did_you_mean

_KINDS: dict[str, type[Rule]] = {}
"""Rules by kind; `boolean` registers `and`, `or` and `not`, which the operators use."""


class Rule:
    """Base of visibility rules, `rule(b, h, q, kv) -> bool`.

    A custom rule is a frozen dataclass that names its kind and uses arithmetic, comparisons, `&`, `|`:

        @dataclass(frozen=True)
        class Every(Rule, kind="every"):
            step: int

            def __call__(self, b, h, q, kv):
                return (q - kv) % self.step == 0

    The properties below describe the rule to the code that applies it. Their defaults are the safe answer.

    Args:
        kind: class argument; the name of the rule in `to_dict`. Abstract bases leave it out.
    """

    kind: ClassVar[str] = ""

    def __init_subclass__(cls, kind: str = "", **more: Any) -> None:
        super().__init_subclass__(**more)
        if kind:
            cls.kind = kind
            _KINDS[kind] = cls

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        """Return whether query `q` of head `h` in row `b` may see key `kv`, broadcast over the four index tensors."""
        raise NotImplementedError(f"{type(self).__name__} has no rule")

    @property
    def is_noncausal(self) -> bool:
        """Whether some query may see a later key; may be True for a rule where none does, never False otherwise."""
        return True

    @property
    def prefix_stable_after(self) -> int | None:
        """Number of tokens after which a further token changes nothing that earlier ones see; None: never.

        A model can continue a prompt of at least that length, without a cache.
        """
        return None if self.is_noncausal else 0

    @property
    def extent(self) -> float | None:
        """Largest distance (the query's own position counts as 1) that the rule names explicitly; None: none.

        Infinite where it names tokens at any distance. A layer's own window below it would silently hide them.
        """
        return None

    @property
    def ignores_window(self) -> bool:
        """Whether the rule overrides a layer's own sliding window."""
        return False

    @property
    def shift_invariant(self) -> bool:
        """Whether the rule depends on `q - kv` only; if not, left padding must be subtracted first."""
        return False

    @property
    def per_head(self) -> bool:
        """Whether heads may differ."""
        return True

    @property
    def bounded(self) -> bool:
        """Whether the rule is defined for a limited number of positions, which `check` compares."""
        return False

    def check(self, rows: int, heads: int, length: int) -> None:
        """Refuse an input that the rule does not cover."""

    def to(self, device: torch.device | str) -> Rule:
        """Return the rule with its tensors on `device`."""
        moved = {
            field.name: value.to(device)
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
            if isinstance(value := getattr(self, field.name), Tensor) and value.device != torch.device(device)
        }
        return dataclasses.replace(self, **moved) if moved else self  # type: ignore[type-var]

    def to_dict(self) -> dict[str, Any]:
        """Return the rule as plain data for JSON: its kind and its fields."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {"kind": self.kind, **{name: _plain(value) for name, value in fields.items()}}

    @classmethod
    def _from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """Build the rule from the fields of `to_dict`, without the kind."""
        names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if set(fields) != names:
            wanted = ", ".join(sorted(names)) or "no fields"
            raise IntaglioError(f"the rule {cls.kind!r} takes {wanted}, not {', '.join(sorted(fields)) or 'nothing'}")
        return cls(**fields)

    def __and__(self, other: Rule) -> Rule:
        """Visible where both rules allow it."""
        return self._combined("and", other)

    def __or__(self, other: Rule) -> Rule:
        """Visible where either rule allows it."""
        return self._combined("or", other)

    def __invert__(self) -> Rule:
        """Visible where the rule forbids it."""
        return self.rule if self.kind == "not" else _KINDS["not"](self)  # type: ignore[attr-defined, call-arg]

    def _combined(self, kind: str, other: Rule) -> Rule:
        """Combine two rules under an operator, flattening nested uses of it."""
        for rule in (self, other):
            if not isinstance(rule, Rule):
                raise IntaglioError(f"a rule is combined with another rule, not with {rule!r}")
        parts = [part for rule in (self, other) for part in (rule.rules if rule.kind == kind else (rule,))]  # type: ignore[attr-defined]
        return _KINDS[kind](tuple(parts))  # type: ignore[call-arg]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.int().tolist() if value.dtype == torch.bool else value.tolist()
    return list(value) if isinstance(value, tuple) else value


def rule_from_dict(data: Mapping[str, Any]) -> Rule:
    """Return the rule of the plain data of `to_dict`."""
    fields = dict(data)
    kind = fields.pop("kind", None)
    if kind not in _KINDS:
        raise IntaglioError(f"there is no visibility rule of the kind {kind!r}; {did_you_mean(str(kind), _KINDS)}")
    return _KINDS[kind]._from_fields(fields)


def check_size(rule: Rule, name: str, own: int, given: int) -> None:
    """Refuse an input of a size that the rule was not made for."""
    if own != given:
        raise IntaglioError(f"the rule {rule.kind!r} is made for {own} {name}, and the input has {given}")


def check_count(rule: Rule, name: str, least: int = 1) -> None:
    """Refuse a field that is not an integer or is too small."""
    value = getattr(rule, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise IntaglioError(f"{name} of the rule {rule.kind!r} is {value!r}; a whole number from {least} is accepted")
