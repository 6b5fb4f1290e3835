"""How often a drafted token is accepted, learnt from the steps before: what may stand in for its draft probability.

Under sampling a drawn token is accepted far more often than its draft probability says (with probability
sum min(T, D) over the whole law), so plain DySpec gives too much of its budget to siblings.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence

from intaglio.verify.tree import TokenTree

_EDGES = (0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
_WEIGHT = 8.0
"""Trials that the draft probability itself is worth in each bin."""


class Acceptance:
    """a(R[y]): the draft probability at first, then what was seen of probabilities like it.

    In each of eleven bins of R[y], with n tokens tried and k of them accepted,

        a(r) = (k + 8 r) / (n + 8).
    """

    def __init__(self) -> None:
        self.tried = [0] * (len(_EDGES) + 1)
        self.accepted = [0] * (len(_EDGES) + 1)

    def __call__(self, share: float) -> float:
        """The estimated chance of acceptance.

        Args:
            share: R[y].
        """
        place = bisect(_EDGES, share)
        return (self.accepted[place] + _WEIGHT * share) / (self.tried[place] + _WEIGHT)

    def learn(self, tree: TokenTree, path: Sequence[int], tokens: Sequence[int], drafted: int,
              shares: Sequence[float]) -> None:  # fmt: skip
        """Take in what became of the tokens that were tried: the children along the path, up to the accepted one.

        Args:
            tree: what was verified.
            path: as in `Step`.
            tokens: as in `Step`.
            drafted: as in `Step`.
            shares: R[y] of each node of the tree.
        """
        for place, node in enumerate(path):
            for child in tree.children[node]:
                hit = place < drafted and tree.tokens[child] == tokens[place]
                found = bisect(_EDGES, shares[child])
                self.tried[found] += 1
                self.accepted[found] += hit
                if hit:
                    break
