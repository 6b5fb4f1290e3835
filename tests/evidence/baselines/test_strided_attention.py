"""The Sparse Transformer's fixed pattern: which tokens a query reads, and how many."""

from __future__ import annotations

import torch

from intaglio.checkpoint import Checkpoint
from intaglio.evidence.baselines.strided_attention import StridedAttention
from intaglio.masks import visible
from tests.families import tiny_model


def pattern(segment: int, summary: int = 1, length: int = 12) -> torch.Tensor:
    checkpoint = Checkpoint(tiny_model("llama", layers=1))
    StridedAttention(segment, summary)(checkpoint, 0)
    return visible(checkpoint.model, length)[0, 0]


def test_a_query_reads_its_own_segment_and_the_end_of_earlier_ones() -> None:
    seen = pattern(4)
    assert seen[6].nonzero()[:, 0].tolist() == [3, 4, 5, 6]
    assert seen[9].nonzero()[:, 0].tolist() == [3, 7, 8, 9]
    assert pattern(4, 2)[9].nonzero()[:, 0].tolist() == [2, 3, 6, 7, 8, 9]


def test_it_reads_no_more_than_combiner_of_the_same_segment() -> None:
    """`fixed` reads its own segment and a span for each earlier one: as many entries."""
    seen = pattern(4)
    assert [int(row.sum()) for row in seen] == [i % 4 + 1 + i // 4 for i in range(12)]
