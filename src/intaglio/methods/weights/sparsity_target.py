"""How much to prune and where: `sparsity` (a share of zeros) or `pattern` (N:M), layers left out, and the exact masks.

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
from intaglio.modeling.anatomy import check_widths
from intaglio.modeling.targets import check_patterns, select_layers


def parse_pattern(pattern: str) -> tuple[int, int]:
    """Return (N, M) of `N:M`: N weights of every M consecutive inputs of a row are kept.

    Args:
        pattern: such as `2:4`.

    Raises:
        ValueError: not of that form, or not 1 <= N < M.
    """
    found = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", pattern)
    if found is None:
        raise ValueError(f"{pattern!r} is not a pattern; accepted: N:M, such as 2:4")
    keep, of = int(found[1]), int(found[2])
    if not 1 <= keep < of:
        raise ValueError(f"{pattern!r} keeps {keep} of {of}; accepted: N:M with N from 1 to M - 1")
    return keep, of


def _checked(pattern: str) -> str:
    parse_pattern(pattern)
    return pattern


class SparsityTarget(BaseModel):
    """The two ways of saying how much to prune (exactly one is given), and which layers are left alone.

    Args:
        sparsity: share of zeros in each layer, from 0 up to (not including) 1.
        pattern: `N:M`, keep N of every M consecutive inputs of each row.
        ignore: layers that keep all their weights, by name or shell pattern (`*.down_proj`, `layers.0.*`).
            Default: none.
    """

    # What the validator below says, for editors that read the JSON Schema.
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
            AfterValidator(_checked),
            Field(
                description="N:M, keep N of every M consecutive inputs",
                json_schema_extra={"pattern": r"^[0-9]{1,4}:[0-9]{1,4}$"},
            ),
        ]
        | None
    ) = None
    ignore: list[str] = Field([], description="layers left alone, by name or shell pattern such as *.down_proj")

    @model_validator(mode="after")
    def _one(self) -> Self:
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
        """The linears that `ignore` does not name, in the same order.

        Args:
            linears: `(name, rows, columns)` of each projection.

        Raises:
            IntaglioError: an entry of `ignore` names none of them, or together they name all.
        """
        names = [name for name, _, _ in linears]
        return [linears[place] for place in not_ignored(names, self.ignore)]

    def check(self, linears: Sequence[tuple[str, int, int]]) -> None:
        """Refuse a model whose widths the pattern does not fit, or whose layers are not called what `ignore` says.

        Args:
            linears: `(name, rows, columns)` of each projection.

        Raises:
            IntaglioError: names the first that does not fit.
        """
        taken = self.taken(linears)
        if self.pattern is not None:
            check_widths(taken, parse_pattern(self.pattern)[1], f"the pattern {self.pattern}")


def not_ignored(names: Sequence[str], ignore: Sequence[str]) -> list[int]:
    """The places of the names that `ignore` leaves, in order.

    Args:
        names: of layers.
        ignore: names or shell patterns.

    Raises:
        IntaglioError: there is none, an entry of `ignore` names none of them, or together they name all.
    """
    if not names:
        raise IntaglioError("no projection of this model is a plain matrix, so there is nothing to prune")
    check_patterns(names, {"ignore": ignore})
    left = select_layers(names, None, ignore)
    if not left:
        raise IntaglioError("ignore: names every layer of this model, so nothing would be pruned")
    return left


def pruned_count(size: int, sparsity: float) -> int:
    """floor(size * sparsity), safe from the rounding of products such as 100 * 0.29.

    Args:
        size: number of weights.
        sparsity: share to prune.
    """
    return math.floor(size * sparsity + 1e-9 * size)


def lowest_k_mask(score_RI: Tensor, count: int) -> Tensor:
    """True at the `count` lowest scores of each row; among equal scores the first inputs go first.

    Selection by the count-th value and a running count of its ties: the same choice as a stable sort, at half its time.

    Args:
        score_RI: scores, without NaN.
        count: how many to choose in each row, 0 to I.

    Returns:
        Bool [R, I].
    """
    if count <= 0:
        return torch.zeros_like(score_RI, dtype=torch.bool)
    if count * 8 <= score_RI.shape[1]:  # a few are found about ten times faster so
        cut_R1 = score_RI.topk(count, dim=1, largest=False).values.amax(1, keepdim=True)
    else:
        cut_R1 = score_RI.kthvalue(count, dim=1, keepdim=True).values
    below_RI = score_RI < cut_R1
    ties_RI = score_RI == cut_R1
    wanted_R1 = count - below_RI.sum(1, keepdim=True)
    return below_RI | (ties_RI & (ties_RI.cumsum(1, dtype=torch.int32) <= wanted_R1))


def lowest_of_groups(score_RI: Tensor, keep: int, of: int) -> Tensor:
    """True at the `of - keep` lowest scores of each group of `of` consecutive inputs; ties as in `lowest`.

    Args:
        score_RI: scores; I is a multiple of `of`.
        keep: N.
        of: M.

    Returns:
        Bool [R, I].
    """
    rows, inputs = score_RI.shape
    grouped_GM = score_RI.reshape(-1, of)
    order_GM = grouped_GM.sort(dim=1, stable=True).indices[:, : of - keep]
    mask = torch.zeros_like(grouped_GM, dtype=torch.bool).scatter_(1, order_GM, True)
    return mask.view(rows, inputs)


def prune_mask(score_RI: Tensor, amount: float | tuple[int, int], per: Literal["row", "layer"] = "row") -> Tensor:
    """The mask of what to prune: the lowest scores, exactly as many as asked for.

    Args:
        score_RI: importance of each weight; the smallest go.
        amount: a share of zeros, or (N, M).
        per: compare within each row, or over the whole layer. N:M compares within its groups whatever this says.

    Returns:
        Bool [R, I], True = pruned.

    Raises:
        IntaglioError: a score is NaN.
    """
    if torch.isnan(score_RI).any():
        raise IntaglioError("a pruning score is NaN: the calibration statistics or the weights are not finite")
    if isinstance(amount, tuple):
        return lowest_of_groups(score_RI, *amount)
    if per == "layer":
        flat = score_RI.reshape(1, -1)
        return lowest_k_mask(flat, pruned_count(flat.shape[1], amount)).view_as(score_RI)
    return lowest_k_mask(score_RI, pruned_count(score_RI.shape[1], amount))
