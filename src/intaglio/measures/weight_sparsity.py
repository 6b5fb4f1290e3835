"""Weight sparsity of the blocks' projections."""

from __future__ import annotations

from dataclasses import dataclass

from intaglio.checkpoint import Checkpoint
from intaglio.modeling.anatomy import anatomy


@dataclass(frozen=True)
class Zeros:
    """Counts of zeros by projection.

    Args:
        counts: `{full name: (zeros, weights)}`.
    """

    counts: dict[str, tuple[int, int]]

    @property
    def fractions(self) -> dict[str, float]:
        """The share of zeros of each projection."""
        return {name: zeros / size for name, (zeros, size) in self.counts.items()}

    @property
    def total(self) -> float | None:
        """The share of zeros of all projections together; None without projections."""
        weights = sum(size for _, size in self.counts.values())
        return sum(zeros for zeros, _ in self.counts.values()) / weights if weights else None


def count_zeros(checkpoint: Checkpoint) -> Zeros:
    """Count the zeros of each projection of each block."""
    counts = {}
    for name, linear in anatomy(checkpoint.model).all_linears(experts=True):
        weight_OI = linear.read()
        counts[name] = (weight_OI.numel() - int(weight_OI.count_nonzero()), weight_OI.numel())
    return Zeros(counts)


def zero_fractions(checkpoint: Checkpoint) -> dict[str, float]:
    """Return the share of zeros of each projection of each block, by its full name."""
    return count_zeros(checkpoint).fractions
