"""What each projection would keep for each alpha that is asked for: sizes, thresholds and factors, made once.

Dimension letters: N tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from intaglio.methods.activations.r_sparse import decompose
from intaglio.methods.activations.r_sparse.linear import ALL, NONE, Rule, SparseLinear
from intaglio.methods.activations.r_sparse.sizes import Split, Wanted
from intaglio.methods.activations.r_sparse.surgery import Layer
from intaglio.methods.activations.r_sparse.thresholds import scores, thresholds
from intaglio.modeling.anatomy import Linear


@dataclass(frozen=True)
class Choice:
    """What one projection does at one alpha.

    Args:
        split: its sizes.
        rule: what is kept.
        kept: the share of the inputs that is above the threshold on the calibration tokens.
    """

    split: Split
    rule: Rule
    kept: float


@dataclass(frozen=True, eq=False)
class Table:
    """One projection.

    Args:
        choices: by alpha.
        pair: factors of the largest rank among them; None: no choice has one.
    """

    choices: Mapping[float, Choice]
    pair: tuple[Tensor, Tensor] | None

    def layer(self, alpha: float) -> Layer:
        """What is put in the projection's place.

        Args:
            alpha: a key of `choices`.
        """
        choice = self.choices[alpha]
        if self.pair is None or not choice.split.rank:
            return choice.rule, None
        down_RI, up_RO = self.pair
        return choice.rule, (down_RI[: choice.split.rank], up_RO[: choice.split.rank])

    def set(self, layer: SparseLinear, alpha: float) -> None:
        """Have a layer that is in place do what it does at another alpha.

        Args:
            layer: of this projection.
            alpha: a key of `choices`.
        """
        layer.rule, pair = self.layer(alpha)
        layer.down, layer.up = (
            (None, None)
            if pair is None
            else tuple(nn.Parameter(part.to(layer.weight).contiguous(), requires_grad=False) for part in pair)
        )
        layer.forget()


@dataclass(frozen=True)
class Options:
    """What decides a table beside alpha; see `RSparse`.

    Args:
        wanted: decides sizes.
        sparsity: of the weights.
        scale: whether scores are scaled; None: unless alpha is 1.
        counted: whether channels are counted by the token, in the place of a threshold.
    """

    wanted: Wanted
    sparsity: float
    scale: bool | None
    counted: bool

    @property
    def key(self) -> list[Any]:
        """All of it as plain data."""
        return [*astuple(self.wanted), self.sparsity, self.scale, self.counted]

    @torch.no_grad()
    def table(self, name: str, linear: Linear, x_NI: Tensor, alphas: Sequence[float]) -> Table:
        """The table of a projection.

        Args:
            name: of it.
            linear: is read.
            x_NI: what enters it on the calibration tokens.
            alphas: what is asked for.
        """
        weight_OI, (outputs, inputs) = linear.read(), linear.shape
        splits = {alpha: self.wanted.of(name, outputs, inputs, self.sparsity, alpha) for alpha in alphas}
        scaled = {alpha: alpha != 1 if self.scale is None else self.scale for alpha in alphas}
        choices: dict[float, Choice] = {}
        for by in sorted(set(scaled.values())):
            same = [alpha for alpha in alphas if scaled[alpha] == by]
            score_NI = scores(x_NI, weight_OI.float().norm(dim=0) if by else None)
            limits = thresholds(score_NI, [splits[alpha].share for alpha in same])
            for alpha, limit in zip(same, limits, strict=True):
                split = splits[alpha]
                if self.counted and limit not in (ALL, NONE):
                    rule, kept = Rule(None, split.channels, by), split.channels / split.inputs
                else:
                    rule = Rule(None if limit == NONE else limit, None, by)
                    kept = float((score_NI > limit).float().mean())
                choices[alpha] = Choice(split, rule, kept)
        rank = max(split.rank for split in splits.values())
        if not rank:
            return Table(choices, None)
        # Other alphas of this sparsity have ranks up to that of a low-rank path alone.
        most = self.wanted.of(name, outputs, inputs, self.sparsity, 0.0).rank
        return Table(choices, decompose.pair(weight_OI, rank, most))


def summary(choices: Mapping[str, Choice]) -> dict[str, Any]:
    """What the record says of sizes.

    Args:
        choices: by the full names of projections.
    """
    splits = {name: choice.split for name, choice in choices.items()}
    inputs = sum(split.inputs for split in splits.values())
    sizes: dict[str, list[list[int]]] = {}
    for name, split in splits.items():
        what = name.split(".", 2)[2] if name.startswith("layers.") else name
        sizes.setdefault(what, []).append([split.channels, split.rank])
    return {
        "layers": len(splits),
        "read": sum(split.read for split in splits.values()) / sum(split.dense for split in splits.values()),
        "kept": sum(choice.kept * choice.split.inputs for choice in choices.values()) / inputs,
        "channels_and_rank": {
            what: found[0] if all(one == found[0] for one in found) else found for what, found in sizes.items()
        },
        "overspent": [name for name, split in splits.items() if split.overspent],
    }


__all__ = ["Choice", "Options", "Table", "summary"]
