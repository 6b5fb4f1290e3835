"""Tree growth by the slots that are most likely to be reached (Xiong et al., DySpec, algorithms 1 and 2).

A slot is a position for a child of a node; its value v is the estimated probability that verification reaches it: the
path down to the node was accepted and the earlier children were rejected. Filling it with a token y leaves two new
slots,

    v_child = v a                (y was accepted: the first child of y)
    v_sibling = v (1 - a)        (y was rejected: the next child of the node),        a ~ R[y],

where R is the draft's distribution at the node without the tokens of the earlier children.

Whether a slot is filled depends on its value, never on its token: that keeps the distribution of sampled output. If
children are the most likely tokens instead of draws, the tokens are known beforehand, so a slot is worth the
probability that its token is reached and right: v a.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from intaglio.methods.decoding.dyspec.residual import Residual
from intaglio.speculative.drafters.dynamic_tree import Growth, PartialTree


@dataclass(order=True)
class Slot:
    """A position for a child; the smallest is the most valuable, on a tie the oldest.

    Args:
        priority: minus the worth of the slot.
        age: breaks ties.
        node: the parent.
        value: v.
    """

    priority: float
    age: int
    node: int = field(compare=False)
    value: float = field(compare=False)


@dataclass
class TreeGrower:
    """Grows the tree of one row in one step.

    Args:
        nodes: most drafted nodes.
        depth: the deepest level.
        drawn: whether children are drawn; otherwise they are the most likely tokens.
        generator: source of the draws.
        acceptance: a: from the draft's probability R[y] to the estimated acceptance probability.

    Attributes:
        slots: of each node, the slot that it fills; None for the root.
        shares: of each node, its probability R[y]; 1 for the root.
    """

    nodes: int
    depth: int
    drawn: bool
    generator: torch.Generator | None
    acceptance: Callable[[float], float] = float
    slots: list[Slot | None] = field(default_factory=lambda: [None])
    shares: list[float] = field(default_factory=lambda: [1.0])
    _residuals: dict[int, Residual] = field(default_factory=dict)
    _age: count[int] = field(default_factory=count)

    def heap(self, tree: PartialTree) -> Growth:
        """Grow the `nodes` most valuable slots (algorithm 1).

        The paper takes one after the other from a heap, with a draft pass for each. No slot is worth more than the one
        that it came from, so the same slots are found level by level, in as many draft passes as the tree is deep: at
        each level those are filled that are worth more than the `nodes`-th best so far. Slots that later drop out of
        the best are left out of the tree, as the heap would never have reached them.
        """
        best: list[tuple[float, int]] = []  # (worth, minus age) of the best slots filled, the worst of them first

        def among_the_best(priority: float, age: int) -> bool:
            return len(best) < self.nodes or (-priority, -age) > best[0]

        level = [(0, 1.0)]
        while level and tree.depths[level[0][0]] < self.depth:
            slots = yield from self._read(tree, level)
            level = []
            while slots and among_the_best(slots[0].priority, slots[0].age):
                slot = heapq.heappop(slots)
                level.append(self._fill(tree, slot, slots))
                entry = (-slot.priority, -slot.age)
                if len(best) < self.nodes:
                    heapq.heappush(best, entry)
                else:
                    heapq.heapreplace(best, entry)
            # A node's slots are worth no more than its value, and younger than all.
            level = [(node, value) for node, value in level if value > 0 and among_the_best(-value, 1 << 62)]
        filled = sorted((slot, node) for node, slot in enumerate(self.slots) if slot is not None)
        tree.kept = [0, *(node for _, node in filled[: self.nodes])]

    def threshold(self, tree: PartialTree, least: float) -> Growth:
        """Grow level by level every slot that is worth at least `least`, the most valuable first (algorithm 2)."""
        level = [(0, 1.0)]
        while level and tree.depths[level[0][0]] < self.depth and len(tree) <= self.nodes:
            slots = yield from self._read(tree, level)
            level = []
            # If the cap stops a level, it does so between slots, before a token is known.
            while slots and -slots[0].priority >= least and len(tree) <= self.nodes:
                level.append(self._fill(tree, heapq.heappop(slots), slots))
            level = [(node, value) for node, value in level if value >= least]

    def _read(self, tree: PartialTree, level: Iterable[tuple[int, float]]) -> Growth:
        """Read the distributions at some nodes of these values; return a heap of their first slots."""
        values = dict(level)
        probs_NV: Tensor = yield list(values)
        slots: list[Slot] = []
        for (node, value), probs_V in zip(values.items(), probs_NV, strict=True):
            self._residuals[node] = Residual(probs_V, self.drawn, self.generator)
            self._push(slots, node, value, self.slots[node])
        return slots

    def _push(self, slots: list[Slot], node: int, value: float, source: Slot | None) -> None:
        """Add the next slot of a node, unless no token is left; `source` is the slot that it comes from."""
        if value <= 0:
            return
        worth = value
        if not self.drawn:
            following = self._residuals[node].peek()
            if following is None:
                return
            worth *= self.acceptance(following[1])
        elif self._residuals[node].empty:
            return
        # With a learnt estimate, a later sibling could seem better than the one it has to come after.
        priority = -worth if source is None else max(-worth, source.priority)
        heapq.heappush(slots, Slot(priority, next(self._age), node, value))

    def _fill(self, tree: PartialTree, slot: Slot, slots: list[Slot]) -> tuple[int, float]:
        """Put a token into a slot and add its sibling's; return the node and its value."""
        residual = self._residuals[slot.node]
        token, share = residual.take()
        if self.drawn:
            tree.q[slot.node] = residual.probs_V
        node = tree.add(slot.node, token)
        self.slots.append(slot)
        self.shares.append(share)
        accepted = self.acceptance(share)
        self._push(slots, slot.node, slot.value * (1.0 - accepted), slot)
        return node, slot.value * accepted
