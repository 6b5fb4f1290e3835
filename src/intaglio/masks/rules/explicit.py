"""Rules given by a tensor: documents of a packed row, and arbitrary masks.

Dimension letters: B batch rows, H heads, L positions.
"""

# ruff: noqa: D102 - overrides are documented in `Rule`
from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from intaglio.errors import IntaglioError
from intaglio.masks.rules.base import Rule, check_size


class _Table(Rule):
    """A rule that indexes a tensor; two are equal when their tensors are."""

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
    """Tokens see each other within the same document of a packed row; combine it with `Causal()` for a decoder.

    Args:
        document_ids: int64 [L] for all rows, or [B, L]: the document of each position.
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
            check_size(self, "rows", len(self.document_ids), rows)

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        ids, end = self.document_ids, self.length
        q_id = ids[_inside(q, end)] if ids.dim() == 1 else ids[b, _inside(q, end)]
        kv_id = ids[_inside(kv, end)] if ids.dim() == 1 else ids[b, _inside(kv, end)]
        return (q_id == kv_id) & (kv < end)

    @property
    def is_noncausal(self) -> bool:
        ids = torch.atleast_2d(self.document_ids).sort(-1).values
        return bool((ids[:, 1:] == ids[:, :-1]).any())


@dataclasses.dataclass(frozen=True, eq=False)
class ExplicitMask(_Table, kind="arbitrary"):
    """An explicit mask: query `q` sees key `kv` where `visible[..., q, kv]` is True.

    Args:
        visible: bool [L, L] for all rows and heads, [H, L, L], or [B, H, L, L] (B or H may be 1).
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
                check_size(self, name, size, given)

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        lead = self.visible.shape[:-2]
        # Axes of size 1 are left out of the lookup, so that the mask stays [1, 1, Q, K] where rows or heads agree.
        used = [index for index, size in zip((b, h)[2 - len(lead) :], lead, strict=True) if size > 1]
        end = self.length
        table = self.visible.reshape(*(size for size in lead if size > 1), end, end)
        return table[(*used, _inside(q, end), _inside(kv, end))] & (kv < end)

    @property
    def is_noncausal(self) -> bool:
        return bool(self.visible.triu(1).any())

    @property
    def extent(self) -> float | None:
        seen = self.visible.reshape(-1, self.length, self.length).any(0).nonzero()
        return int((seen[:, 0] - seen[:, 1]).abs().max()) + 1 if len(seen) else None

    @property
    def per_head(self) -> bool:
        return self.visible.dim() > 2 and self.visible.shape[-3] > 1


def _inside(position: Tensor, end: int) -> Tensor:
    """Clamp padded positions (below 0) and unfilled cache rows (from `end`) into the table."""
    return position.clamp(0, end - 1)
