"""Visibility rules: which key position a query position may see, as data.

A rule is a frozen object called with index tensors, `rule(b, h, q, kv) -> bool tensor`: batch row, head, query position
and key position, shaped so that they broadcast (dense masks) or scalar (the tracing of a block-sparse kernel). Rules
are put together with `&`, `|` and `~`, compare by value, pickle, and turn into plain data and back (`to_dict`,
`rule_from_dict`).

    Causal() & (Window(64) | Sinks(4))        # a sliding window that always keeps the first four tokens

Positions count from a row's first real token. A window of the model itself and padding are no part of a rule: they are
taken into account where the rule is applied.

Dimension letters: B batch rows, H heads, Q query positions, K key positions, L positions.
"""

# ruff: noqa: D102 - what a rule overrides is described once, in `Rule`
from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from intaglio.errors import IntaglioError, did_you_mean

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
    def looks_right(self) -> bool:
        """Whether some query may see a later key. False is a promise; True may be too careful."""
        return True

    @property
    def settled(self) -> int | None:
        """After how many tokens of a text a further one changes nothing that earlier tokens see; None: never.

        With a number a model can go on from a prompt of at least so many tokens, without a cache.
        """
        return None if self.looks_right else 0

    @property
    def reach(self) -> float | None:
        """How many positions on one side, the query's own included, the rule names by a number; None: it names none.

        Infinite where it names tokens that may be any distance away. A layer's own window that is smaller would cut
        them off in silence.
        """
        return None

    @property
    def widens(self) -> bool:
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
        return And((*_parts(self, And), *_parts(other, And)))

    def __or__(self, other: Rule) -> Rule:
        """Seen where either rule allows it."""
        return Or((*_parts(self, Or), *_parts(other, Or)))

    def __invert__(self) -> Rule:
        """Seen where the rule forbids it."""
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


def _check_size(rule: Rule, name: str, own: int, given: int) -> None:
    if own != given:
        raise IntaglioError(f"the rule {rule.kind!r} is made for {own} {name}, and the input has {given}")


def _check_count(rule: Rule, name: str, least: int = 1) -> None:
    value = getattr(rule, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise IntaglioError(f"{name} of the rule {rule.kind!r} is {value!r}; a whole number from {least} is accepted")


@dataclasses.dataclass(frozen=True)
class Causal(Rule, kind="causal"):
    """Every query sees itself and what came before: `kv <= q`."""

    looks_right = False
    shift_invariant = True
    per_head = False

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return kv <= q


@dataclasses.dataclass(frozen=True)
class Bidirectional(Rule, kind="bidirectional"):
    """Every query sees every key."""

    shift_invariant = True
    per_head = False

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return q == q


@dataclasses.dataclass(frozen=True)
class Window(Rule, kind="window"):
    """A query sees what is fewer than `size` positions away, on both sides: `|q - kv| < size`.

    `Causal() & Window(size)` is the sliding window of Mistral and Gemma with `sliding_window=size`.

    Args:
        size: positions on one side, the query's own included; at least 1.
    """

    size: int
    shift_invariant = True
    per_head = False

    def __post_init__(self) -> None:
        _check_count(self, "size")

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (q - kv).abs() < self.size

    @property
    def looks_right(self) -> bool:
        return self.size > 1

    @property
    def reach(self) -> float | None:
        return self.size


@dataclasses.dataclass(frozen=True)
class Blocks(Rule, kind="blocks"):
    """Tokens see one another only inside the same block of `size` positions, counted from the row's first token.

    Args:
        size: positions of a block; at least 1.
    """

    size: int
    per_head = False

    def __post_init__(self) -> None:
        _check_count(self, "size")

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return torch.div(q, self.size, rounding_mode="floor") == torch.div(kv, self.size, rounding_mode="floor")

    @property
    def looks_right(self) -> bool:
        return self.size > 1

    @property
    def reach(self) -> float | None:
        return self.size


@dataclasses.dataclass(frozen=True)
class Dilated(Rule, kind="dilated"):
    """A window with gaps: `size` keys on one side, `step` apart, the query's own included (Beltagy et al. 2020).

    `|q - kv| < size * step` and `q - kv` a multiple of `step`.

    Args:
        size: keys on one side; at least 1.
        step: distance between two of them; at least 1, which is `Window(size)`.
    """

    size: int
    step: int
    shift_invariant = True
    per_head = False

    def __post_init__(self) -> None:
        _check_count(self, "size")
        _check_count(self, "step")

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return ((q - kv).abs() < self.size * self.step) & ((q - kv) % self.step == 0)

    @property
    def looks_right(self) -> bool:
        return self.size > 1

    @property
    def reach(self) -> float | None:
        return (self.size - 1) * self.step + 1


@dataclasses.dataclass(frozen=True)
class PrefixLM(Rule, kind="prefix_lm"):
    """Causal, but the first `length` tokens see one another in both directions (Dong et al. 2019).

    Args:
        prefix: number of tokens of the prefix, from 0; or one number for each row of the batch.
    """

    prefix: int | tuple[int, ...]
    per_head = False

    def __post_init__(self) -> None:
        if isinstance(self.prefix, list):
            object.__setattr__(self, "prefix", tuple(self.prefix))
        numbers = self.prefix if isinstance(self.prefix, tuple) else (self.prefix,)
        if not numbers or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers):
            raise IntaglioError(
                f"prefix of the rule 'prefix_lm' is {self.prefix!r}; a number from 0, or one for each row, is accepted"
            )

    def check(self, rows: int, heads: int, length: int) -> None:
        if isinstance(self.prefix, tuple):
            _check_size(self, "rows", len(self.prefix), rows)

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        prefix = self.prefix if isinstance(self.prefix, int) else torch.tensor(self.prefix, device=q.device)[b]
        return (kv <= q) | (kv < prefix)

    @property
    def _longest(self) -> int:
        return self.prefix if isinstance(self.prefix, int) else max(self.prefix)

    @property
    def looks_right(self) -> bool:
        return self._longest > 1

    @property
    def settled(self) -> int | None:
        return self._longest if self.looks_right else 0

    @property
    def reach(self) -> float | None:
        return self._longest if self.looks_right else None


@dataclasses.dataclass(frozen=True)
class Sinks(Rule, kind="sinks"):
    """Every query sees the first `count` tokens (the attention sinks of Xiao et al. 2023); join it with `Causal()`.

    Args:
        count: number of tokens; at least 1.
    """

    count: int
    per_head = False

    def __post_init__(self) -> None:
        _check_count(self, "count")

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return kv < self.count

    @property
    def looks_right(self) -> bool:
        return self.count > 1

    @property
    def settled(self) -> int | None:
        return self.count if self.looks_right else 0

    @property
    def reach(self) -> float | None:
        return math.inf


class _Table(Rule):
    """A rule that looks its answer up in one tensor; two are equal when their tensors are."""

    _field: ClassVar[str]

    @property
    def _table(self) -> Tensor:
        table: Tensor = getattr(self, self._field)
        return table

    bounded = True

    @property
    def length(self) -> int:
        """Positions in the table."""
        return self._table.shape[-1]

    def _check_length(self, length: int) -> None:
        if length > self.length:
            raise IntaglioError(f"the rule {self.kind!r} covers {self.length} positions, and the input has {length}")

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._table is other._table or torch.equal(self._table.cpu(), other._table.cpu())

    def __hash__(self) -> int:
        return hash((self.kind, tuple(self._table.shape)))

    def _set(self, value: Any, dtype: torch.dtype) -> None:
        try:
            table = torch.as_tensor(value)
        except (TypeError, ValueError) as error:
            raise IntaglioError(f"{self._field} of the rule {self.kind!r} is no table of numbers: {error}") from None
        object.__setattr__(self, self._field, table.to(dtype))


@dataclasses.dataclass(frozen=True, eq=False)
class BlockDiagonal(_Table, kind="block_diagonal"):
    """Tokens see one another only inside the same document of a packed row; join it with `Causal()` for a decoder.

    Args:
        document_ids: int64 [L] for all rows alike, or [B, L]: the document each position belongs to.
    """

    document_ids: Tensor
    _field = "document_ids"
    per_head = False

    def __post_init__(self) -> None:
        self._set(self.document_ids, torch.int64)
        if self.document_ids.dim() not in (1, 2) or not self.document_ids.numel():
            raise IntaglioError(
                f"document_ids of the rule 'block_diagonal' has the shape {tuple(self.document_ids.shape)}; "
                "[positions] or [rows, positions] is accepted"
            )

    def check(self, rows: int, heads: int, length: int) -> None:
        self._check_length(length)
        if self.document_ids.dim() == 2:
            _check_size(self, "rows", len(self.document_ids), rows)

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        ids, end = self.document_ids, self.length
        q_id = ids[_inside(q, end)] if ids.dim() == 1 else ids[b, _inside(q, end)]
        kv_id = ids[_inside(kv, end)] if ids.dim() == 1 else ids[b, _inside(kv, end)]
        return (q_id == kv_id) & (kv < end)

    @property
    def looks_right(self) -> bool:
        ids = torch.atleast_2d(self.document_ids).sort(-1).values
        return bool((ids[:, 1:] == ids[:, :-1]).any())


@dataclasses.dataclass(frozen=True, eq=False)
class Arbitrary(_Table, kind="arbitrary"):
    """Any pattern, as a table: query `q` sees key `kv` where `visible[..., q, kv]` is True.

    Args:
        visible: bool [L, L] for all rows and heads alike, [H, L, L], or [B, H, L, L] (B or H may be 1).
    """

    visible: Tensor
    _field = "visible"

    def __post_init__(self) -> None:
        self._set(self.visible, torch.bool)
        shape = tuple(self.visible.shape)
        if len(shape) not in (2, 3, 4) or shape[-1] != shape[-2] or not self.visible.numel():
            raise IntaglioError(
                f"visible of the rule 'arbitrary' has the shape {shape}; [L, L], [heads, L, L] or "
                "[rows, heads, L, L] is accepted"
            )

    def check(self, rows: int, heads: int, length: int) -> None:
        self._check_length(length)
        for name, size, given in zip(("heads", "rows"), self.visible.shape[-3::-1], (heads, rows), strict=False):
            if size > 1:
                _check_size(self, name, size, given)

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        lead = self.visible.shape[:-2]
        # Axes of size 1 are left out of the lookup, so that the mask stays [1, 1, Q, K] where rows or heads agree.
        used = [index for index, size in zip((b, h)[2 - len(lead) :], lead, strict=True) if size > 1]
        end = self.length
        table = self.visible.reshape(*(size for size in lead if size > 1), end, end)
        return table[(*used, _inside(q, end), _inside(kv, end))] & (kv < end)

    @property
    def looks_right(self) -> bool:
        return bool(self.visible.triu(1).any())

    @property
    def reach(self) -> float | None:
        seen = self.visible.reshape(-1, self.length, self.length).any(0).nonzero()
        return int((seen[:, 0] - seen[:, 1]).abs().max()) + 1 if len(seen) else None

    @property
    def per_head(self) -> bool:
        return self.visible.dim() > 2 and self.visible.shape[-3] > 1


def _inside(position: Tensor, end: int) -> Tensor:
    """Keep lookups of padded positions (below 0) and of unfilled cache rows (from `end`) inside the table."""
    return position.clamp(0, end - 1)


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
    def widens(self) -> bool:
        return any(rule.widens for rule in self.rules)

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
    """Seen where every one of the rules allows it.

    Args:
        rules: two or more.
    """

    rules: tuple[Rule, ...]

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        seen = self.rules[0](b, h, q, kv)
        for rule in self.rules[1:]:
            seen = seen & rule(b, h, q, kv)
        return seen

    @property
    def looks_right(self) -> bool:
        return all(rule.looks_right for rule in self.rules)

    @property
    def settled(self) -> int | None:
        return min((rule.settled for rule in self.rules if rule.settled is not None), default=None)

    @property
    def reach(self) -> float | None:
        return min((rule.reach for rule in self.rules if rule.reach is not None), default=None)


@dataclasses.dataclass(frozen=True)
class Or(_Composite, kind="or"):
    """Seen where any of the rules allows it.

    Args:
        rules: two or more.
    """

    rules: tuple[Rule, ...]

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        seen = self.rules[0](b, h, q, kv)
        for rule in self.rules[1:]:
            seen = seen | rule(b, h, q, kv)
        return seen

    @property
    def looks_right(self) -> bool:
        return any(rule.looks_right for rule in self.rules)

    @property
    def settled(self) -> int | None:
        known = [rule.settled for rule in self.rules if rule.settled is not None]
        return max(known) if len(known) == len(self.rules) else None

    @property
    def reach(self) -> float | None:
        return max((rule.reach for rule in self.rules if rule.reach is not None), default=None)


@dataclasses.dataclass(frozen=True)
class Not(Rule, kind="not"):
    """Seen where the rule forbids it. Taken to look right, whatever the rule.

    Args:
        rule: the rule that is turned round.
    """

    rule: Rule

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return ~self.rule(b, h, q, kv)

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
        return self if moved is self.rule else Not(moved)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "rule": self.rule.to_dict()}

    @classmethod
    def _from_fields(cls, fields: Mapping[str, Any]) -> Self:
        if set(fields) != {"rule"}:
            raise IntaglioError(f"the rule 'not' takes rule, not {', '.join(sorted(fields)) or 'nothing'}")
        return cls(rule_from_dict(fields["rule"]))


@dataclasses.dataclass(frozen=True)
class Wide(Rule, kind="wide"):
    """The same rule without the sliding window that a layer may have; run without a cache, which keeps the window.

    Args:
        rule: what is seen.
    """

    rule: Rule
    widens = True

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return self.rule(b, h, q, kv)

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
        return self if moved is self.rule else Wide(moved)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "rule": self.rule.to_dict()}

    @classmethod
    def _from_fields(cls, fields: Mapping[str, Any]) -> Self:
        if set(fields) != {"rule"}:
            raise IntaglioError(f"the rule 'wide' takes rule, not {', '.join(sorted(fields)) or 'nothing'}")
        return cls(rule_from_dict(fields["rule"]))


Score = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Alibi:
    """A score rule: `-slope_h * |q - kv|` is added to the attention scores (Press et al. 2021).

    Slopes are the powers of `2 ** (-8 / heads)`, from the first on; `heads` should be a power of two.

    Args:
        heads: number of attention heads.
    """

    heads: int

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return -(2.0 ** (-8.0 / self.heads * (h + 1))) * (q - kv).abs()
