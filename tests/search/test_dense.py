"""Exact dense search against a sort of all products."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intaglio.search import dense


@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 300), min_size=1, max_size=3),
    st.integers(1, 40),
    st.integers(1, 3),
    st.sampled_from([None, 0.0, 0.02, 0.9]),
    st.integers(1, 1000),
)
def test_search_equals_a_sort_of_all_products(
    seed: int, sizes: list[int], k: int, queries: int, allowed: float | None, block: int
) -> None:
    """Small integers, so that products are exact and many are equal."""
    rng = np.random.default_rng(seed)
    segments = [rng.integers(-3, 4, (size, 3)).astype(np.float32) for size in sizes]
    masks = [None if allowed is None else (rng.random(size) < allowed).astype(np.uint8) for size in sizes]
    queries_BD = rng.integers(-3, 4, (queries, 3)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "BLOCK_SCORES", block)
        results = dense.search(segments, masks, queries_BD, k)
    vectors_ND = np.concatenate(segments)
    kept = np.concatenate([np.ones(len(s)) if m is None else m for s, m in zip(segments, masks, strict=True)]) != 0
    for query, (scores, rows) in zip(queries_BD, results, strict=True):
        expected = vectors_ND @ query
        best = [row for row in np.lexsort((np.arange(len(expected)), -expected)) if kept[row]][:k]
        assert rows.tolist() == best
        assert scores.tolist() == expected[best].tolist()
