"""Static sparse trees: which ranks of which candidates are verified, the same in every pass.

A node is named by the ranks of its path: (0, 2) is the third candidate behind the first one. The tree is fixed before
anything is drawn, so that under sampling the number of children depends on no token.

Sources: Cai et al., Medusa, ICML 2024, section 2.3 (sparse trees from the accuracy of each rank); Zeng et al., Chimera,
arXiv 2402.15758 (the tree of 25 nodes in the released code).

Dimension letters: K levels, R rows, V vocabulary.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from intaglio.errors import IntaglioError
from intaglio.speculative.heads.lm_head import Words
from intaglio.speculative.tree import TokenTree

Path = tuple[int, ...]

CHIMERA = (
    "0 1 2 3 00 01 02 10 11 20 21 30 000 001 002 010 011 020 021 100 0000 0001 0002 00000 00001"
)  # fmt: skip
"""The 25 nodes of Chimera's released code, ranks as digits."""
WORTH = 64
"""Nodes of a tree at the most, where its size follows from what it is worth."""


@dataclass(frozen=True)
class Shape:
    """A static sparse tree.

    Args:
        paths: the nodes but for the root, each by the ranks of its path, in any order.

    Raises:
        IntaglioError: none, a node whose parent is missing, or one without its better sibling.
    """

    paths: tuple[Path, ...]

    def __post_init__(self) -> None:
        if not self.paths:
            raise IntaglioError("the tree has no nodes; give at least one, such as [[0]]")
        known = set(self.paths)
        for path in self.paths:
            if not path or min(path) < 0:
                raise IntaglioError(f"the tree's node {list(path)} is no path of ranks; ranks count from 0")
            for wanted, what in ((path[:-1], "parent"), ((*path[:-1], path[-1] - 1), "better sibling")):
                if wanted and wanted[-1] >= 0 and wanted not in known:
                    raise IntaglioError(f"the tree has the node {list(path)} without its {what} {list(wanted)}")
        object.__setattr__(self, "paths", tuple(sorted(known, key=lambda path: (len(path), path))))

    @classmethod
    def of(cls, paths: Iterable[Sequence[int]] | str) -> Shape:
        """A tree from paths, or from words of digits such as `0 1 00`.

        Args:
            paths: the nodes.
        """
        words = [[int(digit) for digit in word] for word in paths.split()] if isinstance(paths, str) else paths
        return cls(tuple(tuple(path) for path in words))

    def __len__(self) -> int:
        """Nodes, the root not counted."""
        return len(self.paths)

    @property
    def depth(self) -> int:
        """Levels below the root."""
        return len(self.paths[-1])

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """For each level, the most children of a node of the level above [K]."""
        widths = [0] * self.depth
        for path in self.paths:
            widths[len(path) - 1] = max(widths[len(path) - 1], path[-1] + 1)
        return tuple(widths)

    @cached_property
    def children(self) -> dict[Path, int]:
        """How many children each node has that has any; the root is ()."""
        found: dict[Path, int] = {}
        for path in self.paths:
            found[path[:-1]] = found.get(path[:-1], 0) + 1
        return found

    def inner(self, level: int) -> list[Path]:
        """The nodes of a level that have children; level 0 is the root.

        Args:
            level: edges from the root.
        """
        return sorted(path for path in self.children if len(path) == level)

    def cut(self, depth: int) -> Shape:
        """The tree without what lies deeper.

        Args:
            depth: levels that stay, at least 1.
        """
        return Shape(tuple(path for path in self.paths if len(path) <= depth))

    def build(self, root: int, tokens: Callable[[Path], Sequence[int]], laws: Callable[[Path], Tensor | None]) -> Any:
        """The token tree of one row.

        Args:
            root: the last token emitted.
            tokens: the candidates behind a node, the best or first drawn first; too few leave nodes out.
            laws: what they were drawn from; None if they were not drawn.
        """
        places: dict[Path, int] = {(): 0}
        found, parents = [root], [-1]
        q: dict[int, Tensor] = {}
        for path in self.paths:
            parent = places.get(path[:-1])
            candidates = () if parent is None else tokens(path[:-1])
            if parent is None or path[-1] >= len(candidates):
                continue
            places[path] = len(found)
            found.append(candidates[path[-1]])
            parents.append(parent)
            law = laws(path[:-1])
            if law is not None:
                q[parent] = law
        return TokenTree(found, parents, q or None)


def assumed(levels: int, ranks: int = 8) -> list[list[float]]:
    """What is taken for the chance of each rank at each level where nothing was measured: 0.5, falling by a fifth a
    level and to about a third a rank.

    Args:
        levels: K.
        ranks: of a level. Default 8.
    """
    return [[0.5 * 0.8**level * 0.35**rank for rank in range(ranks)] for level in range(levels)]


def likely(nodes: int, chances: Sequence[Sequence[float]]) -> Shape:
    """The tree of so many nodes whose expected number of accepted tokens is largest, were levels independent.

    The chance that a node is accepted is the product over its path, so the best nodes are taken one by one.

    Args:
        nodes: of the tree, the root not counted; fewer where levels and ranks give no more.
        chances: that the candidate of a rank is right, by level and rank, falling with the rank.
    """
    return Shape(tuple(path for path, _ in _likeliest(nodes, chances)))


def _likeliest(nodes: int, chances: Sequence[Sequence[float]]) -> list[tuple[Path, float]]:
    """The nodes of `likely` with their chances, the best first."""
    heap: list[tuple[float, int, Path]] = [(-chances[0][0], 1, (0,))]
    found: list[tuple[Path, float]] = []
    while heap and len(found) < nodes:
        value, _, path = heapq.heappop(heap)
        found.append((path, -value))
        level, rank = len(path) - 1, path[-1]
        if rank + 1 < len(chances[level]):
            ratio = chances[level][rank + 1] / max(chances[level][rank], 1e-12)
            heapq.heappush(heap, (value * min(ratio, 1.0), len(path), (*path[:-1], rank + 1)))
        if level + 1 < len(chances):
            heapq.heappush(heap, (value * chances[level + 1][0], len(path) + 1, (*path, 0)))
    return found


def worth(chances: Sequence[Sequence[float]], token_cost: float, level_cost: float = 0.0, most: int = WORTH) -> Shape:
    """The tree with the most tokens expected for its cost, were levels independent.

    Of every depth the likeliest nodes, as many as pay:

        (1 + sum over nodes of their chances) / (1 + token_cost nodes + level_cost levels)

    Args:
        chances: as for `likely`.
        token_cost: what each drafted token adds to the cost of a pass, in passes over one token.
        level_cost: what each level adds to it, for drafts that take a pass of their own for each. Default 0.
        most: nodes. Default 64.
    """
    best: tuple[float, Shape] | None = None
    for depth in range(1, len(chances) + 1):
        paths = _likeliest(most, chances[:depth])
        promised, cost = 1.0, 1.0 + level_cost * depth
        for count, (path, chance) in enumerate(paths, start=1):
            promised += chance
            rate = promised / (cost + token_cost * count)
            if best is None or rate > best[0]:
                best = rate, Shape(tuple(path for path, _ in paths[:count]))
    assert best is not None  # there is a level
    return best[1]


@dataclass(frozen=True, eq=False)
class Picker:
    """Takes candidates from a draft's logits: the most likely ones, or drawn ones.

    Args:
        law: from logits [..., V] to the distribution drafted from.
        drawn: whether candidates are drawn, without replacement; else they are the most likely.
        generator: what they are drawn from; None for torch's global generator.
        words: the tokens that may be guessed, of which the logits are. Default: all.
    """

    law: Callable[[Tensor], Tensor]
    drawn: bool
    generator: torch.Generator | None = None
    words: Words = field(default_factory=Words)

    def pick(self, logits_RK: Tensor, counts: Sequence[int]) -> tuple[list[list[int]], list[Tensor | None]]:
        """Candidates of each row, and what they were drawn from.

        Args:
            logits_RK: a draft's logits of the tokens that it may guess.
            counts: how many candidates each row gets at the most.
        """
        if not self.drawn:
            most = min(max(counts), logits_RK.shape[-1])
            best = self.words.tokens(logits_RK.topk(most, -1).indices).tolist()
            return [row[:count] for row, count in zip(best, counts, strict=True)], [None] * len(counts)
        laws_RV = self.law(self.words.wide(logits_RK))
        found = [
            torch.multinomial(law_V, min(count, int((law_V > 0).sum())), generator=self.generator).tolist()
            for law_V, count in zip(laws_RV, counts, strict=True)
        ]
        return found, list(laws_RV)

    def cartesian(self, root: int, logits_KV: Tensor, shape: Shape, room: int) -> TokenTree:
        """A tree whose candidates depend on the level alone, so that cousins repeat.

        Under sampling the candidates of a level are drawn once and shared by all nodes above: those that a node gets
        are independent of how it was reached, which is all that the rule of `verify.sampling` asks for.

        Args:
            root: the last token emitted.
            logits_KV: of each level, of the tokens that may be guessed.
            shape: the static tree.
            room: most levels that can be used.
        """
        levels = min(shape.depth, room, len(logits_KV))
        if levels < 1:
            return TokenTree((root,), (-1,))
        candidates, laws = self.pick(logits_KV[:levels], shape.widths[:levels])
        tree: TokenTree = shape.cut(levels).build(
            root, lambda path: candidates[len(path)], lambda path: laws[len(path)]
        )
        return tree
