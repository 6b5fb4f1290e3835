"""How much of a known state single neurons tell: coverage and reconstruction, as board games are read.

A neuron and a cut make a classifier of a property: it says yes where the activation is above the cut. Cuts, and which
neuron stands for a property, are chosen on one set of positions and judged on another.

    coverage         the mean over properties of the F1 of the best classifier
    reconstruction   the mean over positions of the F1 of what is said by all classifiers of high precision together

More neurons find more by luck and by right: `chances` compares at an equal number of them.

Source: Karvonen et al., Measuring Progress in Dictionary Learning for Language Model Interpretability with Board Game
Models, NeurIPS 2024, section 4; there the best classifier is judged where it was chosen.

Dimension letters: P positions, N neurons, C cuts, K properties.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from intaglio.errors import IntaglioError

CUTS = 10
"""Cuts of a neuron: 0, a tenth, two tenths ... of its largest activation."""
PRECISION = 0.95
"""Of a classifier that the reconstruction hears."""
LEAST = 10
"""Positions that such a classifier must have said yes at: fewer are precise by chance."""


def cuts(z_PN: Tensor, count: int = CUTS) -> Tensor:
    """The cuts of each neuron, shares of its largest activation [C, N].

    Args:
        z_PN: activations.
        count: C. Default 10.
    """
    return torch.arange(count)[:, None] / count * z_PN.float().amax(0).clamp_min(0)


@dataclass(frozen=True, eq=False)
class Counts:
    """How every classifier fares with every property on some positions.

    Args:
        right_CNK: positions where it says yes and the property holds.
        yes_CN: where it says yes.
        holds_K: where the property holds.
    """

    right_CNK: Tensor
    yes_CN: Tensor
    holds_K: Tensor

    @classmethod
    def of(cls, z_PN: Tensor, true_PK: Tensor, cuts_CN: Tensor) -> Counts:
        """Count.

        Args:
            z_PN: activations.
            true_PK: bool, the properties.
            cuts_CN: from `cuts`.

        Raises:
            IntaglioError: activations and properties are not of the same positions.
        """
        if len(z_PN) != len(true_PK):
            raise IntaglioError(f"{len(z_PN)} positions have activations and {len(true_PK)} properties; as many must")
        true_PK = true_PK.float()
        right, yes = [], []
        for cut_N in cuts_CN:
            on_PN = (z_PN > cut_N).float()
            right.append(on_PN.T @ true_PK)
            yes.append(on_PN.sum(0))
        return cls(torch.stack(right), torch.stack(yes), true_PK.sum(0))

    @property
    def f1_CNK(self) -> Tensor:
        """2 right / (yes + holds) of every classifier; 0 where neither is."""
        return 2 * self.right_CNK / (self.yes_CN[:, :, None] + self.holds_K).clamp_min(1)

    @property
    def precision_CNK(self) -> Tensor:
        """Right / yes of every classifier; 0 where it never says yes."""
        return self.right_CNK / self.yes_CN[:, :, None].clamp_min(1)


def coverage(chosen: Counts, judged: Counts, neurons: Tensor | None = None) -> Tensor:
    """The F1 of the best neuron and cut of each property [K]; their mean is the coverage.

    Properties that hold nowhere where they are judged are NaN.

    Args:
        chosen: on what neuron and cut are chosen.
        judged: on what they are judged.
        neurons: those that may be chosen, int64. Default: all.
    """
    seen_CNK, judged_CNK = chosen.f1_CNK, judged.f1_CNK
    if neurons is not None:
        seen_CNK, judged_CNK = seen_CNK[:, neurons], judged_CNK[:, neurons]
    best_K = seen_CNK.flatten(0, 1).argmax(0)
    found_K = judged_CNK.flatten(0, 1).gather(0, best_K[None])[0]
    return torch.where(judged.holds_K > 0, found_K, torch.nan)


def random_coverage(chosen: Counts, judged: Counts, count: int, draws: int, generator: torch.Generator) -> float:
    """The mean coverage of neurons drawn at random, as many as another model has.

    Args:
        chosen: on what neuron and cut are chosen.
        judged: on what they are judged.
        count: neurons of a draw; all of them where there are no more.
        draws: that are averaged over.
        generator: of the draws.
    """
    have = chosen.yes_CN.shape[1]
    if count >= have:
        return float(coverage(chosen, judged).nanmean())
    drawn = [torch.randperm(have, generator=generator)[:count] for _ in range(draws)]
    return sum(float(coverage(chosen, judged, neurons).nanmean()) for neurons in drawn) / draws


def reconstruction(
    read_PN: Tensor,
    read_true_PK: Tensor,
    z_PN: Tensor,
    true_PK: Tensor,
    *,
    precision: float = PRECISION,
    least: int = LEAST,
    count: int = CUTS,
) -> float:
    """The mean over positions of the F1 of the state that precise classifiers tell.

    A property is said to hold where any classifier whose precision for it is high says yes. One cut, the same share of
    the largest activation for all neurons, is used: the best where it is chosen.

    Args:
        read_PN: activations on which classifiers and cut are chosen.
        read_true_PK: bool, the state there.
        z_PN: activations on which they are judged.
        true_PK: bool, the state there.
        precision: that is high. Default 0.95.
        least: positions that a classifier must say yes at. Default 10.
        count: cuts to choose from. Default 10.
    """
    cuts_CN = cuts(read_PN, count)
    counts = Counts.of(read_PN, read_true_PK, cuts_CN)
    precise_CNK = (counts.precision_CNK >= precision) & (counts.yes_CN[:, :, None] >= least)
    told = [
        _told_f1(read_PN, read_true_PK, cut_N, hear_NK) for cut_N, hear_NK in zip(cuts_CN, precise_CNK, strict=True)
    ]
    best = max(range(count), key=lambda place: told[place])
    return _told_f1(z_PN, true_PK, cuts_CN[best], precise_CNK[best])


def _told_f1(z_PN: Tensor, true_PK: Tensor, cut_N: Tensor, hear_NK: Tensor) -> float:
    """The mean F1 of positions, a property holding where some neuron that is heard of it says yes."""
    said_PK = (z_PN > cut_N).float() @ hear_NK.float() > 0
    right_P = (said_PK & true_PK).sum(1)
    return float((2 * right_P / (said_PK.sum(1) + true_PK.sum(1)).clamp_min(1)).mean())


__all__ = ["CUTS", "LEAST", "PRECISION", "Counts", "coverage", "cuts", "random_coverage", "reconstruction"]
