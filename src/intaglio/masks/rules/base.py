"""What every rule is: called with index tensors, put together with others, turned into plain data and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from intaglio.errors import IntaglioError, did_you_mean

if TYPE_CHECKING:
    from intaglio.masks.rules.boolean import And, Or

_KINDS: dict[str, type[Rule]] = {}


class Rule:
    """Base of all rules: who may see whom, as `rule(b, h, q, kv) -> bool`.

    A rule of your own is a frozen dataclass that names its kind and is written with arithmetic, comparisons, `&`, `|`:

        @dataclass(frozen=True)
        class Every(Rule, kind="every"):
            step: int

            def __call__(self, b, h, q, kv):
                return (q - kv) % self.step == 0

    The properties below describe the rule to the code that applies it. Their defaults are the careful answer.

    Args:
        kind: class argument; the name of the rule in `to_dict`. Bases that are no rule themselves leave it out.
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
        """Whether some query may see a later key. False is a promise; True may be too careful."""
        return True

    @property
    def prefix_stable_after(self) -> int | None:
        """After how many tokens of a text a further one changes nothing that earlier tokens see; None: never.

        With a number a model can go on from a prompt of at least so many tokens, without a cache.
        """
        return None if self.is_noncausal else 0

    @property
    def extent(self) -> float | None:
        """How many positions on one side, the query's own included, the rule names by a number; None: it names none.

        Infinite where it names tokens that may be any distance away. A layer's own window that is smaller would cut
        them off in silence.
        """
        return None

    @property
    def ignores_window(self) -> bool:
        """Whether the rule holds beyond a layer's own sliding window, which otherwise applies too."""
        return False

    @property
    def shift_invariant(self) -> bool:
        """Whether only the distance `q - kv` counts. If not, left padding must be subtracted from both first."""
        return False

    @property
    def per_head(self) -> bool:
        """Whether heads may differ."""
        return True

    @property
    def bounded(self) -> bool:
        """Whether the rule is defined for so many positions only, which `check` then compares."""
        return False

    def check(self, rows: int, heads: int, length: int) -> None:
        """Refuse an input that the rule has no answer for.

        Args:
            rows: rows of the batch.
            heads: attention heads (of the queries).
            length: one past the last query position; 0 if the rule is not `bounded`.

        Raises:
            IntaglioError: names the size that does not fit.
        """

    def to(self, device: torch.device | str) -> Rule:
        """Return the rule with its tensors on `device`; itself when nothing has to move.

        Args:
            device: where the index tensors will be.
        """
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
        """Seen where both rules allow it."""
        from intaglio.masks.rules.boolean import And

        return And((*_parts(self, And), *_parts(other, And)))

    def __or__(self, other: Rule) -> Rule:
        """Seen where either rule allows it."""
        from intaglio.masks.rules.boolean import Or

        return Or((*_parts(self, Or), *_parts(other, Or)))

    def __invert__(self) -> Rule:
        """Seen where the rule forbids it."""
        from intaglio.masks.rules.boolean import Not

        return self.rule if isinstance(self, Not) else Not(self)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.int().tolist() if value.dtype == torch.bool else value.tolist()
    return list(value) if isinstance(value, tuple) else value


def _parts(rule: Rule, kind: type[And] | type[Or]) -> tuple[Rule, ...]:
    if not isinstance(rule, Rule):
        raise IntaglioError(f"a rule is combined with another rule, not with {rule!r}")
    return rule.rules if isinstance(rule, kind) else (rule,)


def rule_from_dict(data: Mapping[str, Any]) -> Rule:
    """Return the rule that `to_dict` wrote.

    Args:
        data: `kind` and the fields of that kind.

    Raises:
        IntaglioError: the kind is unknown, or a field is missing, unknown or out of range.
    """
    fields = dict(data)
    kind = fields.pop("kind", None)
    if kind not in _KINDS:
        raise IntaglioError(f"there is no visibility rule of the kind {kind!r}; {did_you_mean(str(kind), _KINDS)}")
    return _KINDS[kind]._from_fields(fields)


def check_size(rule: Rule, name: str, own: int, given: int) -> None:
    """Refuse an input of another size than a rule is made for.

    Args:
        rule: the rule.
        name: what is counted.
        own: the rule's number.
        given: the input's.

    Raises:
        IntaglioError: the two differ.
    """
    if own != given:
        raise IntaglioError(f"the rule {rule.kind!r} is made for {own} {name}, and the input has {given}")


def check_count(rule: Rule, name: str, least: int = 1) -> None:
    """Refuse a field of a rule that is no whole number, or too small a one.

    Args:
        rule: the rule.
        name: of the field.
        least: what it may be. Default 1.

    Raises:
        IntaglioError: the field is something else.
    """
    value = getattr(rule, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise IntaglioError(f"{name} of the rule {rule.kind!r} is {value!r}; a whole number from {least} is accepted")
