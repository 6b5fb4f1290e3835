"""Fixed trees: the best shape against all shapes, and chances of acceptance against what the loop does with them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.errors import IntaglioError
from intaglio.speculative import Run, Speculative
from intaglio.speculative.drafters import DraftModel, NGramStore
from intaglio.speculative.drafters.dynamic_tree import draft_law
from intaglio.speculative.drafters.rank_statistics import draft_ranks, sampled_shares, shares
from intaglio.speculative.drafters.static_tree import Shape, best, by_widths, chain, widths_within
from tests.speculative.toys import cousin, prompt, ragged, target


def all_shapes(nodes: int) -> Iterator[Shape]:
    """Every tree of so many nodes behind the root, some of them several times."""
    for parents in itertools.product(*(range(node) for node in range(1, nodes + 1))):
        yield Shape([-1, *parents])


def test_shapes() -> None:
    tree = by_widths((2, 1))
    assert tree.parents == (-1, 0, 0, 1, 2)
    assert (len(tree), tree.depth, tree.ranks) == (4, 2, [-1, 0, 1, 0, 0])
    assert chain(3).parents == (-1, 0, 1, 2)
    assert tree.expected([0.5, 0.25]) == pytest.approx(1 + 0.5 + 0.25 + 0.25 + 0.125)
    assert tree.expected([0.5]) == pytest.approx(1 + 0.5 + 0.25)
    for parents in ([], [0], [-1, 1], [-1, -1]):
        with pytest.raises(IntaglioError, match="a shape"):
            Shape(parents)


def test_widths_within_a_budget() -> None:
    assert set(widths_within(5)) == {(5,), (4,), (3,), (2, 1), (1, 1, 1, 1, 1)}
    for widths in widths_within(32):
        assert list(widths) == sorted(widths, reverse=True)
        nodes = len(by_widths(widths))
        leaves = int(np.prod(widths))
        assert nodes <= 32 < nodes + leaves  # no level more fits


@settings(max_examples=40)
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=4).filter(lambda chances: max(chances) > 0.01),
    st.integers(1, 6),
    st.integers(1, 6),
)
def test_the_best_shape_is_the_best_of_all(chances: list[float], nodes: int, depth: int) -> None:
    found = best(chances, nodes, depth)
    assert len(found) <= nodes
    assert found.depth <= depth
    most = max(
        shape.expected(chances)
        for size in range(1, nodes + 1)
        for shape in all_shapes(size)
        if shape.depth <= depth and max(map(len, shape.children)) <= len(chances)
    )
    assert found.expected(chances) == pytest.approx(most)


def test_large_shapes_are_the_likeliest_paths() -> None:
    """Where earlier ranks are likelier, the best tree is the nodes with the largest products."""
    chances = [0.5, 0.2, 0.1, 0.05, 0.02]
    values = [1.0]
    frontier = [1.0]
    for _ in range(12):
        frontier = [value * chance for value in frontier for chance in chances if value * chance > 1e-3]
        values += frontier
    for nodes in (16, 64):
        expected = 1 + sum(sorted(values[1:], reverse=True)[:nodes])
        assert best(chances, nodes).expected(chances) == pytest.approx(expected)
    assert best([1.0], 9).parents == chain(9).parents
    assert best([0.3, 0.3, 0.3], 3, 1).parents == (-1, 0, 0, 0)


@pytest.mark.parametrize(
    ("chances", "nodes", "depth", "says"),
    [
        ([], 3, None, "between 0 and 1"),
        ([0.0], 3, None, "one of them is above 0"),
        ([1.5], 3, None, "between 0 and 1"),
        ([0.5], 0, None, "nodes is 0"),
        ([0.5], 3, 0, "depth is 0"),
    ],
)
def test_shapes_that_cannot_be(chances: list[float], nodes: int, depth: int | None, says: str) -> None:
    with pytest.raises(IntaglioError, match=says):
        best(chances, nodes, depth)


SHAPES = {"chain": chain(4), "widths": by_widths((3, 2)), "best": best([0.4, 0.2, 0.1], 12), "one": chain(1)}


@pytest.mark.parametrize("name", SHAPES)
def test_a_replay_is_what_the_loop_does(name: str) -> None:
    """Passes counted from ranks alone are those of a run, for a model and for a table."""
    model, ids = target("llama"), prompt(7)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 25, "eos_token_id": None}
    whole = model.generate(ids, **options)
    store = NGramStore.build([whole[0, 4:20].tolist(), prompt(60, 3)[0].tolist()], 160)
    for draft in (target("llama"), cousin("llama"), store):
        decoder = Speculative(DraftModel(draft, shape=SHAPES[name].parents))
        assert torch.equal(model.generate(ids, custom_generate=decoder, **options), whole)
        ranks = draft_ranks(draft, (whole[0].tolist(), 8))  # the first new token is the prefill's
        assert SHAPES[name].replay(ranks) == decoder.statistics.passes - 1


def test_fixed_trees_keep_batches_and_draws() -> None:
    model, inputs = target("qwen3"), ragged([4, 9, 2])
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": [2, 15, 33], "pad_token_id": 0}
    expected = model.generate(**inputs, **options)
    for shape in SHAPES.values():
        decoder = Speculative(DraftModel(cousin("qwen3"), shape=shape.parents))
        assert torch.equal(model.generate(**inputs, custom_generate=decoder, **options), expected)


def test_chances_are_shares_of_ranks() -> None:
    assert shares([[0, 0, 1], [2, 9]], 3) == pytest.approx([0.4, 0.2, 0.2])
    with pytest.raises(IntaglioError, match="at least one text"):
        shares([], 3)
    for text in (([1, 2], 2), ([1, 2], 0), ([], 1)):
        with pytest.raises(IntaglioError, match="at least one token stands before and behind"):
            draft_ranks(target("llama"), text)


def test_chances_under_sampling() -> None:
    model = target("llama")
    run = Run(model, ((1,),), True, model.generation_config, 9)
    law = draft_law(run)
    texts = [(prompt(20, seed)[0].tolist(), 5) for seed in range(3)]
    draws = torch.Generator().manual_seed(0)
    assert sampled_shares(model, model, texts, law, law, 3, draws) == [1.0, 0.0, 0.0]  # itself: the first child
    found = sampled_shares(model, cousin("llama"), texts, law, law, 3, draws)
    assert 0 < found[0] < 1
    assert sum(found) < 1
    with pytest.raises(IntaglioError, match="at least one text"):
        sampled_shares(model, model, [], law, law, 3, draws)


def test_a_stores_law_is_a_law() -> None:
    store = NGramStore.build([[1, 2, 3, 1, 2, 4, 1, 2, 3]], 160, order=3)
    for context in ([1], [1, 2], [9, 2], [9], [], [5, 1, 2]):
        law = store.law(context)
        assert law.sum() == pytest.approx(1)
        assert (law >= 0).all()
    # After 1 2: 3 twice and 4 once, two kinds; after 2 the same; by themselves 1 3, 2 3, 3 1 of 8 (the last 3 ends it).
    alone = np.array([3, 3, 1, 1]) / 8
    assert store.law([])[1:5] == pytest.approx(alone)
    one = (np.array([0, 0, 2, 1]) + 2 * alone) / 5
    assert store.law([2])[1:5] == pytest.approx(one)
    assert store.law([1, 2])[1:5] == pytest.approx((np.array([0, 0, 2, 1]) + 2 * one) / 5)
    assert store.law([7, 2])[1:5] == pytest.approx(one)
