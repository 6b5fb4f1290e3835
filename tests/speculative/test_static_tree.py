"""Static trees: the best tree against all trees, and acceptance statistics against what the loop does with them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.errors import IntaglioError
from intaglio.speculative import DecodingRun, Speculative
from intaglio.speculative.drafters import DraftModel, NGramStore
from intaglio.speculative.drafters.dynamic_tree import draft_probs_fn
from intaglio.speculative.drafters.rank_statistics import acceptance_by_rank, draft_ranks, sampled_acceptance_by_rank
from intaglio.speculative.static_tree import (
    CHIMERA,
    StaticTree,
    best_tree,
    best_tree_for_cost,
    default_acceptance,
    widths_within,
)
from tests.speculative.toys import cousin, prompt, ragged, target


def all_trees(nodes: int) -> Iterator[StaticTree]:
    """Every tree of so many nodes behind the root, some of them several times."""
    for parents in itertools.product(*(range(node) for node in range(1, nodes + 1))):
        yield StaticTree([-1, *parents])


def test_trees_of_widths_and_parents() -> None:
    tree = StaticTree.from_widths((2, 1))
    assert tree.parents == (-1, 0, 0, 1, 2)
    assert (len(tree), tree.depth, tree.paths) == (4, 2, [(), (0,), (1,), (0, 0), (1, 0)])
    assert StaticTree.from_widths((1,) * 3).parents == (-1, 0, 1, 2)
    assert tree.expected([0.5, 0.25]) == pytest.approx(1 + 0.5 + 0.25 + 0.25 + 0.125)
    assert tree.expected([0.5]) == pytest.approx(1 + 0.5 + 0.25)
    for parents in ([], [0], [-1, 1], [-1, -1]):
        with pytest.raises(IntaglioError, match="a static tree"):
            StaticTree(parents)


def test_widths_within_a_budget() -> None:
    assert set(widths_within(5)) == {(5,), (4,), (3,), (2, 1), (1, 1, 1, 1, 1)}
    for widths in widths_within(32):
        assert list(widths) == sorted(widths, reverse=True)
        nodes = len(StaticTree.from_widths(widths))
        leaves = int(np.prod(widths))
        assert nodes <= 32 < nodes + leaves  # no level more fits


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=4).filter(lambda chances: max(chances) > 0.01),
    st.integers(1, 6),
    st.integers(1, 6),
)
def test_the_best_tree_is_the_best_of_all(chances: list[float], nodes: int, depth: int) -> None:
    found = best_tree(chances, nodes, depth)
    assert len(found) <= nodes
    assert found.depth <= depth
    most = max(
        tree.expected(chances)
        for size in range(1, nodes + 1)
        for tree in all_trees(size)
        if tree.depth <= depth and max(map(len, tree.children)) <= len(chances)
    )
    assert found.expected(chances) == pytest.approx(most)


def test_large_trees_are_the_most_likely_paths() -> None:
    """Where earlier ranks are likelier, the best tree is the nodes with the largest products."""
    chances = [0.5, 0.2, 0.1, 0.05, 0.02]
    values = [1.0]
    frontier = [1.0]
    for _ in range(12):
        frontier = [value * chance for value in frontier for chance in chances if value * chance > 1e-3]
        values += frontier
    for nodes in (16, 64):
        expected = 1 + sum(sorted(values[1:], reverse=True)[:nodes])
        assert best_tree(chances, nodes).expected(chances) == pytest.approx(expected)
    assert best_tree([1.0], 9).parents == StaticTree.from_widths((1,) * 9).parents
    assert best_tree([0.3, 0.3, 0.3], 3, 1).parents == (-1, 0, 0, 0)


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
def test_impossible_settings_of_the_best_tree_are_refused(
    chances: list[float], nodes: int, depth: int | None, says: str
) -> None:
    with pytest.raises(IntaglioError, match=says):
        best_tree(chances, nodes, depth)


TREES = {
    "chain": StaticTree.from_widths((1,) * 4),
    "widths": StaticTree.from_widths((3, 2)),
    "best": best_tree([0.4, 0.2, 0.1], 12),
    "one": StaticTree.from_widths((1,) * 1),
}


@pytest.mark.parametrize("name", TREES)
def test_a_replay_is_what_the_loop_does(name: str) -> None:
    """Passes counted from ranks alone are those of a run, for a model and for a table."""
    model, ids = target("llama"), prompt(7)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 25, "eos_token_id": None}
    whole = model.generate(ids, **options)
    store = NGramStore.build([whole[0, 4:20].tolist(), prompt(60, 3)[0].tolist()], 160)
    for draft in (target("llama"), cousin("llama"), store):
        decoder = Speculative(DraftModel(draft, shape=TREES[name].parents))
        assert torch.equal(model.generate(ids, custom_generate=decoder, **options), whole)
        ranks = draft_ranks(draft, (whole[0].tolist(), 8))  # the first new token is the prefill's
        assert TREES[name].replay(ranks) == decoder.statistics.passes - 1


def test_fixed_trees_keep_batches_and_draws() -> None:
    model, inputs = target("qwen3"), ragged([4, 9, 2])
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": [2, 15, 33], "pad_token_id": 0}
    expected = model.generate(**inputs, **options)
    for shape in TREES.values():
        decoder = Speculative(DraftModel(cousin("qwen3"), shape=shape.parents))
        assert torch.equal(model.generate(**inputs, custom_generate=decoder, **options), expected)


def test_chances_are_shares_of_ranks() -> None:
    assert acceptance_by_rank([[0, 0, 1], [2, 9]], 3) == pytest.approx([0.4, 0.2, 0.2])
    with pytest.raises(IntaglioError, match="at least one text"):
        acceptance_by_rank([], 3)
    for text in (([1, 2], 2), ([1, 2], 0), ([], 1)):
        with pytest.raises(IntaglioError, match="need at least one "):
            draft_ranks(target("llama"), text)


def test_chances_under_sampling() -> None:
    model = target("llama")
    run = DecodingRun(model, ((1,),), True, model.generation_config, 9)
    to_probs = draft_probs_fn(run)
    texts = [(prompt(20, seed)[0].tolist(), 5) for seed in range(3)]
    draws = torch.Generator().manual_seed(0)
    assert sampled_acceptance_by_rank(model, model, texts, to_probs, to_probs, 3, draws) == [
        1.0,
        0.0,
        0.0,
    ]  # itself: the first child
    found = sampled_acceptance_by_rank(model, cousin("llama"), texts, to_probs, to_probs, 3, draws)
    assert 0 < found[0] < 1
    assert sum(found) < 1
    with pytest.raises(IntaglioError, match="at least one text"):
        sampled_acceptance_by_rank(model, model, [], to_probs, to_probs, 3, draws)


def test_the_stores_distribution_is_a_distribution() -> None:
    store = NGramStore.build([[1, 2, 3, 1, 2, 4, 1, 2, 3]], 160, order=3)
    for context in ([1], [1, 2], [9, 2], [9], [], [5, 1, 2]):
        probs = store.probs(context)
        assert probs.sum() == pytest.approx(1)
        assert (probs >= 0).all()
    # After 1 2: 3 twice and 4 once, two kinds; after 2 the same; by themselves 1 3, 2 3, 3 1 of 8 (the last 3 ends it).
    alone = np.array([3, 3, 1, 1]) / 8
    assert store.probs([])[1:5] == pytest.approx(alone)
    one = (np.array([0, 0, 2, 1]) + 2 * alone) / 5
    assert store.probs([2])[1:5] == pytest.approx(one)
    assert store.probs([1, 2])[1:5] == pytest.approx((np.array([0, 0, 2, 1]) + 2 * one) / 5)
    assert store.probs([7, 2])[1:5] == pytest.approx(one)


ACCEPTANCE = st.lists(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=4), min_size=1, max_size=4)


def test_chimeras_tree_of_25() -> None:
    tree = StaticTree.from_paths(CHIMERA)
    assert (len(tree), tree.depth, tree.widths) == (25, 5, (4, 3, 3, 3, 2))
    assert [len(tree.children[node]) for node in (0, 1)] == [4, 3]
    assert [tree.paths[node] for node in tree.inner(3)] == [(0, 0, 0)]
    assert len(tree.truncate(2)) == 12
    assert StaticTree.from_paths([[1], [0], [0, 0]]).paths == [(), (0,), (1,), (0, 0)]


@pytest.mark.parametrize(
    ("paths", "says"),
    [
        ([], "the tree has no nodes"),
        ([[0], [1, 0]], r"the node \[1, 0\] without its parent \[1\]"),
        ([[0], [2]], r"the node \[2\] without its better sibling \[1\]"),
        ([[]], r"the tree's node \[\] is no path of ranks"),
        ([[-1]], r"the tree's node \[-1\] is no path of ranks"),
    ],
)
def test_paths_that_are_no_tree_are_refused(paths: list[list[int]], says: str) -> None:
    with pytest.raises(IntaglioError, match=says):
        StaticTree.from_paths(paths)


def value(path: tuple[int, ...], acceptance: list[list[float]]) -> float:
    return float(np.prod([acceptance[level][rank] for level, rank in enumerate(path)]))


@given(st.integers(1, 12), ACCEPTANCE)
def test_the_best_tree_by_level_has_the_most_likely_nodes(nodes: int, acceptance: list[list[float]]) -> None:
    acceptance = [sorted(level, reverse=True) for level in acceptance]
    tree = best_tree(acceptance, nodes)

    def every(path: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
        if len(path) == len(acceptance):
            return []
        below = [(*path, rank) for rank in range(len(acceptance[len(path)]))]
        return below + [more for child in below for more in every(child)]

    best = sorted((value(path, acceptance) for path in every()), reverse=True)[:nodes]
    assert sorted((value(path, acceptance) for path in tree.paths[1:]), reverse=True) == pytest.approx(best)
    assert tree.expected(acceptance) == pytest.approx(1 + sum(best))


def test_the_default_acceptance_gives_a_tree_that_narrows() -> None:
    tree = best_tree(default_acceptance(4), 15)
    assert len(tree) == 15
    assert tree.widths == tuple(sorted(tree.widths, reverse=True))
    assert best_tree([[0.5]], 3).paths == [(), (0,)]  # there is no more


def linear(token_cost: float) -> Callable[[int], float]:
    return lambda nodes: 1 + token_cost * nodes


def test_a_tree_is_as_large_as_it_pays_to_be() -> None:
    assert (
        len(best_tree_for_cost([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]], linear(0.0))) == 12
    )  # all nodes with known acceptance
    assert best_tree_for_cost([[0.5, 0.3], [0.5, 0.3]], linear(10.0)).paths == [(), (0,)]
    acceptance = [[0.6, 0.2, 0.1], [0.5, 0.2, 0.1], [0.4, 0.2, 0.1]]
    assert best_tree_for_cost(acceptance, linear(0.05), level_cost=5.0).depth == 1
    for token_cost, level_cost in ((0.035, 0.0), (0.05, 0.1), (0.2, 0.02)):

        def rate(tree: StaticTree, a: float = token_cost, b: float = level_cost) -> float:
            return tree.expected(acceptance) / (1 + a * len(tree) + b * tree.depth)

        others = (best_tree(acceptance[:depth], nodes) for depth in (1, 2, 3) for nodes in range(1, 40))
        assert rate(best_tree_for_cost(acceptance, linear(token_cost), level_cost)) == pytest.approx(
            max(map(rate, others))
        )
