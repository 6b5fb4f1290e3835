"""Choice of the continuations to draft: the tree search over the table, and the searches it is compared with.

A path is the tokens after the root, the nearest first. Every search returns paths without repetition, the best first.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from intaglio.methods.decoding.aded.adaptive_table import AdaptiveTable, Successors
from intaglio.speculative.tree import TokenTree

Path = tuple[int, ...]


def exploration(visits: int, c1: float, c2: float) -> float:
    """Return the weight of a prior at a node with N visits: (c1 + ln((N + c2 + 1) / c2)) sqrt(N)."""
    return (c1 + math.log((visits + c2 + 1) / c2)) * math.sqrt(visits)


def puct(reward: float, visits: int, prior: float, parent_visits: int, c1: float = 32.0, c2: float = 8.0) -> float:
    """Return the selection value S/n + (c1 + ln((N + c2 + 1)/c2)) p sqrt(N) / (1 + n), infinite at n = 0.

    Args:
        reward: S, the sum of the child's rewards.
        visits: n, of the child.
        prior: p, its weight in the table.
        parent_visits: N.
        c1: weight of the prior.
        c2: visits after which that weight begins to grow.
    """
    if visits == 0:
        return math.inf
    return reward / visits + exploration(parent_visits, c1, c2) * prior / (1 + visits)


@dataclass
class SearchTree:
    """The tree of one search, as columns. Node 0 is the root; the children of node n are `first[n]` to `end[n]`.

    Attributes:
        keys: pair of tokens of each node.
        parents: -1 for the root.
        priors: weight of the node's token in its parent's row.
        visits: n.
        rewards: S.
        first: first child; 0: none.
        end: index after the last child.
    """

    keys: list[int]
    parents: list[int] = field(default_factory=lambda: [-1])
    priors: list[float] = field(default_factory=lambda: [0.0])
    visits: list[int] = field(default_factory=lambda: [0])
    rewards: list[float] = field(default_factory=lambda: [0.0])
    first: list[int] = field(default_factory=lambda: [0])
    end: list[int] = field(default_factory=lambda: [0])

    def expand(self, node: int, row: Successors, vocabulary: int) -> None:
        """Add a child for each successor of a node."""
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
        """Return the tokens from the root, which is left out, to a node."""
        path = []
        while node:
            path.append(self.keys[node] % vocabulary)
            node = self.parents[node]
        return tuple(reversed(path))


def mcts(
    table: AdaptiveTable,
    root: int,
    *,
    iterations: int,
    length: int,
    c1: float,
    c2: float,
    reward: Literal["path", "official"],
    rng: Random,
) -> SearchTree:
    """Run Monte Carlo tree search: descend by PUCT, expand, roll out, give the reward to the whole path.

    Args:
        table: the table.
        root: key to start from.
        iterations: number of descents; the root has as many visits afterwards.
        length: most keys of a path, the root's included.
        c1: weight of the prior.
        c2: visits after which it begins to grow.
        reward: `path`, 1 + the weights of the path's tokens in the rows before them; or `official`, as in the released
            code, 1 + the weights of the tokens that the rows' own pairs end in, which is nearly always 1.
        rng: source of the roll-outs.
    """
    vocabulary, row_of, last = table.vocabulary, table.row, length - 1
    tree = SearchTree([root])
    keys, parents, priors = tree.keys, tree.parents, tree.priors
    visits, rewards, first, end = tree.visits, tree.rewards, tree.first, tree.end
    # Children are first chosen in their order, but the last one is visited as soon as it exists.
    unvisited: dict[int, int] = {}
    factors = [exploration(count, c1, c2) for count in range(iterations)]

    official = reward == "official"

    def official_weight(key: int) -> float:
        """Return M[(a, b)][b], which the released code adds instead of the weight."""
        row = row_of(key)
        return 0.0 if row is None else row.weight(key % vocabulary)

    for _ in range(iterations):
        node, level, value = 0, 0, 1.0
        while level < last and first[node]:
            chosen = unvisited[node]
            if chosen < end[node] - 1:
                unvisited[node] = chosen + 1
            else:
                factor, most = factors[visits[node]], -1.0
                for child in range(first[node], end[node]):
                    count = visits[child]
                    score = rewards[child] / count + factor * priors[child] / (1 + count)
                    if score > most:
                        most, chosen = score, child
            value += official_weight(keys[node]) if official else priors[chosen]
            node, level = chosen, level + 1
        row = row_of(keys[node]) if level < last else None
        key = keys[node]
        if row is not None:
            tree.expand(node, row, vocabulary)
            unvisited[node] = first[node]
            value += official_weight(key) if official else row.weights[-1]
            node, level = len(keys) - 1, level + 1
            key = keys[node]
            while level < last and (row := row_of(key)) is not None:
                index = row.draw(rng.random())
                value += official_weight(key) if official else row.weights[index]
                key = key % vocabulary * vocabulary + row.tokens[index]
                level += 1
        while node >= 0:
            visits[node] += 1
            rewards[node] += value
            node = parents[node]
    return tree


def most_visited(table: AdaptiveTable, tree: SearchTree, candidates: int) -> list[Path]:
    """Return the paths to the most visited nodes, each with its most likely next token if there is one.

    The root is one of the `candidates`; on a tie the older node comes first.
    """
    paths: dict[Path, None] = {}
    for node in heapq.nlargest(candidates, range(len(tree.keys)), key=tree.visits.__getitem__):
        row = table.row(tree.keys[node])
        path = tree.path(node, table.vocabulary)
        paths[path if row is None else (*path, row.tokens[0])] = None
    paths.pop((), None)
    return list(paths)


def greedy(table: AdaptiveTable, root: int, length: int) -> list[Path]:
    """Return one chain of at most `length` tokens, each the heaviest successor."""
    chain: list[int] = []
    while len(chain) < length and (row := table.row(root)) is not None:
        chain.append(row.tokens[0])
        root = root % table.vocabulary * table.vocabulary + row.tokens[0]
    return [tuple(chain)] if chain else []


def full(table: AdaptiveTable, root: int, length: int, nodes: int) -> list[Path]:
    """Return the first `nodes` paths of a full traversal, level by level, the heaviest successors first."""

    def traverse() -> Iterator[Path]:
        level: list[tuple[int, Path]] = [(root, ())]
        while level and len(level[0][1]) < length:
            below = []
            for key, path in level:
                row, base = table.row(key), key % table.vocabulary * table.vocabulary
                for token in () if row is None else row.tokens:
                    below.append((base + token, (*path, token)))
                    yield below[-1][1]
            level = below

    return list(itertools.islice(traverse(), nodes))


def best_first(table: AdaptiveTable, root: int, length: int, nodes: int) -> list[Path]:
    """Return the `nodes` paths with the largest probabilities (`path_probs`), the largest first."""
    paths: list[Path] = []
    order = itertools.count()
    heap: list[tuple[float, int, int, Path]] = [(-1.0, next(order), root, ())]
    while heap and len(paths) < nodes:
        value, _, key, path = heapq.heappop(heap)
        if path:
            paths.append(path)
        if len(path) == length or (row := table.row(key)) is None:
            continue
        scale, base = value / row.scale, key % table.vocabulary * table.vocabulary
        for token, weight in zip(row.tokens, row.weights, strict=True):
            heapq.heappush(heap, (scale * weight, next(order), base + token, (*path, token)))
    return paths


def path_probs(table: AdaptiveTable, root: int, tree: TokenTree) -> list[float]:
    """Return the table's probability of each node of a draft that starts at the key `root`; 1 for the root.

    A probability is a weight over the sum of its row, or the weight itself if the sum is below 1: so a row of few
    learnt entries is trusted no more than it was learnt.
    """
    keys, probs = [root], [1.0]
    for node in range(1, len(tree)):
        parent, token = tree.parents[node], tree.tokens[node]
        row = table.row(keys[parent])
        probs.append(0.0 if row is None else probs[parent] * row.weight(token) / row.scale)
        keys.append(keys[parent] % table.vocabulary * table.vocabulary + token)
    return probs


def trim(paths: Sequence[Path], choices: int) -> list[Path]:
    """Drop paths with many distinct tokens until their numbers of distinct tokens sum to at most `choices`.

    Among equally many distinct tokens the last path goes first. The rest is returned in the order in which it is
    merged, the shortest first.
    """
    sizes = [len(set(path)) for path in paths]
    total = sum(sizes)
    dropped: set[int] = set()
    for index in sorted(range(len(paths)), key=lambda index: (-sizes[index], -index)):
        if total <= choices:
            break
        dropped.add(index)
        total -= sizes[index]
    return sorted((path for index, path in enumerate(paths) if index not in dropped), key=len)
