"""Linear tasks on a shared representation: `y_t = w_t^T B^T x + noise`, x standard normal, B with orthonormal columns.

Heads are random of norm 1. A target equals the head of a source, or is a random head, which takes many sources to
explain. Everything follows from the seed.

Dimension letters: D inputs, K representation, T source tasks, N samples, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from intaglio.evidence.testbeds.splits import Sized, generator
from intaglio.methods.training.amtrl_lasso import Samples


@dataclass(frozen=True)
class LinearSource:
    """A task with any number of samples, in an order of its own."""

    map_DH: np.ndarray
    noise: float
    key: str
    available: None = None

    def draw(self, count: int) -> Samples:
        """Return the first samples."""
        inputs, errors = generator(f"{self.key}: inputs"), generator(f"{self.key}: noise")
        x_ND = inputs.standard_normal((count, len(self.map_DH)))
        return Samples(x_ND, x_ND @ self.map_DH + self.noise * errors.standard_normal((count, self.map_DH.shape[1])))


@dataclass(frozen=True)
class LinearTasks(Sized):
    """Sizes of the tasks; `targets` equal sources, and one more is dense."""

    inputs: int = 20
    rank: int = 4
    tasks: int = 60
    noise: float = 1.0
    target_samples: int = 1000
    targets: int = 4
    MINIATURE: ClassVar = {"inputs": 8, "rank": 2, "tasks": 8, "target_samples": 60, "targets": 2}

    def truth(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return B [D, K] and the heads of the sources [K, T]."""
        draws = generator(f"linear tasks {seed}: truth")
        B_DK = np.linalg.qr(draws.standard_normal((self.inputs, self.rank)))[0]
        W_KT = draws.standard_normal((self.rank, self.tasks))
        return B_DK, W_KT / np.linalg.norm(W_KT, axis=0)

    def sources(self, seed: int) -> list[LinearSource]:
        """Return the source tasks."""
        B_DK, W_KT = self.truth(seed)
        return [LinearSource(B_DK @ W_KT[:, [n]], self.noise, f"linear source {seed}:{n}") for n in range(self.tasks)]

    def target_heads(self, seed: int) -> np.ndarray:
        """Return the heads of the targets [K, targets + 1], the dense one last."""
        W_KT = self.truth(seed)[1]
        dense_K = generator(f"linear tasks {seed}: dense target").standard_normal(self.rank)
        return np.column_stack([W_KT[:, : self.targets], dense_K / np.linalg.norm(dense_K)])

    def target(self, seed: int, number: int) -> tuple[Samples, np.ndarray]:
        """Return the samples of a target, and its true map [D]."""
        map_D1 = self.truth(seed)[0] @ self.target_heads(seed)[:, [number]]
        return LinearSource(map_D1, self.noise, f"linear target {seed}:{number}").draw(self.target_samples), map_D1[
            :, 0
        ]
