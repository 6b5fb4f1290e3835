"""Static token trees, the same in every pass: chains, trees by widths, sparse trees, and the best tree for a cost.

A static tree says how many children each node has before any token is known. The k-th child of a node stands for the
draft's k-th choice there: its k-th most likely token, or the k-th that is drawn. With a_l,k the probability that the
k-th choice at level l is accepted, a tree T is expected to emit

    F(T) = 1 + sum over nodes of the product of a_l,k along the node's path

tokens per pass, if levels are independent (the 1 is the target's own token).

Sources: Miao et al., SpecInfer, ASPLOS 2024 (trees by widths); Cai et al., Medusa, ICML 2024, section 2.3 (sparse trees
from the accuracy of each rank); Chen et al., Sequoia, NeurIPS 2024, section 3.1 (the dynamic program); Zeng et al.,
Chimera, arXiv 2402.15758 (the tree of 25 nodes in the released code).

Dimension letters: N nodes, the root included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import numpy as np
from torch import Tensor

from intaglio.errors import IntaglioError
from intaglio.speculative._utils import check_count
from intaglio.speculative.tree import TokenTree

CHIMERA = (
    "0 1 2 3 00 01 02 10 11 20 21 30 000 001 002 010 011 020 021 100 0000 0001 0002 00000 00001"
)  # fmt: skip
"""The 25 nodes of Chimera's released code, ranks as digits."""
MAX_NODES = 64
"""Most nodes of a tree whose size follows from its cost."""

Path = tuple[int, ...]
Acceptance = Sequence[float] | Sequence[Sequence[float]]
"""Acceptance probability of each rank, the same at every level; or of each rank by level."""


class StaticTree:
    """A token tree without tokens.

    Args:
        parents: of each node [N]: -1 for the root, which is the first, and an earlier node for every other. Siblings
            are ranked in the order of their indices.

    Raises:
        IntaglioError: the first node is no root, or a parent does not come before its child.
    """

    def __init__(self, parents: Sequence[int]) -> None:
        self.parents = tuple(parents)
        if not self.parents or self.parents[0] != -1:
            raise IntaglioError("a static tree begins with its root, whose parent is -1")
        for node, parent in enumerate(self.parents[1:], 1):
            if not 0 <= parent < node:
                raise IntaglioError(f"a static tree's node {node} has the parent {parent}; accepted: 0 to {node - 1}")

    @classmethod
    def from_paths(cls, paths: Iterable[Sequence[int]] | str) -> StaticTree:
        """Return the tree of nodes named by the ranks of their paths, such as [[0], [1], [0, 0]] or "0 1 00".

        Raises:
            IntaglioError: no nodes, a node without its parent, or one without its better sibling.
        """
        words = [[int(digit) for digit in word] for word in paths.split()] if isinstance(paths, str) else paths
        known = {tuple(path) for path in words}
        if not known:
            raise IntaglioError("the tree has no nodes; give at least one, such as [[0]]")
        for path in known:
            if not path or min(path) < 0:
                raise IntaglioError(f"the tree's node {list(path)} is no path of ranks; ranks count from 0")
            for needed, what in ((path[:-1], "parent"), ((*path[:-1], path[-1] - 1), "better sibling")):
                if needed and needed[-1] >= 0 and needed not in known:
                    raise IntaglioError(f"the tree has the node {list(path)} without its {what} {list(needed)}")
        ordered = sorted(known, key=lambda path: (len(path), path))
        index = {path: node for node, path in enumerate(ordered, 1)} | {(): 0}
        return cls([-1, *(index[path[:-1]] for path in ordered)])

    @classmethod
    def from_widths(cls, widths: Sequence[int]) -> StaticTree:
        """Return the tree with `widths[i]` children at each node of level i; (1,) * n is a chain.

        Raises:
            IntaglioError: no widths, or one below 1.
        """
        check_count("the number of widths", len(widths))
        parents, level = [-1], [0]
        for width in widths:
            check_count("a width", width)
            below = []
            for node in level:
                for _ in range(width):
                    below.append(len(parents))
                    parents.append(node)
            level = below
        return cls(parents)

    def __len__(self) -> int:
        """Return the number of nodes without the root, which a pass verifies."""
        return len(self.parents) - 1

    @cached_property
    def children(self) -> list[list[int]]:
        """Children of each node, the first choice first."""
        children: list[list[int]] = [[] for _ in self.parents]
        for node, parent in enumerate(self.parents[1:], 1):
            children[parent].append(node)
        return children

    @cached_property
    def paths(self) -> list[Path]:
        """Ranks of the path to each node; () for the root."""
        paths: list[Path] = [()] * len(self.parents)
        for node, below in enumerate(self.children):
            for rank, child in enumerate(below):
                paths[child] = (*paths[node], rank)
        return paths

    @cached_property
    def depths(self) -> list[int]:
        """Edges between the root and each node."""
        return [len(path) for path in self.paths]

    @property
    def depth(self) -> int:
        """Levels below the root."""
        return max(self.depths)

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Most children of a node of each level above the last."""
        return tuple(max(len(self.children[node]) for node in self.inner(level)) for level in range(self.depth))

    def inner(self, level: int) -> list[int]:
        """Return the nodes of a level that have children; level 0 is the root."""
        return [node for node, depth in enumerate(self.depths) if depth == level and self.children[node]]

    def truncate(self, depth: int) -> StaticTree:
        """Return the tree without the nodes below a depth."""
        kept = [node for node, own in enumerate(self.depths) if own <= depth]
        index = {node: new for new, node in enumerate(kept)}
        return StaticTree([-1, *(index[self.parents[node]] for node in kept[1:])])

    def fill(
        self, root: int, candidates: Callable[[int], Sequence[int]], probs: Callable[[int], Tensor | None]
    ) -> TokenTree:
        """Return the token tree of one row.

        Args:
            root: the last token emitted.
            candidates: tokens of a node's children, the first choice first; too few leave nodes out.
            probs: the distribution [V] they were drawn from; None if they were not drawn.
        """
        index = {0: 0}
        tokens, parents = [root], [-1]
        q: dict[int, Tensor] = {}
        for node, path in enumerate(self.paths[1:], 1):
            parent = self.parents[node]
            if parent not in index or path[-1] >= len(candidates(parent)):
                continue
            index[node] = len(tokens)
            tokens.append(candidates(parent)[path[-1]])
            parents.append(index[parent])
            drawn_from = probs(parent)
            if drawn_from is not None:
                q[index[parent]] = drawn_from
        return TokenTree(tokens, parents, q or None)

    def expected(self, acceptance: Acceptance) -> float:
        """Return F, the expected tokens per pass; ranks and levels beyond the given ones count 0."""
        levels = _by_level(acceptance, max(1, self.depth))
        reached = [1.0]
        for parent, path in zip(self.parents[1:], self.paths[1:], strict=True):
            level, rank = len(path) - 1, path[-1]
            known = level < len(levels) and rank < len(levels[level])
            reached.append(reached[parent] * levels[level][rank] if known else 0.0)
        return sum(reached)

    def replay(self, ranks: Sequence[int]) -> int:
        """Return the exact number of passes of a greedy text.

        Args:
            ranks: the rank, from 0, that each token of the text has among the draft's choices before it.
        """
        position, passes = 0, 0
        while position < len(ranks):
            node, passes = 0, passes + 1
            while position < len(ranks) and ranks[position] < len(self.children[node]):
                node = self.children[node][ranks[position]]
                position += 1
            position += 1  # the target's own token
        return passes


def widths_within(nodes: int) -> Iterable[tuple[int, ...]]:
    """Return all non-increasing widths whose trees have at most so many nodes and no room for one more level."""

    def grow(widths: tuple[int, ...], level: int, used: int, most: int) -> Iterable[tuple[int, ...]]:
        if level > nodes - used:
            yield widths
            return
        # The same widths with one level more are always at least as good.
        for width in range(min(most, (nodes - used) // level), 0, -1):
            yield from grow((*widths, width), level * width, used + level * width, width)

    return grow((), 1, 0, nodes)


def default_acceptance(levels: int, ranks: int = 8) -> list[list[float]]:
    """Return default acceptance probabilities by level and rank: 0.5 · 0.8^level · 0.35^rank."""
    return [[0.5 * 0.8**level * 0.35**rank for rank in range(ranks)] for level in range(levels)]


def best_tree(acceptance: Acceptance, nodes: int, depth: int | None = None) -> StaticTree:
    """Return the tree with the largest F among all of so many nodes.

    Args:
        acceptance: by rank, or by level and rank; no node has more children, no tree more levels. Values lie between 0
            and 1, at least one is above 0.
        nodes: of the tree, the root not counted; fewer where levels and ranks allow no more.
        depth: most levels. Default None: as many as nodes.

    Raises:
        IntaglioError: nodes or depth below 1, or acceptance outside 0 to 1.
    """
    check_count("nodes", nodes)
    depth = nodes if depth is None else min(depth, nodes)
    check_count("depth", depth)
    values, choices = _best_values(_by_level(acceptance, depth), nodes + 1)
    return _decode(choices, int(np.argmax(values[1:])) + 1)


def best_tree_for_cost(
    acceptance: Acceptance, cost: Callable[[int], float], level_cost: float = 0.0, max_nodes: int = MAX_NODES
) -> StaticTree:
    """Return the tree of one to `max_nodes` nodes with the most expected tokens for the cost of its pass.

    It maximises F(T) / (cost(nodes) + level_cost · levels).

    Args:
        acceptance: as in `best_tree`.
        cost: of a pass with so many drafted tokens, in passes over one token.
        level_cost: added by each level, for drafts that take a pass of their own per level. Default 0.
        max_nodes: most nodes. Default 64.
    """
    levels = _by_level(acceptance, max_nodes)
    best_rate, best = 0.0, StaticTree((-1, 0))
    costs = np.array([cost(nodes) for nodes in range(1, max_nodes + 1)])
    for depth in range(1, len(levels) + 1):
        values, choices = _best_values(levels[:depth], max_nodes + 1)
        rates = values[2:] / (costs + level_cost * depth)
        size = int(np.argmax(rates)) + 2
        if rates[size - 2] > best_rate:
            best_rate, best = float(rates[size - 2]), _decode(choices, size)
    return best


def _by_level(acceptance: Acceptance, depth: int) -> list[list[float]]:
    """Return acceptance by level and rank, at most `depth` levels of it."""
    by_level: list[list[float]] = (
        [[float(value) for value in level] for level in acceptance[:depth]]  # type: ignore[union-attr]
        if len(acceptance) and isinstance(acceptance[0], Sequence)
        else [[float(value) for value in acceptance]] * depth  # type: ignore[arg-type]
    )
    values = [value for level in by_level for value in level]
    if not all(by_level) or not all(0 <= value <= 1 for value in values) or not any(values):
        raise IntaglioError("acceptance probabilities lie between 0 and 1, and one of them is above 0")
    return by_level


def _best_values(levels: Sequence[Sequence[float]], size: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Run Sequoia's dynamic program from the last level up.

    With E_l(n) the best value of a subtree of n nodes whose root lies at level l,

        E_L(1) = 1,    E_l(n) = 1 + max over s_1 + s_2 + ... = n - 1 of the sum of a_l,k E_{l+1}(s_k),

    where a node has a k-th child only if it has the ones before. The maximum is itself built child by child.

    Returns:
        E_0 of each number of nodes [size + 1], and for each level from the top the size of the k-th child where n nodes
        are left for it and those after it [K, size + 1].
    """
    values = np.full(size + 1, -np.inf)
    values[1] = 1.0
    choices: list[np.ndarray] = []
    for index in range(len(levels) - 1, -1, -1):
        before = values
        values, chosen = _add_level(values, levels[index])
        choices.append(chosen)
        if np.array_equal(values, before) and all(level is levels[index] for level in levels[:index]):
            break  # the levels above are alike, and one more helps no subtree
    return values, choices[::-1]


def _add_level(below: np.ndarray, acceptance: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return E of the level above `below`, and the sizes of the children chosen."""
    size = len(below) - 1
    nodes = np.arange(size + 1)
    left = nodes[:, None] - nodes  # nodes left after a child of each size
    fits = (left >= 0) & (nodes >= 1)
    reachable = np.isfinite(below)
    rest = np.where(nodes == 0, 0.0, -np.inf)  # no child is left for any node
    chosen = np.zeros((min(len(acceptance), max(1, size - 1)), size + 1), dtype=np.int64)
    for rank in range(len(chosen) - 1, -1, -1):
        gain = np.where(reachable, acceptance[rank] * np.where(reachable, below, 0.0), -np.inf)
        options = np.where(fits, gain + rest[np.maximum(left, 0)], -np.inf)
        chosen[rank] = options.argmax(1)
        rest = options.max(1)
        rest[0] = 0.0
    return np.concatenate([[-np.inf], 1.0 + rest[:-1]]), chosen


def _decode(choices: Sequence[np.ndarray], size: int) -> StaticTree:
    """Return the tree of `size` nodes that the dynamic program chose, level by level."""
    parents: list[int] = []
    waiting = [(-1, size, 0)]
    for parent, nodes, level in waiting:
        node, left, rank = len(parents), nodes - 1, 0
        parents.append(parent)
        while left:
            share = int(choices[level][rank, left])
            waiting.append((node, share, level + 1))
            left, rank = left - share, rank + 1
    return StaticTree(parents)
