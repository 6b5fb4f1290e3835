"""Interpretability: how well the set of inputs on which a feature is active agrees with a property.

Dimension letters: N prompts, M latents, P properties.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

UNIONS = 10
"""Most values of an attribute in a union."""
INTERPRETABLE = 0.8
"""F1 above which a feature is interpretable."""


def f1_scores(active_NM: Tensor, holds_NP: Tensor) -> Tensor:
    """Return F1 of each feature for each property [P, M]: 2 |A ∩ F| / (|A| + |F|); -inf for features never active.

    Args:
        active_NM: bool, where features are active.
        holds_NP: bool, where properties hold.
    """
    overlap_PM = holds_NP.double().T @ active_NM.double()
    sizes_PM = holds_NP.double().sum(0)[:, None] + active_NM.double().sum(0)
    scores_PM = 2 * overlap_PM / sizes_PM.clamp_min(1)
    return scores_PM.masked_fill(~active_NM.any(0), -torch.inf)


def union_scores(active_NM: Tensor, holds_NP: Tensor, most: int = UNIONS) -> Tensor:
    """Return each feature's best F1 for a union of up to `most` disjoint properties [M].

    Properties join in decreasing order of their own F1, and every prefix is scored.
    """
    single_PM = f1_scores(active_NM, holds_NP)
    order_PM = single_PM.argsort(dim=0, descending=True)[:most]
    overlap_PM = holds_NP.double().T @ active_NM.double()
    sizes_P = holds_NP.double().sum(0)
    hits_PM = overlap_PM.gather(0, order_PM).cumsum(0)
    sizes_PM = sizes_P[order_PM].cumsum(0) + active_NM.double().sum(0)
    best_M: Tensor = (2 * hits_PM / sizes_PM.clamp_min(1)).amax(0)
    return best_M.masked_fill(~active_NM.any(0), -torch.inf)


@dataclass(frozen=True, eq=False)
class FeatureMeanings:
    """The property that each feature agrees with best.

    Args:
        score_M: its F1, -inf for features never active.
        kind_M: its kind, an index into `kinds`.
        kinds: names of kinds; unions are named `KIND, union`.
    """

    score_M: Tensor
    kind_M: Tensor
    kinds: tuple[str, ...]

    @property
    def interpretable_M(self) -> Tensor:
        """Features with an F1 above `INTERPRETABLE`."""
        return self.score_M > INTERPRETABLE

    def share(self) -> float:
        """Return the share of features that were active and are interpretable."""
        alive_M = torch.isfinite(self.score_M)
        return float((self.interpretable_M & alive_M).sum() / alive_M.sum().clamp_min(1))

    def counts(self) -> dict[str, int]:
        """Return the number of interpretable features of each kind."""
        return {kind: int((self.interpretable_M & (self.kind_M == i)).sum()) for i, kind in enumerate(self.kinds)}


def meanings(
    active_NM: Tensor, properties: Mapping[str, Mapping[str, Tensor]], unions: int = UNIONS
) -> FeatureMeanings:
    """Return the best property of each feature.

    Args:
        active_NM: bool, where features are active.
        properties: `{kind: {property: bool [N]}}`; unions are of the values of `io` and `s`.
        unions: most values of a union, never more than half of them. Default 10.
    """
    scores, names = [], []
    for kind, values in properties.items():
        holds_NP = torch.stack(list(values.values()), 1).to(active_NM.device)
        scores.append(f1_scores(active_NM, holds_NP).amax(0))
        names.append(kind)
        if kind in ("io", "s"):
            # A union of most values is the absence of the others.
            scores.append(union_scores(active_NM, holds_NP, min(unions, len(values) // 2)))
            names.append(f"{kind}, union")
    best_M, kind_M = torch.stack(scores).max(0)
    return FeatureMeanings(best_M, kind_M, tuple(names))
