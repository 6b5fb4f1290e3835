"""How a tree grows: by the slots that are most likely to be reached (Xiong et al., DySpec, algorithms 1 and 2).

A slot is a place for one more child of a node; its value v is the estimated probability that verification gets there:
the path down to the node was accepted and the children that stand before it were rejected. Filling it with a token y
leaves two new slots,

    v_child = v a                (y was accepted: the first child of y)
    v_sibling = v (1 - a)        (y was rejected: the next child of the node),        a ~ R[y],

where R is the draft's law at the node without the tokens that the earlier children took.

Whether a slot is filled is decided by its value, never by its token: that is what keeps the law of sampled output.
Where children are not drawn but the likeliest, the tokens are known beforehand, so a slot is worth the probability that
its token is reached and right: v a.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from intaglio.methods.decoding.dyspec.residual import Residual
from intaglio.speculative.drafters.dynamic_tree import Growing, Growth


@dataclass(order=True)
class Slot:
    """A place for a child; the smallest is the most valuable, on a tie the oldest.

    Args:
        priority: minus what the slot is worth.
        age: of ties.
        node: whose child it is for.
        value: v.
    """

    priority: float
    age: int
    node: int = field(compare=False)
    value: float = field(compare=False)


@dataclass
class Grower:
    """Grows the tree of one row in one step.

    Args:
        nodes: most drafted nodes.
        depth: the deepest level.
        drawn: whether children are drawn; otherwise the likeliest are taken.
        generator: of the draws.
        chance: a: from the draft's probability R[y] to the estimated chance of acceptance.

    Attributes:
        slots: of each node, the slot that it fills; None for the root.
        shares: of each node, its probability R[y]; 1 for the root.
    """

    nodes: int
    depth: int
    drawn: bool
    generator: torch.Generator | None
    chance: Callable[[float], float] = float
    slots: list[Slot | None] = field(default_factory=lambda: [None])
    shares: list[float] = field(default_factory=lambda: [1.0])
    _left: dict[int, Residual] = field(default_factory=dict)
    _age: count[int] = field(default_factory=count)

    def heap(self, tree: Growing) -> Growth:
        """Algorithm 1: the `nodes` most valuable slots of all.

        The paper takes one after the other from a heap, with a draft pass for each. No slot is worth more than the one
        that it came from, so the same slots are found level by level, in as many draft passes as the tree is deep: at
        each level those are filled that are worth more than the `nodes`-th best so far. What then falls out of the best
        is left out of the tree, as the heap would never have come to it.

        Args:
            tree: the root alone.
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

    def threshold(self, tree: Growing, least: float) -> Growth:
        """Algorithm 2: level by level, every slot that is worth at least `least`, the most valuable first.

        Args:
            tree: the root alone.
            least: the threshold.
        """
        level = [(0, 1.0)]
        while level and tree.depths[level[0][0]] < self.depth and len(tree) <= self.nodes:
            slots = yield from self._read(tree, level)
            level = []
            # Where the cap stops a level, it does so between slots, before a token is known.
            while slots and -slots[0].priority >= least and len(tree) <= self.nodes:
                level.append(self._fill(tree, heapq.heappop(slots), slots))
            level = [(node, value) for node, value in level if value >= least]

    def _read(self, tree: Growing, level: Iterable[tuple[int, float]]) -> Growth:
        """Ask for the laws at some nodes of these values; returns a heap of their first slots."""
        values = dict(level)
        laws_NV: Tensor = yield list(values)
        slots: list[Slot] = []
        for (node, value), law_V in zip(values.items(), laws_NV, strict=True):
            self._left[node] = Residual(law_V, self.drawn, self.generator)
            self._push(slots, node, value, self.slots[node])
        return slots

    def _push(self, slots: list[Slot], node: int, value: float, source: Slot | None) -> None:
        """Add the next slot of a node, unless nothing is left there; `source` is the slot that it comes from."""
        if value <= 0:
            return
        worth = value
        if not self.drawn:
            found = self._left[node].peek()
            if found is None:
                return
            worth *= self.chance(found[1])
        elif self._left[node].empty:
            return
        # With an estimate that was learnt, a later sibling could seem better than the one it has to come after.
        priority = -worth if source is None else max(-worth, source.priority)
        heapq.heappush(slots, Slot(priority, next(self._age), node, value))

    def _fill(self, tree: Growing, slot: Slot, slots: list[Slot]) -> tuple[int, float]:
        """Put a token into a slot and add its sibling's; returns the node and its value."""
        left = self._left[slot.node]
        token, share = left.take()
        if self.drawn:
            tree.q[slot.node] = left.law_V
        node = tree.add(slot.node, token)
        self.slots.append(slot)
        self.shares.append(share)
        chance = self.chance(share)
        self._push(slots, slot.node, slot.value * (1.0 - chance), slot)
        return node, slot.value * chance
