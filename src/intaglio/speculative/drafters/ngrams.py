"""N-grams counted in a corpus, as a drafter and as a draft distribution.

Dimension letters: C contexts, T most likely successors.
"""

from __future__ import annotations

import heapq
import itertools
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from intaglio import atomic_io
from intaglio.errors import IntaglioError
from intaglio.speculative._utils import check_count, vocabulary_size
from intaglio.speculative.drafters.ngram_counts import NGramCounts, chunks
from intaglio.speculative.pass_cost import FIXED, DraftPruner, PassCosts
from intaglio.speculative.protocols import DecodingRun, Session, Step, by_row
from intaglio.speculative.tree import TokenTree

_FORMAT = "intaglio n-gram store 1"
_BACK_OFF = 0.4
"""Weight of a successor seen after one token less of context: stupid backoff (Brants et al., EMNLP 2007)."""


class NGramStore:
    """Drafts from n-grams of a corpus, the longest known context first.

    The tree is grown best first: the value of a node is the product of the relative frequencies along its path, 0.4
    for each token of context that had to be dropped. The store never changes, so equal contexts give equal trees. Where
    passes were measured (`speculative.pass_cost`), only the part that is expected to be worth its cost is verified.

    Built by `build` or `load`.

    Args:
        tables: for each context length, from 1, the arrays `keys` int64 [C] (contexts as numbers in base `vocabulary`,
            increasing), `totals` int64 [C], `following` int32 [C, T] (-1: none), `counts` int32 [C, T].
        vocabulary: number of token ids.
        nodes: most drafted nodes of a tree. Default 15, so that a pass reads 16 tokens.
        length: depth of the tree at the most. Default 8.

    Raises:
        IntaglioError: a setting below 1.
    """

    needs_hidden = False

    def __init__(
        self, tables: Sequence[dict[str, np.ndarray]], vocabulary: int, nodes: int = 15, length: int = 8
    ) -> None:
        check_count("nodes", nodes)
        check_count("length", length)
        self.tables = list(tables)
        self.vocabulary = vocabulary
        self.nodes = nodes
        self.length = length

    @classmethod
    def build(
        cls,
        sequences: Iterable[Sequence[int]],
        vocabulary: int,
        *,
        order: int = 3,
        contexts: int = 500_000,
        top: int = 8,
        nodes: int = 15,
        length: int = 8,
    ) -> NGramStore:
        """Count the n-grams of tokenised texts.

        Memory is bounded by about `8 * contexts` pairs while counting (the rarest are dropped when there are more, so
        counts of a very long corpus are lower bounds) and by `contexts * (top + 2)` numbers for each context length
        afterwards.

        Args:
            sequences: token ids of each text; n-grams never cross from one text to the next.
            vocabulary: number of token ids of the target.
            order: tokens of the longest n-gram, the successor included. Default 3.
            contexts: contexts kept of each length, the most frequent. Default 500,000.
            top: successors kept of each. Default 8.
            nodes: as the constructor.
            length: as the constructor.

        Raises:
            IntaglioError: a setting that is too small, an order whose n-grams do not fit 63 bits, a token id outside
                the vocabulary, or no n-gram at all.
        """
        for name, value, least in (("order", order, 2), ("contexts", contexts, 1), ("top", top, 1)):
            check_count(name, value, least)
        if vocabulary**order >= 2**63:
            raise IntaglioError(
                f"order is {order}; with a vocabulary of {vocabulary} at most {_largest(vocabulary)} fits"
            )
        counters = [NGramCounts(vocabulary, n, 8 * contexts) for n in range(1, order)]
        for chunk in chunks(sequences, vocabulary):
            for counter in counters:
                counter.add(chunk)
        if not len(counters[0].pairs):
            raise IntaglioError("the corpus holds no two tokens in a row, so no n-gram can be counted")
        return cls([counter.table(contexts, top) for counter in counters], vocabulary, nodes, length)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the store to one safetensors file, atomically."""
        tensors = {f"{n}.{name}": array for n, table in enumerate(self.tables, 1) for name, array in table.items()}
        # One entry: several would be written in another order each time.
        atomic_io.write_bytes(path, save(tensors, {_FORMAT: f"{self.vocabulary} {len(self.tables) + 1}"}))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, nodes: int = 15, length: int = 8) -> NGramStore:
        """Read a file that `save` wrote; `nodes` and `length` as in the constructor.

        Raises:
            IntaglioError: no such file, or one that is no n-gram store.
        """
        path = Path(path)
        if not path.is_file():
            raise IntaglioError(f"there is no n-gram store {path}")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        except SafetensorError as error:
            raise IntaglioError(f"{path} is no n-gram store: {error}") from error
        names = ("keys", "totals", "following", "counts")
        try:
            vocabulary, order = map(int, metadata[_FORMAT].split())
            tables = [{name: arrays[f"{n}.{name}"] for name in names} for n in range(1, order)]
        except (KeyError, ValueError):
            tables = []
        if not tables or not all(map(_is_consistent, tables)):
            raise IntaglioError(f"{path} is no n-gram store; make one with NGramStore.build(...).save")
        return cls(tables, vocabulary, nodes, length)

    def following(self, context: Sequence[int]) -> list[tuple[int, float]]:
        """Return the likely next tokens with their values, the most likely first, by the longest known context."""
        weight = 1.0
        for n in range(min(len(self.tables), len(context)), 0, -1):
            table, key = self.tables[n - 1], 0
            for token in context[-n:]:
                key = key * self.vocabulary + token
            row = int(np.searchsorted(table["keys"], key))
            if row < len(table["keys"]) and table["keys"][row] == key:
                scale = weight / float(table["totals"][row])
                pairs = zip(table["following"][row].tolist(), table["counts"][row].tolist(), strict=True)
                return [(token, scale * count) for token, count in pairs if token >= 0]
            weight *= _BACK_OFF
        return []

    @cached_property
    def _frequencies(self) -> np.ndarray:
        """Unigram frequencies of the tokens that have a successor, float64 [V]."""
        counts = np.zeros(self.vocabulary)
        counts[self.tables[0]["keys"]] = self.tables[0]["totals"]
        return counts / counts.sum()

    def probs(self, context: Sequence[int]) -> np.ndarray:
        """Return the next token's distribution, float64 [V], interpolated over every known context.

        p_0 is the unigram frequency, and with N the count of the last n tokens and T the number of their successors
        (both of those that were kept)

            p_n(t) = (count(t) + T p_{n-1}(t)) / (N + T)

        (Witten and Bell, The Zero-Frequency Problem, 1991, method C).
        """
        probs_V: np.ndarray = self._frequencies.copy()
        key, scale = 0, 1
        for n, table in enumerate(self.tables[: len(context)], 1):
            key, scale = key + context[-n] * scale, scale * self.vocabulary
            row = int(np.searchsorted(table["keys"], key))
            if row < len(table["keys"]) and table["keys"][row] == key:
                known = table["following"][row] >= 0
                tokens, counts = table["following"][row][known], table["counts"][row][known]
                total = counts.sum() + len(tokens)
                probs_V *= len(tokens) / total
                probs_V[tokens] += counts / total
        return probs_V

    def check(self, model: Any) -> None:
        """Raise an `IntaglioError` if the target has another vocabulary."""
        size = vocabulary_size(model)
        if size != self.vocabulary:
            raise IntaglioError(
                f"the n-gram store was counted over {self.vocabulary} token ids; the target has {size}, so it was "
                "made with another tokenizer"
            )

    def start(self, run: DecodingRun) -> Session:
        """Start a run; see `Drafter.start`."""
        self.check(run.model)
        costs = run.costs()
        return by_row(run, lambda prompt: _Tail(self, prompt, costs))


class _Tail:
    """Last tokens of one row, as many as a context needs."""

    def __init__(self, store: NGramStore, prompt: Sequence[int], costs: PassCosts = FIXED) -> None:
        self._store, self._costs, self._pruner = store, costs, DraftPruner()
        self._most = len(store.tables)
        self._ids = list(prompt[-self._most :])

    def observe(self, step: Step) -> None:
        self._ids = [*self._ids, *step.tokens][-self._most :]
        self._pruner.observe(step.drafted)

    def propose(self, room: int) -> TokenTree:
        store = self._store
        most = min(store.length, room)
        tokens, parents, depths, contexts, values = [self._ids[-1]], [-1], [0], [self._ids], [1.0]
        # (minus the value, age, token, parent): the age breaks ties, so equal contexts give equal trees.
        heap: list[tuple[float, int, int, int]] = []
        age = itertools.count()

        def open_node(node: int, value: float) -> None:
            if depths[node] < most:
                for token, share in store.following(contexts[node]):
                    heapq.heappush(heap, (-value * share, next(age), token, node))

        open_node(0, 1.0)
        while heap and len(tokens) <= store.nodes:
            value, _, token, parent = heapq.heappop(heap)
            tokens.append(token)
            parents.append(parent)
            depths.append(depths[parent] + 1)
            values.append(-value)
            contexts.append([*contexts[parent], token][-self._most :])
            open_node(len(tokens) - 1, -value)
        tree = TokenTree(tokens, parents)
        if not self._costs.measured:
            return tree
        return self._pruner.prune(tree, values, lambda k: self._costs.cost(1 + k))


def _largest(vocabulary: int) -> int:
    """Return the longest n-gram whose number fits 63 bits."""
    return max(n for n in range(1, 64) if vocabulary**n < 2**63)


def _is_consistent(table: dict[str, np.ndarray]) -> bool:
    contexts = len(table["keys"])
    return (
        table["totals"].shape == (contexts,)
        and table["following"].ndim == 2
        and table["following"].shape == table["counts"].shape
        and len(table["following"]) == contexts
    )
