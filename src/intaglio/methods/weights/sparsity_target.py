"""Sparsity targets (`sparsity` or `pattern` N:M, layers to ignore) and exact pruning masks.

Dimension letters: R rows (outputs), I inputs, M group size, G groups a row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from intaglio.errors import IntaglioError
from intaglio.methods.weights.topk import kth_smallest_of_rows
from intaglio.modeling.anatomy import check_widths
from intaglio.modeling.targets import check_patterns, select_layers


def parse_pattern(pattern: str) -> tuple[int, int]:
    """Return (N, M) of `N:M`: N weights of every M consecutive inputs of a row are kept."""
    match = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", pattern)
    if match is None:
        raise ValueError(f"{pattern!r} is not a pattern; accepted: N:M, such as 2:4")
    keep, of = int(match[1]), int(match[2])
    if not 1 <= keep < of:
        raise ValueError(f"{pattern!r} keeps {keep} of {of}; accepted: N:M with N from 1 to M - 1")
    return keep, of


def _validated(pattern: str) -> str:
    parse_pattern(pattern)
    return pattern


class SparsityTarget(BaseModel):
    """A sparsity target, given in one of two ways, and the layers that are left alone.

    Args:
        sparsity: share of zeros in each layer, 0 <= sparsity < 1.
        pattern: `N:M`, keep N of every M consecutive inputs of each row.
        ignore: layers that keep all their weights, by name or shell pattern (`*.down_proj`, `layers.0.*`). Default:
            none.
    """

    # The validator below, for editors that read the JSON Schema.
    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["sparsity"], "properties": {"sparsity": {"type": "number"}}},
                {"required": ["pattern"], "properties": {"pattern": {"type": "string"}}},
            ]
        }
    )

    sparsity: (
        Annotated[float, Field(ge=0, lt=1, description="share of zeros in each layer, 0 <= sparsity < 1")] | None
    ) = None
    pattern: (
        Annotated[
            str,
            AfterValidator(_validated),
            Field(
                description="N:M, keep N of every M consecutive inputs",
                json_schema_extra={"pattern": r"^[0-9]{1,4}:[0-9]{1,4}$"},
            ),
        ]
        | None
    ) = None
    ignore: list[str] = Field([], description="layers left alone, by name or shell pattern such as *.down_proj")

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError("give either sparsity or pattern")
        return self

    @property
    def amount(self) -> float | tuple[int, int]:
        """The share of zeros, or (N, M)."""
        if self.pattern is not None:
            return parse_pattern(self.pattern)
        assert self.sparsity is not None
        return self.sparsity

    def taken(self, linears: Sequence[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
        """Return the linears that `ignore` does not name, in the same order."""
        names = [name for name, _, _ in linears]
        return [linears[index] for index in not_ignored(names, self.ignore)]

    def check(self, linears: Sequence[tuple[str, int, int]]) -> None:
        """Refuse a model with widths that the pattern does not divide, or without layers that `ignore` names."""
        taken = self.taken(linears)
        if self.pattern is not None:
            check_widths(taken, parse_pattern(self.pattern)[1], f"the pattern {self.pattern}")


def not_ignored(names: Sequence[str], ignore: Sequence[str]) -> list[int]:
    """Return the indices of the names that `ignore` does not match, in order."""
    if not names:
        raise IntaglioError("no projection of this model is a plain matrix, so there is nothing to prune")
    check_patterns(names, {"ignore": ignore})
    left = select_layers(names, None, ignore)
    if not left:
        raise IntaglioError("ignore: names every layer of this model, so nothing would be pruned")
    return left


def pruned_count(size: int, sparsity: float) -> int:
    """Return floor(size * sparsity), safe from the rounding of products such as 100 * 0.29."""
    return math.floor(size * sparsity + 1e-9 * size)


def lowest_k_mask(score_RI: Tensor, count: int) -> Tensor:
    """Return the mask [R, I] of the `count` lowest scores of each row; ties by position, first inputs first.

    Selects by the count-th value and a running count of its ties: the choice of a stable sort in half its time.
    """
    if count <= 0:
        return torch.zeros_like(score_RI, dtype=torch.bool)
    cut_R1 = kth_smallest_of_rows(score_RI, count)
    below_RI = score_RI < cut_R1
    ties_RI = score_RI == cut_R1
    wanted_R1 = count - below_RI.sum(1, keepdim=True)
    return below_RI | (ties_RI & (ties_RI.cumsum(1, dtype=torch.int32) <= wanted_R1))


def lowest_of_groups(score_RI: Tensor, keep: int, of: int) -> Tensor:
    """Return the mask [R, I] of the `of - keep` lowest scores of each group of `of` inputs; ties as in `lowest`."""
    rows, inputs = score_RI.shape
    grouped_GM = score_RI.reshape(-1, of)
    order_GM = grouped_GM.sort(dim=1, stable=True).indices[:, : of - keep]
    mask = torch.zeros_like(grouped_GM, dtype=torch.bool).scatter_(1, order_GM, True)
    return mask.view(rows, inputs)


def prune_mask(score_RI: Tensor, amount: float | tuple[int, int], per: Literal["row", "layer"] = "row") -> Tensor:
    """Return the mask [R, I] of exactly the weights to prune, those with the lowest scores of a row or a layer."""
    if torch.isnan(score_RI).any():
        raise IntaglioError("a pruning score is NaN: the calibration statistics or the weights are not finite")
    if isinstance(amount, tuple):
        return lowest_of_groups(score_RI, *amount)
    if per == "layer":
        flat = score_RI.reshape(1, -1)
        return lowest_k_mask(flat, pruned_count(flat.shape[1], amount)).view_as(score_RI)
    return lowest_k_mask(score_RI, pruned_count(score_RI.shape[1], amount))


def mask_to_float(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask as zeros and ones of a dtype.

    On a CPU a product with it takes a third to a fifth of the time of `masked_fill` or `where`; converting from int8 is
    faster than from bool.
    """
    return mask.view(torch.int8).to(dtype)
