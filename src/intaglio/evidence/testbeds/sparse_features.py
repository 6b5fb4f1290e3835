"""Sparse features: activations that are sums of known directions, more of them than dimensions.

    x = Σ_i h_i v_i,   v_i random of norm 1,   h_i uniform in [0.5, 1.5] for s features, else 0

The sparsity is mixed: each sample draws its s from `sparsities`, and s features without replacement. Directions and
samples follow from the seed.

Dimension letters: N samples, D width, K features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from intaglio.evidence.testbeds.splits import Sized, generator


@dataclass(frozen=True)
class SparseFeatures(Sized):
    """Number of features, width of the samples, and active features of a sample."""

    features: int = 128
    width: int = 42
    samples: int = 50_000
    sparsities: tuple[int, ...] = (3, 3, 3, 3, 20)
    MINIATURE: ClassVar = {"features": 12, "width": 8, "samples": 2000, "sparsities": (1, 3)}

    def directions(self, seed: int) -> Tensor:
        """Return the features' directions [K, D]."""
        rows_KD = generator(f"sparse features {seed}: directions").standard_normal((self.features, self.width))
        return torch.from_numpy(rows_KD / np.linalg.norm(rows_KD, axis=1, keepdims=True)).float()

    def activations(self, seed: int) -> Tensor:
        """Return the samples [N, D]."""
        draws = generator(f"sparse features {seed}: samples")
        order_NK = draws.random((self.samples, self.features)).argsort(axis=1).argsort(axis=1)
        active_NK = order_NK < draws.choice(self.sparsities, self.samples)[:, None]
        codes_NK = active_NK * draws.uniform(0.5, 1.5, (self.samples, self.features))
        return torch.from_numpy(codes_NK).float() @ self.directions(seed)

    @property
    def frequency(self) -> float:
        """Chance of a feature to be active in a sample."""
        return float(np.mean(self.sparsities)) / self.features
