"""Which continuations to draft: the tree search over the table, and what it is held against.

A path is the tokens behind the root, the nearest first. Every search returns paths without repetition, the best first.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from intaglio.methods.decoding.aded.memory import Memory, Row
from intaglio.speculative.tree import TokenTree

Path = tuple[int, ...]


def exploration(visits: int, c1: float, c2: float) -> float:
    """How much a prior counts at a node: (c1 + ln((N + c2 + 1) / c2)) sqrt(N).

    Args:
        visits: N, of the node whose child is chosen.
        c1: weight of the prior.
        c2: visits after which it begins to grow.
    """
    return (c1 + math.log((visits + c2 + 1) / c2)) * math.sqrt(visits)


def puct(reward: float, visits: int, prior: float, parent_visits: int, c1: float = 32.0, c2: float = 8.0) -> float:
    """The value that selection maximises: S/n + (c1 + ln((N + c2 + 1)/c2)) p sqrt(N) / (1 + n), infinite at n = 0.

    Args:
        reward: S, the sum of the child's rewards.
        visits: n, of the child.
        prior: p, its weight in the table.
        parent_visits: N.
        c1: as `exploration`.
        c2: as `exploration`.
    """
    if visits == 0:
        return math.inf
    return reward / visits + exploration(parent_visits, c1, c2) * prior / (1 + visits)


@dataclass
class Searched:
    """The tree of one search, as columns. Node 0 is the root; the children of a node are `first[n]` to `end[n]`.

    Attributes:
        keys: the pair of tokens of each node.
        parents: -1 for the root.
        priors: weight of the node's token in its parent's row.
        visits: n.
        rewards: S.
        first: first child; 0: none.
        end: behind the last child.
    """

    keys: list[int]
    parents: list[int] = field(default_factory=lambda: [-1])
    priors: list[float] = field(default_factory=lambda: [0.0])
    visits: list[int] = field(default_factory=lambda: [0])
    rewards: list[float] = field(default_factory=lambda: [0.0])
    first: list[int] = field(default_factory=lambda: [0])
    end: list[int] = field(default_factory=lambda: [0])

    def grow(self, node: int, row: Row, vocabulary: int) -> None:
        """Make a child for each successor.

        Args:
            node: the parent.
            row: its successors.
            vocabulary: number of token ids.
        """
        count, base = len(row.tokens), self.keys[node] % vocabulary * vocabulary
        self.first[node] = len(self.keys)
        self.keys += [base + token for token in row.tokens]
        self.priors += row.weights
        self.parents += [node] * count
        for column in (self.visits, self.first, self.end):
            column += [0] * count
        self.rewards += [0.0] * count
        self.end[node] = len(self.keys)

    def path(self, node: int, vocabulary: int) -> Path:
        """The tokens from the root, which is left out, to a node.

        Args:
            node: which.
            vocabulary: number of token ids.
        """
        found = []
        while node:
            found.append(self.keys[node] % vocabulary)
            node = self.parents[node]
        return tuple(reversed(found))


def mcts(
    memory: Memory,
    root: int,
    *,
    iterations: int,
    length: int,
    c1: float,
    c2: float,
    reward: Literal["path", "official"],
    rng: Random,
) -> Searched:
    """Monte Carlo tree search: descend by PUCT, expand, roll out, give the reward to the whole path.

    Args:
        memory: the table.
        root: the key to start from.
        iterations: how often; the root has as many visits afterwards.
        length: keys of a path at the most, the root's included.
        c1: weight of the prior.
        c2: visits after which it begins to grow.
        reward: `path`, 1 + the weights of the path's tokens in the rows before them; or `official`, as in the released
            code, 1 + the weights of the tokens that the rows' own pairs end in, which is nearly always 1.
        rng: of the roll-outs.
    """
    vocabulary, row_of, last = memory.vocabulary, memory.row, length - 1
    tree = Searched([root])
    keys, parents, priors = tree.keys, tree.parents, tree.priors
    visits, rewards, first, end = tree.visits, tree.rewards, tree.first, tree.end
    # Children are first chosen in their order, but the last one is visited as soon as it is made.
    fresh: dict[int, int] = {}
    factors = [exploration(count, c1, c2) for count in range(iterations)]

    official = reward == "official"

    def slip(key: int) -> float:
        """What the released code adds in place of the weight: M[(a, b)][b]."""
        row = row_of(key)
        return 0.0 if row is None else row.weight(key % vocabulary)

    for _ in range(iterations):
        node, level, value = 0, 0, 1.0
        while level < last and first[node]:
            chosen = fresh[node]
            if chosen < end[node] - 1:
                fresh[node] = chosen + 1
            else:
                factor, most = factors[visits[node]], -1.0
                for child in range(first[node], end[node]):
                    count = visits[child]
                    score = rewards[child] / count + factor * priors[child] / (1 + count)
                    if score > most:
                        most, chosen = score, child
            value += slip(keys[node]) if official else priors[chosen]
            node, level = chosen, level + 1
        row = row_of(keys[node]) if level < last else None
        key = keys[node]
        if row is not None:
            tree.grow(node, row, vocabulary)
            fresh[node] = first[node]
            value += slip(key) if official else row.weights[-1]
            node, level = len(keys) - 1, level + 1
            key = keys[node]
            while level < last and (row := row_of(key)) is not None:
                place = row.draw(rng.random())
                value += slip(key) if official else row.weights[place]
                key = key % vocabulary * vocabulary + row.tokens[place]
                level += 1
        while node >= 0:
            visits[node] += 1
            rewards[node] += value
            node = parents[node]
    return tree


def most_visited(memory: Memory, tree: Searched, candidates: int) -> list[Path]:
    """The paths to the most visited nodes, each with its most likely next token where there is one.

    Args:
        memory: the table.
        tree: from `mcts`.
        candidates: nodes taken, the root included; on a tie the one made first.
    """
    found: dict[Path, None] = {}
    for node in heapq.nlargest(candidates, range(len(tree.keys)), key=tree.visits.__getitem__):
        row = memory.row(tree.keys[node])
        path = tree.path(node, memory.vocabulary)
        found[path if row is None else (*path, row.tokens[0])] = None
    found.pop((), None)
    return list(found)


def greedy(memory: Memory, root: int, length: int) -> list[Path]:
    """One chain of `length` tokens at the most, each the heaviest successor.

    Args:
        memory: the table.
        root: the key to start from.
        length: tokens.
    """
    found: list[int] = []
    while len(found) < length and (row := memory.row(root)) is not None:
        found.append(row.tokens[0])
        root = root % memory.vocabulary * memory.vocabulary + row.tokens[0]
    return [tuple(found)] if found else []


def full(memory: Memory, root: int, length: int, nodes: int) -> list[Path]:
    """Full traversal: every path that the table has, level by level, the heaviest successors first.

    Args:
        memory: the table.
        root: the key to start from.
        length: tokens of a path at the most.
        nodes: paths at the most.
    """

    def walk() -> Iterator[Path]:
        level: list[tuple[int, Path]] = [(root, ())]
        while level and len(level[0][1]) < length:
            below = []
            for key, path in level:
                row, base = memory.row(key), key % memory.vocabulary * memory.vocabulary
                for token in () if row is None else row.tokens:
                    below.append((base + token, (*path, token)))
                    yield below[-1][1]
            level = below

    return list(itertools.islice(walk(), nodes))


def best_first(memory: Memory, root: int, length: int, nodes: int) -> list[Path]:
    """The paths with the largest products of shares (`shares`), the largest first.

    Args:
        memory: the table.
        root: the key to start from.
        length: tokens of a path at the most.
        nodes: paths at the most.
    """
    found: list[Path] = []
    order = itertools.count()
    heap: list[tuple[float, int, int, Path]] = [(-1.0, next(order), root, ())]
    while heap and len(found) < nodes:
        value, _, key, path = heapq.heappop(heap)
        if path:
            found.append(path)
        if len(path) == length or (row := memory.row(key)) is None:
            continue
        scale, base = value / row.scale, key % memory.vocabulary * memory.vocabulary
        for token, weight in zip(row.tokens, row.weights, strict=True):
            heapq.heappush(heap, (scale * weight, next(order), base + token, (*path, token)))
    return found


def shares(memory: Memory, root: int, tree: TokenTree) -> list[float]:
    """How likely the table holds each node of a draft: the product of the shares on its path; 1 for the root.

    A share is a weight over the sum of its row, or the weight itself where the sum is below 1: so a row of few learnt
    entries is trusted no more than it was learnt.

    Args:
        memory: the table.
        root: the key that the draft starts from.
        tree: the draft.
    """
    keys, found = [root], [1.0]
    for node in range(1, len(tree)):
        parent, token = tree.parents[node], tree.tokens[node]
        row = memory.row(keys[parent])
        found.append(0.0 if row is None else found[parent] * row.weight(token) / row.scale)
        keys.append(keys[parent] % memory.vocabulary * memory.vocabulary + token)
    return found


def worthwhile(
    tree: TokenTree, shares: Sequence[float], draft_cost: float, token_cost: float, trust: float = 1.0
) -> TokenTree:
    """The part of a draft that promises the most tokens for what its pass costs, or the root alone.

    A pass over the k likeliest nodes is expected to give 1 + trust times the sum of their shares, and costs
    1 + draft_cost + token_cost k passes over one token.

    Args:
        tree: the draft, chosen without chance.
        shares: how likely each node is, none more than its parent.
        draft_cost: what any draft adds to the cost of a pass.
        token_cost: what each of its tokens adds.
        trust: how many tokens were accepted for each that shares promised. Default 1.
    """
    order = sorted(range(1, len(tree)), key=lambda node: (-shares[node], node))
    tokens, best, count = 1.0, 1.0, 0
    for k, node in enumerate(order, 1):
        tokens += trust * shares[node]
        if tokens > best * (1 + draft_cost + token_cost * k):
            best, count = tokens / (1 + draft_cost + token_cost * k), k
    kept = [0, *sorted(order[:count])]
    place = {node: index for index, node in enumerate(kept)}
    return TokenTree([tree.tokens[node] for node in kept], [place.get(tree.parents[node], -1) for node in kept])


def trim(paths: Sequence[Path], choices: int) -> list[Path]:
    """What is left when paths with many distinct tokens go until their numbers of distinct tokens sum to `choices`.

    The shortest come first then: that is the order in which they are merged.

    Args:
        paths: the best first; among equally many distinct tokens the last goes first.
        choices: the sum at the most.
    """
    sizes = [len(set(path)) for path in paths]
    total = sum(sizes)
    gone: set[int] = set()
    for place in sorted(range(len(paths)), key=lambda place: (-sizes[place], -place)):
        if total <= choices:
            break
        gone.add(place)
        total -= sizes[place]
    return sorted((path for place, path in enumerate(paths) if place not in gone), key=len)
