"""The fixed pattern of the Sparse Transformer (Child et al., 2019): own segment, and the ends of earlier segments.

    query i sees j <= i  where  floor(i / m) = floor(j / m)  or  j mod m >= m - c

Source: Child et al., Generating Long Sequences with Sparse Transformers, 2019, section 4.3.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.masks import BlockLocal, Causal, Rule, set_visibility


@dataclasses.dataclass(frozen=True)
class SegmentEnds(Rule, kind="segment_ends"):
    """Every query sees the last `count` tokens of every segment of `size` tokens."""

    size: int
    count: int = 1
    per_head = False

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        """Return whether keys are at the end of a segment; see the base."""
        return (kv % self.size >= self.size - self.count) & (q == q)


@dataclasses.dataclass(frozen=True)
class StridedAttention:
    """Give every layer of a checkpoint the pattern.

    Args:
        segment: m; a query reads at most m + c · L / m tokens.
        summary: c, tokens at the end of each earlier segment. Default 1.
    """

    segment: int
    summary: int = 1

    def __call__(self, checkpoint: Checkpoint, seed: int) -> None:
        """Set the rules in place; nothing is drawn."""
        set_visibility(
            checkpoint.model, Causal() & (BlockLocal(self.segment) | SegmentEnds(self.segment, self.summary))
        )
