"""Contexts with known next-token distributions: mixtures of a few base distributions.

Dimension letters: N contexts, V tokens, M base distributions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from intaglio.evidence.testbeds.splits import Sized, generator


@dataclass(frozen=True, eq=False)
class FiniteSource:
    """True next-token distributions [N, V], probabilities of contexts [N], and meaningless targets [N, V]; float32."""

    distributions_NV: Tensor
    weight_N: Tensor
    targets_NV: Tensor


@dataclass(frozen=True)
class MixtureDistributions(Sized):
    """Numbers of contexts, tokens and base distributions, and the concentrations of base distributions and mixtures."""

    contexts: int = 200
    tokens: int = 20
    bases: int = 8
    base_concentration: float = 0.3
    mixture_concentration: float = 0.3
    MINIATURE: ClassVar = {"contexts": 40, "tokens": 8, "bases": 4}

    def source(self, seed: int) -> FiniteSource:
        """Return a random source; its targets are random mixtures of random vectors, of the same rank."""
        draws = generator(f"mixture laws:{seed}")
        bases_MV = draws.dirichlet(np.full(self.tokens, self.base_concentration), self.bases)
        weights_NM = draws.dirichlet(np.full(self.bases, self.mixture_concentration), self.contexts)
        weight_N = draws.dirichlet(np.full(self.contexts, 5.0))
        other_NM = draws.dirichlet(np.full(self.bases, self.mixture_concentration), self.contexts)
        targets_NV = other_NM @ draws.standard_normal((self.bases, self.tokens))
        return FiniteSource(
            *(torch.from_numpy(x.astype(np.float32)) for x in (weights_NM @ bases_MV, weight_N, targets_NV))
        )
