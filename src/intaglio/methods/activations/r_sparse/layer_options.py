"""Options of each projection, one for each alpha under consideration: sizes, thresholds and factors, computed once.

Dimension letters: N tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from intaglio.methods.activations.r_sparse.budget import BudgetSpec, BudgetSplit
from intaglio.methods.activations.r_sparse.decomposition import low_rank_pair
from intaglio.methods.activations.r_sparse.layers import ALL, NONE, InputRule, LayerOption, Pair, SparseLinear
from intaglio.methods.activations.r_sparse.thresholds import scores, thresholds
from intaglio.modeling.anatomy import Linear

ALPHAS = (0.2, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
"""Alphas compared by output error."""
ERROR_TOKENS = 512
"""Calibration tokens that the error is taken on."""


@dataclass(frozen=True)
class Choice:
    """One projection at one alpha: its sizes, its rule, and the share of the calibration inputs that the rule keeps."""

    split: BudgetSplit
    rule: InputRule
    kept: float


@dataclass(frozen=True, eq=False)
class LayerOptions:
    """Options of one projection.

    Args:
        choices: by alpha.
        pair: factors of the largest rank among them; None: no choice has one.
    """

    choices: Mapping[float, Choice]
    pair: Pair | None

    def at(self, alpha: float) -> LayerOption:
        """Return the rule and the factors at an alpha among `choices`."""
        choice = self.choices[alpha]
        if self.pair is None or not choice.split.rank:
            return choice.rule, None
        down_RI, up_RO = self.pair
        return choice.rule, (down_RI[: choice.split.rank], up_RO[: choice.split.rank])

    @torch.no_grad()
    def least_error(self, linear: Linear, x_NI: Tensor) -> float:
        """Return the alpha with the least mean over tokens of ||y - W x||² / ||W x||²; of equal ones the largest.

        Shares of each token's own output, so that attention sinks with their large norms count like any token.
        """
        weight_OI = linear.read()
        x_NI = x_NI[:: max(1, len(x_NI) // ERROR_TOKENS)].to(weight_OI)
        y_NO = x_NI @ weight_OI.T
        layer = SparseLinear.from_weight(weight_OI, None, *self.at(max(self.choices)))
        errors = {}
        for alpha in sorted(self.choices, reverse=True):
            layer.set_option(self.at(alpha))
            difference_N = (layer(x_NI) - y_NO).float().square().sum(1)
            errors[alpha] = float((difference_N / y_NO.float().square().sum(1).clamp_min(1e-12)).mean())
        return min(errors, key=errors.__getitem__)


@dataclass(frozen=True)
class OptionSpec:
    """Fields of `RSparse` that decide the options, beside alpha.

    Args:
        budget: decides sizes.
        sparsity: of the weights.
        scale: whether scores are scaled; None: unless alpha is 1.
        topk: whether channels are counted for each token, instead of a threshold.
    """

    budget: BudgetSpec
    sparsity: float
    scale: bool | None
    topk: bool

    @property
    def key(self) -> list[Any]:
        """All of it as plain data."""
        return [*astuple(self.budget), self.sparsity, self.scale, self.topk]

    @torch.no_grad()
    def options(self, name: str, linear: Linear, x_NI: Tensor, alphas: Sequence[float]) -> LayerOptions:
        """Return the options of a projection at some alphas, from its inputs on the calibration tokens."""
        weight_OI, (outputs, inputs) = linear.read(), linear.shape
        splits = {alpha: self.budget.split(name, outputs, inputs, self.sparsity, alpha) for alpha in alphas}
        scaled = {alpha: alpha != 1 if self.scale is None else self.scale for alpha in alphas}
        choices: dict[float, Choice] = {}
        for scale in sorted(set(scaled.values())):
            same = [alpha for alpha in alphas if scaled[alpha] == scale]
            score_NI = scores(x_NI, weight_OI.float().norm(dim=0) if scale else None)
            limits = thresholds(score_NI, [splits[alpha].share for alpha in same])
            for alpha, limit in zip(same, limits, strict=True):
                split = splits[alpha]
                if self.topk and limit not in (ALL, NONE):
                    rule, kept = InputRule(None, split.channels, scale), split.channels / split.inputs
                else:
                    rule = InputRule(None if limit == NONE else limit, None, scale)
                    kept = float((score_NI > limit).float().mean())
                choices[alpha] = Choice(split, rule, kept)
        rank = max(split.rank for split in splits.values())
        if not rank:
            return LayerOptions(choices, None)
        # Other alphas of this sparsity have ranks up to that of a low-rank path alone.
        max_rank = self.budget.split(name, outputs, inputs, self.sparsity, 0.0).rank
        return LayerOptions(choices, low_rank_pair(weight_OI, rank, max_rank))


def summary(choices: Mapping[str, Choice]) -> dict[str, Any]:
    """Return the sizes for the record, from the choices by the full names of projections."""
    splits = {name: choice.split for name, choice in choices.items()}
    inputs = sum(split.inputs for split in splits.values())
    by_kind: dict[str, list[list[int]]] = {}
    for name, split in splits.items():
        kind = name.split(".", 2)[2] if name.startswith("layers.") else name
        by_kind.setdefault(kind, []).append([split.channels, split.rank])
    return {
        "layers": len(splits),
        "read": sum(split.read for split in splits.values()) / sum(split.dense for split in splits.values()),
        "kept": sum(choice.kept * choice.split.inputs for choice in choices.values()) / inputs,
        "channels_and_rank": {
            kind: sizes[0] if all(size == sizes[0] for size in sizes) else sizes for kind, sizes in by_kind.items()
        },
        "overspent": [name for name, split in splits.items() if split.overspent],
    }
