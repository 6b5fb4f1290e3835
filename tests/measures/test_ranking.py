"""Ranks, ties and sampled candidates."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intaglio.errors import IntaglioError
from intaglio.measures.ranking import draw_candidates, rank_of, ranking_metrics


def test_ties_count_against_the_target() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0, 3.0]])
    every = torch.ones(1, 5, dtype=torch.bool)
    assert rank_of(scores, torch.tensor([2]), every).tolist() == [3]
    assert rank_of(torch.zeros(1, 5), torch.tensor([2]), every).tolist() == [4]


@given(st.lists(st.integers(-5, 5), min_size=2, max_size=12), st.data())
def test_a_rank_counts_the_candidates_that_are_as_good(values: list[int], data: st.DataObject) -> None:
    target = data.draw(st.integers(0, len(values) - 1))
    kept = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    expected = sum(kept[i] and values[i] >= values[target] for i in range(len(values)) if i != target)
    found = rank_of(torch.tensor([values]).float(), torch.tensor([target]), torch.tensor([kept]))
    assert found.tolist() == [expected]


def test_negatives_are_unseen_distinct_and_follow_their_weights() -> None:
    weights, rng, counts = torch.tensor([0.0, 4, 1, 1, 1, 9, 9]), torch.Generator().manual_seed(0), Counter[int]()
    for _ in range(3000):
        found = draw_candidates(weights, [5], 6, 1, rng).nonzero().flatten().tolist()
        assert len(found) == 2
        assert 6 in found
        counts.update(set(found) - {6})
    assert set(counts) == {1, 2, 3, 4}
    assert abs(counts[1] - 3000 * 4 / 7) < 5 * 3000**0.5 / 2
    assert draw_candidates(weights, [5], 6, 100, rng).sum() == 5


def test_nothing_to_rank_is_one_sentence() -> None:
    with pytest.raises(IntaglioError, match="nothing to rank"):
        ranking_metrics(torch.empty(0, dtype=torch.int64))
