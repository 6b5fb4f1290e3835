"""Metrics of generated outputs: values that follow by counting, and their invariants."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intaglio.checkpoint import Checkpoint
from intaglio.data.segments import Segments
from intaglio.errors import IntaglioError
from intaglio.measures.generated_text import (
    NGramIndex,
    distinct_n,
    oracle_at_k,
    predictive_entropy,
    repetition,
    self_overlap,
    type_token_ratio,
    words,
)
from tests.families import tiny_model

TEXTS = st.lists(st.lists(st.integers(0, 4), max_size=12), min_size=1, max_size=4)


def test_type_token_ratio_by_counting() -> None:
    """TTR examples: [1,2,1,2] -> .5; [5]*96 -> 1/96=.0104; all distinct -> 1. Window uses only the last 96."""
    assert type_token_ratio([1, 2, 1, 2]) == 0.5
    assert type_token_ratio([5] * 96) == 1 / 96
    assert type_token_ratio(list(range(96))) == 1
    assert type_token_ratio([7] * 50 + list(range(96))) == 1
    assert type_token_ratio([7, 7, *range(96)], None) == 96 / 98
    assert type_token_ratio([]) == 0


def test_repetition_is_the_share_of_n_grams_that_came_before() -> None:
    assert repetition([1, 2, 1, 2, 1]) == 0.5  # 12 21 12 21
    assert repetition([1, 2, 3]) == 0
    assert repetition([1, 1, 1, 1], 3) == 0.5
    assert repetition([1], 2) == 0


def test_distinct_n_counts_n_grams_of_all_outputs_over_their_words() -> None:
    assert distinct_n([["a", "b"], ["a", "c"]], 1) == 3 / 4
    assert distinct_n([["a", "b", "a"], ["a", "b"]], 2) == 2 / 5
    assert distinct_n([[]], 2) == 0


def test_self_overlap_is_a_mean_over_ordered_pairs() -> None:
    assert self_overlap([[1, 2, 3], [1, 2, 3]]) == 1
    assert self_overlap([[1, 2, 3], [4, 5, 6]]) == 0
    assert self_overlap([[1, 2, 3], [1, 2]]) == (1 / 2 + 1) / 2
    assert self_overlap([[1, 2, 3]]) == 0


def test_oracle_is_the_best_of_the_first_k() -> None:
    assert [oracle_at_k([0.2, 0.1, 0.9], k) for k in (1, 2, 3)] == [0.2, 0.2, 0.9]
    for k in (0, 4):
        with pytest.raises(IntaglioError, match=f"k is {k}; from 1 to the number of outputs, 3"):
            oracle_at_k([0.2, 0.1, 0.9], k)


def test_words_leave_case_spaces_and_signs_out() -> None:
    assert words(" The cat's hat, THE hat") == ["the", "cat", "s", "hat", "the", "hat"]


@given(TEXTS, st.integers(1, 3))
def test_shares_are_shares_and_copies_add_no_new_n_gram(texts: list[list[int]], n: int) -> None:
    for value in (distinct_n(texts, n), self_overlap(texts, n), *(repetition(text, n) for text in texts)):
        assert 0 <= value <= 1
    assert distinct_n(texts * 2, n) == distinct_n(texts, n) / 2


@given(TEXTS, st.lists(st.integers(0, 4), max_size=12), st.integers(2, 3))
def test_overlap_agrees_with_a_search_by_hand(texts: list[list[int]], text: list[int], n: int) -> None:
    index = NGramIndex(texts, n)
    grams = [text[i : i + n] for i in range(len(text) - n + 1)]

    def occurs(part: list[int]) -> bool:
        return any(row[i : i + len(part)] == part for row in texts for i in range(len(row)))

    expected = sum(map(occurs, grams)) / len(grams) if grams else 0.0
    assert index.overlap(text) == expected
    parts = [text[i:j] for i in range(len(text)) for j in range(i + n, len(text) + 1)]
    assert index.longest_overlap(text) == max((len(part) for part in parts if occurs(part)), default=0)


def test_an_n_gram_of_fewer_than_two_items_is_refused() -> None:
    with pytest.raises(IntaglioError, match="n is 1; an n-gram that counts as copied has at least 2 items"):
        NGramIndex([[1, 2]], 1)


def test_entropy_of_uniform_and_of_certain_predictions() -> None:
    """Entropy of uniform over V = ln V; deterministic = 0."""
    model = tiny_model("llama", layers=1, tie_word_embeddings=False)
    data = Segments.of(torch.randint(8, 150, (3, 9), generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    vocabulary = model.config.vocab_size
    assert predictive_entropy(Checkpoint(model), data) == pytest.approx(math.log(vocabulary), rel=1e-6)
    with torch.no_grad():
        model.model.norm.weight.zero_()  # hidden states are 0; then one direction wins by far
        model.model.norm.weight[0] = 1.0
        model.lm_head.weight[3, 0], model.lm_head.weight[4, 0] = 1e6, -1e6
    assert predictive_entropy(Checkpoint(model), data, batch_size=2) == pytest.approx(0.0, abs=1e-6)


def test_entropy_is_that_of_the_stock_logits() -> None:
    model = tiny_model("gemma3", layers=2)
    ids = torch.randint(8, 150, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        p = model(ids).logits[:, :-1].double().softmax(-1)
    expected = float(-(p * p.log()).sum(-1).mean())
    assert predictive_entropy(Checkpoint(model), Segments.of(ids)) == pytest.approx(expected, rel=1e-5)
