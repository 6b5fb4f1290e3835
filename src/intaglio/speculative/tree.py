"""The tree of candidate tokens that one pass of the target verifies.

Node 0 is the root: the last token that was emitted and that the target has not read yet. Every other node is a drafted
token that continues its parent. A step without a draft is the tree of the root alone.

Dimension letters: N nodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from intaglio.errors import IntaglioError


@dataclass(frozen=True, eq=False)
class TokenTree:
    """Candidate continuations of one row, as nodes with parents.

    Siblings may repeat a token; so may cousins. Under sampling, `q` decides node by node by which rule the children are
    verified (`sampling.py` has both rules and their proof). Greedy verification ignores it.

    Args:
        tokens: token id of each node [N]; `tokens[0]` is the root, the last token emitted.
        parents: index of each node's parent [N]; `parents[0]` is -1, the others come after their parents
            (`0 <= parents[i] < i`).
        q: for each node whose children were *drawn*, the distribution [V] they were drawn from, in the order of their
            indices: float, nonnegative, summing to 1, after the draft's own temperature and filters. Whether and how
            often a child is drawn may depend on anything known before the draw, never on the token drawn: pruning
            drawn children by their tokens breaks losslessness. Children of nodes that are not in `q` were chosen
            without chance (a table, the top k). Default None: no children were drawn.
        replace: whether siblings were drawn with replacement, all from `q[node]`; otherwise (default) without: each
            from `q[node]` with the earlier siblings' tokens removed, renormalised.

    Raises:
        IntaglioError: no nodes, unequal lengths, a parent that does not come before its child, a negative token id,
            or a `q` for a missing node.
    """

    tokens: Sequence[int]
    parents: Sequence[int]
    q: Mapping[int, Tensor] | None = None
    replace: bool = False

    def __post_init__(self) -> None:
        if not len(self.tokens):
            raise IntaglioError("a token tree has no nodes; it holds at least its root, the last token emitted")
        if len(self.tokens) != len(self.parents):
            raise IntaglioError(
                f"a token tree has {len(self.tokens)} tokens and {len(self.parents)} parents; give one per node"
            )
        if self.parents[0] != -1:
            raise IntaglioError(f"a token tree's node 0 has the parent {self.parents[0]}; it is the root, whose is -1")
        for node, parent in enumerate(self.parents):
            if not (0 <= parent < node or node == 0):
                raise IntaglioError(
                    f"a token tree's node {node} has the parent {parent}; parents come before their children, "
                    f"so 0 to {node - 1} is accepted"
                )
        if min(self.tokens) < 0:
            raise IntaglioError(f"a token tree holds the token id {min(self.tokens)}; ids start at 0")
        for node in self.q or ():
            if not 0 <= node < len(self.tokens):
                raise IntaglioError(f"a token tree of {len(self.tokens)} nodes has draft probabilities for node {node}")

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def depths(self) -> list[int]:
        """Edges between the root and each node [N]."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        return depths

    @cached_property
    def children(self) -> list[list[int]]:
        """Children of each node [N], in the order of their indices."""
        children: list[list[int]] = [[] for _ in self.tokens]
        for node in range(1, len(self.parents)):
            children[self.parents[node]].append(node)
        return children

    @cached_property
    def ancestors(self) -> np.ndarray:
        """bool [N, N]: whether column j is an ancestor of node i, or i itself."""
        ancestors = np.eye(len(self.tokens), dtype=bool)
        for node in range(1, len(self.parents)):
            ancestors[node] |= ancestors[self.parents[node]]
        return ancestors

    def path(self, node: int) -> list[int]:
        """Return the nodes from the root to `node`, both included."""
        path = [node]
        while path[-1] > 0:
            path.append(self.parents[path[-1]])
        return path[::-1]

    def subtree(self, kept: Sequence[int]) -> TokenTree:
        """Return the tree of some nodes, which include the root and their parents.

        Drawn siblings must stay or go together, so that `q` stays true.
        """
        index = {node: new for new, node in enumerate(kept)}
        inner = {self.parents[node] for node in kept[1:]}
        return TokenTree(
            [self.tokens[node] for node in kept],
            [index.get(self.parents[node], -1) for node in kept],
            {index[node]: probs_V for node, probs_V in (self.q or {}).items() if node in inner} or None,
            self.replace,
        )

    def filtered(self, allowed: Sequence[bool]) -> TokenTree:
        """Return the tree without disallowed nodes and all nodes below them.

        Disallowed siblings that were drawn stay, without children, so that `q` stays true.
        """
        kept = [0]
        for node in range(1, len(self.tokens)):
            parent = self.parents[node]
            drawn = self.q is not None and parent in self.q
            if parent in kept and allowed[parent] and (allowed[node] or drawn):
                kept.append(node)
        return self if len(kept) == len(self.tokens) else self.subtree(kept)

    def truncate(self, depth: int) -> TokenTree:
        """Return the tree without the nodes below a depth (at least 0, the root alone)."""
        if max(self.depths) <= depth:
            return self
        return self.subtree([node for node, own in enumerate(self.depths) if own <= depth])


def root_only(root: int) -> TokenTree:
    """Return the tree of a step without a draft."""
    return TokenTree((root,), (-1,))


def chain(root: int, tokens: Iterable[int]) -> TokenTree:
    """Return a tree that does not branch: the last token emitted and the guesses after it, in order."""
    nodes = [root, *tokens]
    return TokenTree(nodes, range(-1, len(nodes) - 1))


def trie(root: int, paths: Iterable[Sequence[int]], nodes: int) -> TokenTree:
    """Merge candidate continuations that share a prefix; chosen without chance, so without `q`.

    Args:
        root: the last token emitted.
        paths: continuations of the root, the best first.
        nodes: most nodes, the root not counted; the ends of the last paths are left out first.
    """
    tokens, parents = [root], [-1]
    known: dict[tuple[int, int], int] = {}
    for path in paths:
        node = 0
        for token in path:
            child = known.get((node, token))
            if child is None:
                if len(tokens) > nodes:
                    return TokenTree(tokens, parents)
                child = known[node, token] = len(tokens)
                tokens.append(token)
                parents.append(node)
            node = child
    return TokenTree(tokens, parents)
