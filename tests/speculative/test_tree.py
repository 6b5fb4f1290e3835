from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intaglio.errors import IntaglioError
from intaglio.speculative import TokenTree, chain, root_only, trie
from tests.speculative.toys import random_tree

TREES = st.builds(lambda seed, nodes: random_tree(random.Random(seed), 7, nodes), st.integers(), st.integers(0, 20))


@given(TREES)
def test_depths_children_and_ancestors_agree_with_the_paths(tree: TokenTree) -> None:
    for node in range(len(tree)):
        path = tree.path(node)
        assert path[0] == 0
        assert path[-1] == node
        assert tree.depths[node] == len(path) - 1
        assert np.flatnonzero(tree.ancestors[node]).tolist() == sorted(path)
        assert all(below in tree.children[above] for above, below in itertools.pairwise(path))
    assert sum(map(len, tree.children)) == len(tree) - 1


@given(TREES, st.integers(0, 6))
def test_a_cut_tree_holds_the_same_paths_up_to_its_depth(tree: TokenTree, depth: int) -> None:
    def paths(of: TokenTree) -> list[tuple[int, ...]]:
        return sorted(tuple(of.tokens[n] for n in of.path(node)) for node in range(len(of)) if of.depths[node] <= depth)

    cut = tree.truncate(depth)
    assert max(cut.depths) <= depth
    assert paths(cut) == paths(tree)


def test_a_cut_keeps_the_draft_probabilities_of_nodes_that_keep_their_children() -> None:
    law = torch.tensor([0.5, 0.5])
    tree = TokenTree([1, 0, 1, 0], [-1, 0, 0, 2], {0: law, 2: law / 2})
    assert tree.truncate(2) is tree
    one = tree.truncate(1)
    assert list(one.q or {}) == [0]
    assert tree.truncate(0).q is None
    deep = TokenTree([1, 0, 1, 0, 1], [-1, 0, 1, 0, 3], {3: law})
    assert list(deep.truncate(2).q or {}) == [3]


def test_a_trie_merges_what_begins_alike_and_keeps_the_best_within_its_budget() -> None:
    tree = trie(9, [(1, 2, 3), (1, 2, 4), (5,)], 10)
    assert list(tree.tokens) == [9, 1, 2, 3, 4, 5]
    assert list(tree.parents) == [-1, 0, 1, 2, 2, 0]
    small = trie(9, [(1, 2, 3), (1, 2, 4), (5,)], 4)
    assert list(small.tokens) == [9, 1, 2, 3, 4]
    assert len(trie(9, [], 4)) == len(root_only(9)) == 1
    assert list(chain(9, [1, 2]).parents) == [-1, 0, 1]


@pytest.mark.parametrize(
    ("tokens", "parents", "q", "sentence"),
    [
        ([], [], None, "no nodes"),
        ([1, 2], [-1], None, "2 tokens and 1 parents"),
        ([1], [0], None, "node 0 has the parent 0"),
        ([1, 2, 3], [-1, 2, 0], None, "node 1 has the parent 2"),
        ([1, 2], [-1, -1], None, "node 1 has the parent -1"),
        ([1, -2], [-1, 0], None, "token id -2"),
        ([1, 2], [-1, 0], {5: torch.ones(3)}, "draft probabilities for node 5"),
    ],
)
def test_malformed_trees_are_refused(tokens: list[int], parents: list[int], q: object, sentence: str) -> None:
    with pytest.raises(IntaglioError, match=sentence):
        TokenTree(tokens, parents, q)  # type: ignore[arg-type]
