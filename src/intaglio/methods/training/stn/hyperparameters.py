"""Hyperparameters of STN: transforms from unconstrained numbers, and their perturbed values in a batch.

Dimension letters: B examples, H hyperparameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from intaglio.errors import IntaglioError


@dataclass(frozen=True)
class Transform:
    """Map from an unconstrained number h to the value of a hyperparameter.

        bounded (a, b): a + (b - a) sigmoid(h);  half-line: a + softplus(h);  unbounded: h;  discrete: floor of these

    Args:
        low: a; None: unbounded.
        high: b; None: no upper bound.
        discrete: whether values are whole numbers. Default False.
    """

    low: float | None = None
    high: float | None = None
    discrete: bool = False

    def project(self, h: Tensor) -> Tensor:
        """Return the values of unconstrained numbers, elementwise."""
        value = h
        if self.low is not None:
            half = self.high is None
            value = self.low + (F.softplus(h) if half else (self.high - self.low) * h.sigmoid())  # type: ignore[operator]
        return value.floor() if self.discrete else value

    def inverse(self, value: float) -> float:
        """Return the unconstrained number of a value; of a discrete value, that of the middle of its interval.

        Raises:
            IntaglioError: the value lies outside the range.
        """
        inner = value + 0.5 if self.discrete else value
        if self.low is None:
            return inner
        if not self.low < inner or (self.high is not None and not inner < self.high):
            upper = "" if self.high is None else f" and below {self.high:g}"
            lower = f"{'at least' if self.discrete else 'above'} {self.low:g}"
            raise IntaglioError(f"start is {value:g}; it must be {lower}{upper}")
        if self.high is None:
            return inverse_softplus(inner - self.low)
        share = (inner - self.low) / (self.high - self.low)
        return math.log(share) - math.log1p(-share)


def inverse_softplus(value: float) -> float:
    """Return x with softplus(x) = value, above 0."""
    return math.log(math.expm1(value))


class Hyperparameters:
    """Unconstrained hyperparameters h and the raw scales s of their perturbations, sigma = softplus(s).

    Args:
        transforms: of each hyperparameter, H.
        starts: values to begin with, H.
        shared: indices of hyperparameters with one perturbation for all examples of a batch.
        scale: initial sigma.
        device: of the tensors.
    """

    def __init__(
        self,
        transforms: Sequence[Transform],
        starts: Sequence[float],
        shared: Sequence[int],
        scale: float,
        device: torch.device | str = "cpu",
    ) -> None:
        self.transforms, self.shared = tuple(transforms), list(shared)
        first = [transform.inverse(start) for transform, start in zip(transforms, starts, strict=True)]
        self.h_H = torch.tensor(first, device=device, requires_grad=True)
        self.s_H = torch.full((len(first),), inverse_softplus(scale), device=device, requires_grad=True)

    @property
    def sigma_H(self) -> Tensor:
        """Standard deviations of the perturbations."""
        return F.softplus(self.s_H)

    def perturbed(self, noise_BH: Tensor) -> Tensor:
        """Return h + sigma * noise [B, H]; shared hyperparameters take the noise of the first row."""
        noise_BH = noise_BH.clone()
        noise_BH[:, self.shared] = noise_BH[:1, self.shared]
        return self.h_H + self.sigma_H * noise_BH

    @torch.no_grad()
    def values(self, h_BH: Tensor) -> Tensor:
        """Return the values [B, H] of unconstrained numbers, without a gradient."""
        columns = [transform.project(h_BH[:, n]) for n, transform in enumerate(self.transforms)]
        return torch.stack(columns, dim=1)

    def entropy(self) -> Tensor:
        """Return the entropy of the perturbations, `sum_j log(sigma_j sqrt(2 pi e))`, in nats."""
        return (self.sigma_H.log() + 0.5 * math.log(2 * math.pi * math.e)).sum()
