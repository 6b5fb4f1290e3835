"""Trees of a fixed shape: chains, trees by widths (SpecInfer), and the best shape for given chances of acceptance.

A shape says how many children each node has, before any token is known. The k-th child of a node stands for the draft's
k-th choice there: its k-th most likely token, or the k-th that is drawn. If the k-th choice is the right one with
probability a_k, wherever the node is, a tree T is expected to emit

    F(T) = 1 + sum over nodes of the product of a_k along the node's path

tokens a pass (Chen et al., Sequoia, NeurIPS 2024, section 3.1; the 1 is the target's own token).

Dimension letters: N nodes, the root included; K ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np

from intaglio.errors import IntaglioError
from intaglio.speculative.drafters.prompt_lookup import check_count


class Shape:
    """A tree without tokens.

    Args:
        parents: of each node [N]: -1 for the root, which is the first, and an earlier node for every other. Siblings
            are ranked in the order of their indices.

    Raises:
        IntaglioError: the first is no root, or a parent does not come before its child.
    """

    def __init__(self, parents: Sequence[int]) -> None:
        self.parents = tuple(parents)
        if not self.parents or self.parents[0] != -1:
            raise IntaglioError("a shape begins with its root, whose parent is -1")
        for node, parent in enumerate(self.parents[1:], 1):
            if not 0 <= parent < node:
                raise IntaglioError(f"a shape's node {node} has the parent {parent}; 0 to {node - 1} is accepted")

    def __len__(self) -> int:
        """Its nodes, the root not counted: what a pass verifies."""
        return len(self.parents) - 1

    @cached_property
    def children(self) -> list[list[int]]:
        """The children of each node, the first choice first."""
        found: list[list[int]] = [[] for _ in self.parents]
        for node, parent in enumerate(self.parents[1:], 1):
            found[parent].append(node)
        return found

    @cached_property
    def ranks(self) -> list[int]:
        """Which choice of its parent each node is, from 0; -1 for the root."""
        found = [-1] * len(self.parents)
        for below in self.children:
            for rank, node in enumerate(below):
                found[node] = rank
        return found

    @cached_property
    def depth(self) -> int:
        """Edges between the root and the deepest node."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return max(depths)

    def expected(self, acceptance: Sequence[float]) -> float:
        """Tokens a pass that it is expected to emit: F.

        Args:
            acceptance: a_k of each rank [K]; 0 for those beyond.
        """
        reached = [1.0]
        for parent, rank in zip(self.parents[1:], self.ranks[1:], strict=True):
            reached.append(reached[parent] * (acceptance[rank] if rank < len(acceptance) else 0.0))
        return sum(reached)

    def replay(self, ranks: Sequence[int]) -> int:
        """Passes that a greedy text takes with it, exactly: without a model, from the text's ranks.

        Args:
            ranks: the place of each token of the text in the order of the draft's choices before it, from 0.
        """
        place, passes = 0, 0
        while place < len(ranks):
            node, passes = 0, passes + 1
            while place < len(ranks) and ranks[place] < len(self.children[node]):
                node = self.children[node][ranks[place]]
                place += 1
            place += 1  # the target's own token
        return passes


def chain(length: int) -> Shape:
    """One choice after the other.

    Args:
        length: nodes, the root not counted.
    """
    return by_widths((1,) * length)


def by_widths(widths: Sequence[int]) -> Shape:
    """A tree that has `widths[i]` children at each node of level i (Miao et al., SpecInfer, ASPLOS 2024).

    Args:
        widths: of each level.

    Raises:
        IntaglioError: no widths, or one below 1.
    """
    check_count("the number of widths", len(widths))
    for width in widths:
        check_count("a width", width)
    parents, level = [-1], [0]
    for width in widths:
        below = []
        for node in level:
            for _ in range(width):
                below.append(len(parents))
                parents.append(node)
        level = below
    return Shape(parents)


def widths_within(nodes: int) -> Iterable[tuple[int, ...]]:
    """All non-increasing widths whose trees have at most so many nodes and no room for one more level.

    Args:
        nodes: at the most, the root not counted.
    """

    def grow(widths: tuple[int, ...], level: int, used: int, most: int) -> Iterable[tuple[int, ...]]:
        if level > nodes - used:
            yield widths
            return
        # The same widths with one level more are always at least as good.
        for width in range(min(most, (nodes - used) // level), 0, -1):
            yield from grow((*widths, width), level * width, used + level * width, width)

    return grow((), 1, 0, nodes)


def best(acceptance: Sequence[float], nodes: int, depth: int | None = None) -> Shape:
    """The shape with the largest F among all of so many nodes, by dynamic programming (Sequoia, section 3.1).

    With E_d(n) the best value of a subtree of n nodes, its own root included, that is at most d levels deep:

        E_d(1) = 1,    E_d(n) = 1 + max over s_1 + s_2 + ... = n - 1 of the sum of a_k E_{d-1}(s_k),

    where a node has a k-th child only if it has the ones before. The maximum is itself found child by child.

    Args:
        acceptance: a_k of each rank [K]; no node has more children. At least one is above 0.
        nodes: of the tree, the root not counted.
        depth: levels at the most. Default None: as many as nodes.

    Raises:
        IntaglioError: nodes or depth below 1, or chances that are none.
    """
    check_count("nodes", nodes)
    depth = nodes if depth is None else min(depth, nodes)
    check_count("depth", depth)
    chances = [float(value) for value in acceptance]
    if not chances or not all(0 <= value <= 1 for value in chances) or not any(chances):
        raise IntaglioError("the chances of acceptance lie between 0 and 1, and one of them is above 0")
    whole = nodes + 1
    one = np.full(whole + 1, -np.inf)
    one[1] = 1.0
    value, choices = one, []
    for _ in range(depth):
        before = value
        value, chosen = _level(value, chances, whole)
        choices.append(chosen)
        if np.array_equal(value, before):  # one level more helps no subtree, so none will
            break
    parents: list[int] = []
    size = int(np.argmax(value[1:])) + 1  # all of them, unless ranks or levels run out
    waiting = [(-1, size, len(choices))]
    while waiting:
        parent, size, levels = waiting.pop(0)
        node = len(parents)
        parents.append(parent)
        left, rank = size - 1, 0
        while left:
            share = int(choices[levels - 1][rank, left])
            waiting.append((node, share, levels - 1))
            left, rank = left - share, rank + 1
    return Shape(parents)


def _level(below: np.ndarray, chances: Sequence[float], whole: int) -> tuple[np.ndarray, np.ndarray]:
    """E of one level more [N + 1], and the size of the k-th child where n nodes are left for it and those after."""
    ranks = min(len(chances), whole - 1)
    sizes = np.arange(whole + 1)
    rest = np.full(whole + 1, -np.inf)  # nodes that no child is left for
    rest[0] = 0.0
    chosen = np.zeros((ranks, whole + 1), dtype=np.int64)
    for rank in range(ranks - 1, -1, -1):
        gain = np.full(whole + 1, -np.inf)
        gain[1:] = chances[rank] * below[1:] if chances[rank] else np.where(np.isfinite(below[1:]), 0.0, -np.inf)
        now = np.full(whole + 1, -np.inf)
        now[0] = 0.0
        for left in range(1, whole):
            options = gain[1 : left + 1] + rest[left - sizes[1 : left + 1]]
            chosen[rank, left] = int(np.argmax(options)) + 1
            now[left] = options[chosen[rank, left] - 1]
        rest = now
    value = np.full(whole + 1, -np.inf)
    value[1:] = 1.0 + rest[:-1]
    return value, chosen
