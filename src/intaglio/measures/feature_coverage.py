"""Feature coverage and board reconstruction: how well single neurons predict a known state.

A neuron and a threshold form a classifier of a property: positive where the activation is above the threshold.
Thresholds, and the neuron of a property, are chosen on one set of positions and evaluated on another.

    coverage         mean over properties of the F1 of the best classifier
    reconstruction   mean over positions of the F1 of the predictions of all classifiers of high precision together

More neurons score higher, partly by chance: `chances` compares at an equal number of neurons.

Source: Karvonen et al., Measuring Progress in Dictionary Learning for Language Model Interpretability with Board Game
Models, NeurIPS 2024, section 4; there the best classifier is evaluated where it was chosen.

Dimension letters: P positions, N neurons, C thresholds, K properties.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from intaglio.errors import IntaglioError

CUTS = 10
"""Thresholds per neuron: 0, a tenth, two tenths ... of its largest activation."""
PRECISION = 0.95
"""Precision from which a classifier takes part in the reconstruction."""
LEAST = 10
"""Positive predictions that such a classifier needs: fewer are precise by chance."""


def cuts(z_PN: Tensor, count: int = CUTS) -> Tensor:
    """Return the thresholds of each neuron, as shares of its largest activation [C, N]."""
    return torch.arange(count)[:, None] / count * z_PN.float().amax(0).clamp_min(0)


@dataclass(frozen=True, eq=False)
class Counts:
    """True positives and positive predictions of every classifier, and positives of every property."""

    right_CNK: Tensor
    yes_CN: Tensor
    holds_K: Tensor

    @classmethod
    def of(cls, z_PN: Tensor, true_PK: Tensor, cuts_CN: Tensor) -> Counts:
        """Count on some positions."""
        if len(z_PN) != len(true_PK):
            raise IntaglioError(
                f"{len(z_PN)} positions have activations and {len(true_PK)} have properties; the numbers must agree"
            )
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
        """Right / yes of every classifier; 0 without positive predictions."""
        return self.right_CNK / self.yes_CN[:, :, None].clamp_min(1)


def coverage(chosen: Counts, judged: Counts, neurons: Tensor | None = None) -> Tensor:
    """Return the F1 of the best neuron and threshold of each property [K]; their mean is the coverage.

    Properties without a positive in the evaluation set are NaN.
    """
    chosen_CNK, judged_CNK = chosen.f1_CNK, judged.f1_CNK
    if neurons is not None:
        chosen_CNK, judged_CNK = chosen_CNK[:, neurons], judged_CNK[:, neurons]
    best_K = chosen_CNK.flatten(0, 1).argmax(0)
    f1_K = judged_CNK.flatten(0, 1).gather(0, best_K[None])[0]
    return torch.where(judged.holds_K > 0, f1_K, torch.nan)


def random_coverage(chosen: Counts, judged: Counts, count: int, draws: int, generator: torch.Generator) -> float:
    """Return the mean coverage of random subsets of `count` neurons."""
    num_neurons = chosen.yes_CN.shape[1]
    if count >= num_neurons:
        return float(coverage(chosen, judged).nanmean())
    subsets = [torch.randperm(num_neurons, generator=generator)[:count] for _ in range(draws)]
    return sum(float(coverage(chosen, judged, neurons).nanmean()) for neurons in subsets) / draws


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
    """Return the mean over positions of the F1 of the state that precise classifiers predict.

    A property is predicted where any of its classifiers of high precision is positive. All neurons share the threshold
    (as a share of the largest activation) that is best where it is chosen.
    """
    cuts_CN = cuts(read_PN, count)
    counts = Counts.of(read_PN, read_true_PK, cuts_CN)
    precise_CNK = (counts.precision_CNK >= precision) & (counts.yes_CN[:, :, None] >= least)
    scores = [
        _prediction_f1(read_PN, read_true_PK, cut_N, selected_NK)
        for cut_N, selected_NK in zip(cuts_CN, precise_CNK, strict=True)
    ]
    best = max(range(count), key=lambda index: scores[index])
    return _prediction_f1(z_PN, true_PK, cuts_CN[best], precise_CNK[best])


def _prediction_f1(z_PN: Tensor, true_PK: Tensor, cut_N: Tensor, selected_NK: Tensor) -> float:
    """Return the mean F1 over positions; a property is predicted where any selected neuron fires."""
    predicted_PK = (z_PN > cut_N).float() @ selected_NK.float() > 0
    right_P = (predicted_PK & true_PK).sum(1)
    return float((2 * right_P / (predicted_PK.sum(1) + true_PK.sum(1)).clamp_min(1)).mean())
