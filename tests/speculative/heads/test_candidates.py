"""Candidates of draft heads: most likely or drawn, in a static tree."""

from __future__ import annotations

from collections.abc import Callable

import torch

from intaglio.speculative.heads.candidates import CandidateSampler
from intaglio.speculative.static_tree import StaticTree
from intaglio.speculative.tree import TokenTree


def sampler(drawn: bool = False) -> CandidateSampler:
    return CandidateSampler(lambda logits: torch.softmax(logits.float(), -1), drawn, torch.Generator().manual_seed(0))


def test_candidates_of_a_level_are_shared_by_all_above() -> None:
    logits = torch.tensor([[0.0, 3, 2, 1], [5, 4, 0, 0]])
    tree = sampler().cartesian(9, logits, StaticTree.from_paths("0 1 00 01 10"), 5)
    assert (tree.tokens, tree.parents, tree.q) == ([9, 1, 2, 0, 1, 0], [-1, 0, 0, 1, 1, 2], None)
    assert len(sampler().cartesian(9, logits, StaticTree.from_paths("0 1 00 01 10"), 1)) == 3
    assert len(sampler().cartesian(9, logits, StaticTree.from_paths("0 1 00 01 10"), 0)) == 1
    wide = sampler().cartesian(9, logits, StaticTree.from_paths("0 1 2 3 4 5 00 50"), 2)  # more ranks than tokens
    assert len(wide) == 6


def test_drawn_candidates_carry_their_distribution() -> None:
    logits = torch.tensor([[0.0, 3, 2, 1], [5, 4, 0, 0]])
    tree: TokenTree = sampler(drawn=True).cartesian(9, logits, StaticTree.from_paths("0 1 00 01 10"), 5)
    assert tree.q is not None
    assert set(tree.q) == {0, 1, 2}
    torch.testing.assert_close(tree.q[0], torch.softmax(logits[0], -1))
    torch.testing.assert_close(tree.q[2], torch.softmax(logits[1], -1))
    assert tree.tokens[3] == tree.tokens[5]  # drawn once a level
    to_probs: Callable[[torch.Tensor], torch.Tensor] = lambda x: torch.nn.functional.one_hot(x.argmax(-1), 4).float()  # noqa: E731
    narrow = CandidateSampler(to_probs, True).cartesian(9, logits, StaticTree.from_paths("0 1 00 01 10"), 5)
    assert narrow.tokens == [9, 1, 0]  # a distribution over one token gives no second child
