"""Positional rules: causal, bidirectional, windows, blocks, prefixes, sinks."""

# ruff: noqa: D102 - overrides are documented in `Rule`
from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from intaglio.errors import IntaglioError
from intaglio.masks.rules.base import Rule, check_count, check_size


@dataclasses.dataclass(frozen=True)
class Causal(Rule, kind="causal"):
    """Every query sees itself and earlier keys: `kv <= q`."""

    is_noncausal = False
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
class _Sized(Rule):
    """A rule with a size in positions, from 1."""

    size: int
    per_head = False

    def __post_init__(self) -> None:
        check_count(self, "size")

    @property
    def is_noncausal(self) -> bool:
        return self.size > 1

    @property
    def extent(self) -> float | None:
        return self.size


@dataclasses.dataclass(frozen=True)
class Window(_Sized, kind="window"):
    """Every query sees the keys fewer than `size` positions away, on both sides: `|q - kv| < size`.

    `Causal() & Window(size)` is the sliding window of Mistral and Gemma with `sliding_window=size`.

    Args:
        size: positions on one side, the query's own included; at least 1.
    """

    shift_invariant = True

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (q - kv).abs() < self.size


@dataclasses.dataclass(frozen=True)
class BlockLocal(_Sized, kind="blocks"):
    """Tokens see each other within the same block of `size` positions, counted from the row's first token.

    Args:
        size: positions of a block; at least 1.
    """

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return torch.div(q, self.size, rounding_mode="floor") == torch.div(kv, self.size, rounding_mode="floor")


@dataclasses.dataclass(frozen=True)
class Dilated(_Sized, kind="dilated"):
    """A window with gaps: `size` keys on one side, `step` apart, the query's own included (Beltagy et al. 2020).

    `|q - kv| < size * step` and `q - kv` a multiple of `step`.

    Args:
        size: keys on one side; at least 1.
        step: distance between neighbouring keys; at least 1, which is `Window(size)`.
    """

    step: int
    shift_invariant = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "step")

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return ((q - kv).abs() < self.size * self.step) & ((q - kv) % self.step == 0)

    @property
    def extent(self) -> float | None:
        return (self.size - 1) * self.step + 1


@dataclasses.dataclass(frozen=True)
class PrefixLM(Rule, kind="prefix_lm"):
    """Causal, except that the first `prefix` tokens see each other in both directions (Dong et al. 2019).

    Args:
        prefix: number of tokens of the prefix, from 0; or a number for each row of the batch.
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
            check_size(self, "rows", len(self.prefix), rows)

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        prefix = self.prefix if isinstance(self.prefix, int) else torch.tensor(self.prefix, device=q.device)[b]
        return (kv <= q) | (kv < prefix)

    @property
    def _longest(self) -> int:
        return self.prefix if isinstance(self.prefix, int) else max(self.prefix)

    @property
    def is_noncausal(self) -> bool:
        return self._longest > 1

    @property
    def prefix_stable_after(self) -> int | None:
        return self._longest if self.is_noncausal else 0

    @property
    def extent(self) -> float | None:
        return self._longest if self.is_noncausal else None


@dataclasses.dataclass(frozen=True)
class AttentionSinks(Rule, kind="sinks"):
    """Every query sees the first `count` tokens (attention sinks, Xiao et al. 2023); combine it with `Causal()`.

    Args:
        count: number of tokens; at least 1.
    """

    count: int
    per_head = False

    def __post_init__(self) -> None:
        check_count(self, "count")

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return kv < self.count

    @property
    def is_noncausal(self) -> bool:
        return self.count > 1

    @property
    def prefix_stable_after(self) -> int | None:
        return self.count if self.is_noncausal else 0

    @property
    def extent(self) -> float | None:
        return math.inf
