"""The share of zeros of every projection."""

from __future__ import annotations

from intaglio.checkpoint import Checkpoint
from intaglio.modeling.anatomy import anatomy


def zero_fractions(checkpoint: Checkpoint) -> dict[str, float]:
    """Zeros over weights of each projection of each block, by its full name.

    Args:
        checkpoint: what is measured.
    """
    return {
        name: 1.0 - int(linear.read().count_nonzero()) / (linear.shape[0] * linear.shape[1])
        for name, linear in anatomy(checkpoint.model).all_linears()
    }
