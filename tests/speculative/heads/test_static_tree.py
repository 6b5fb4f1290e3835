"""Static sparse trees and what fills them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intaglio.errors import IntaglioError
from intaglio.speculative.heads.static_tree import CHIMERA, Picker, Shape, assumed, likely, worth
from intaglio.speculative.tree import TokenTree

CHANCES = st.lists(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=4), min_size=1, max_size=4)


def picker(drawn: bool = False) -> Picker:
    return Picker(lambda logits: torch.softmax(logits.float(), -1), drawn, torch.Generator().manual_seed(0))


def test_the_tree_of_25() -> None:
    shape = Shape.of(CHIMERA)
    assert (len(shape), shape.depth, shape.widths) == (25, 5, (4, 3, 3, 3, 2))
    assert shape.children[()] == 4
    assert shape.children[(0,)] == 3
    assert shape.inner(3) == [(0, 0, 0)]
    assert len(shape.cut(2)) == 12
    assert Shape.of([[1], [0], [0, 0]]).paths == ((0,), (1,), (0, 0))


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
def test_trees_that_are_none(paths: list[list[int]], says: str) -> None:
    with pytest.raises(IntaglioError, match=says):
        Shape.of(paths)


@given(st.integers(1, 12), CHANCES)
def test_the_likely_tree_is_the_best_one(nodes: int, chances: list[list[float]]) -> None:
    chances = [sorted(level, reverse=True) for level in chances]
    shape = likely(nodes, chances)

    def value(path: tuple[int, ...]) -> float:
        found = 1.0
        for level, rank in enumerate(path):
            found *= chances[level][rank]
        return found

    def every(path: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
        if len(path) == len(chances):
            return []
        below = [(*path, rank) for rank in range(len(chances[len(path)]))]
        return below + [more for one in below for more in every(one)]

    best = sorted(map(value, every()), reverse=True)[:nodes]
    assert sorted(map(value, shape.paths), reverse=True) == pytest.approx(best)


def test_the_assumed_chances_give_a_tree_that_narrows() -> None:
    shape = likely(15, assumed(4))
    assert len(shape) == 15
    assert shape.widths == tuple(sorted(shape.widths, reverse=True))
    assert likely(3, [[0.5]]).paths == ((0,),)  # there is no more


def test_candidates_of_a_level_are_shared_by_all_above() -> None:
    logits = torch.tensor([[0.0, 3, 2, 1], [5, 4, 0, 0]])
    tree = picker().cartesian(9, logits, Shape.of("0 1 00 01 10"), 5)
    assert (tree.tokens, tree.parents, tree.q) == ([9, 1, 2, 0, 1, 0], [-1, 0, 0, 1, 1, 2], None)
    assert len(picker().cartesian(9, logits, Shape.of("0 1 00 01 10"), 1)) == 3
    assert len(picker().cartesian(9, logits, Shape.of("0 1 00 01 10"), 0)) == 1
    wide = picker().cartesian(9, logits, Shape.of("0 1 2 3 4 5 00 50"), 2)  # more ranks than tokens
    assert len(wide) == 6


def test_drawn_candidates_carry_their_law() -> None:
    logits = torch.tensor([[0.0, 3, 2, 1], [5, 4, 0, 0]])
    tree: TokenTree = picker(drawn=True).cartesian(9, logits, Shape.of("0 1 00 01 10"), 5)
    assert tree.q is not None
    assert set(tree.q) == {0, 1, 2}
    torch.testing.assert_close(tree.q[0], torch.softmax(logits[0], -1))
    torch.testing.assert_close(tree.q[2], torch.softmax(logits[1], -1))
    assert tree.tokens[3] == tree.tokens[5]  # drawn once a level
    law: Callable[[torch.Tensor], torch.Tensor] = lambda x: torch.nn.functional.one_hot(x.argmax(-1), 4).float()  # noqa: E731
    narrow = Picker(law, True).cartesian(9, logits, Shape.of("0 1 00 01 10"), 5)
    assert narrow.tokens == [9, 1, 0]  # a law with one token gives no second child


def test_a_tree_is_as_large_as_it_pays_to_be() -> None:
    assert len(worth([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]], 0.0)) == 12  # all that chances are known of
    assert worth([[0.5, 0.3], [0.5, 0.3]], 10.0).paths == ((0,),)
    chances = [[0.6, 0.2, 0.1], [0.5, 0.2, 0.1], [0.4, 0.2, 0.1]]
    assert worth(chances, 0.05, level_cost=5.0).depth == 1
    for token_cost, level_cost in ((0.035, 0.0), (0.05, 0.1), (0.2, 0.02)):
        found = worth(chances, token_cost, level_cost)

        def rate(shape: Shape, a: float = token_cost, b: float = level_cost) -> float:
            promised = 1.0
            for path in shape.paths:
                chance = 1.0
                for level, rank in enumerate(path):
                    chance *= chances[level][rank]
                promised += chance
            return promised / (1 + a * len(shape) + b * shape.depth)

        others = (likely(nodes, chances[:depth]) for depth in (1, 2, 3) for nodes in range(1, 40))
        assert rate(found) == pytest.approx(max(map(rate, others)))
