"""Adaptive tri-gram table of one run: the corpus's rows, overlaid by what the target generated.

A key is a pair of tokens as one number, a * vocabulary + b.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate

from intaglio.methods.decoding.aded.trigram_table import Table

_CACHED = 20_000
"""Most rows of the corpus held as lists; beyond, all are read again."""


class Successors:
    """The successors of one pair of tokens.

    Args:
        tokens: the heaviest first, the smaller id on a tie.
        weights: of each, above 0.

    Attributes:
        scale: divisor that turns a weight into a probability: the sum of the row, at least 1.
    """

    __slots__ = ("_sums", "scale", "tokens", "weights")

    def __init__(self, tokens: Sequence[int], weights: Sequence[float]) -> None:
        self.tokens = tokens
        self.weights = weights
        self.scale = max(sum(weights), 1.0)
        self._sums: list[float] | None = None

    def draw(self, level: float) -> int:
        """Return the index of a successor drawn in proportion to the weights by a uniform number in [0, 1)."""
        sums = self._sums
        if sums is None:
            sums = self._sums = list(accumulate(self.weights))
        return bisect(sums, level * sums[-1], 0, len(sums) - 1)  # rounding can reach the end, no further

    def weight(self, token: int) -> float:
        """Return M[key][token], 0 if it is unknown."""
        return self.weights[self.tokens.index(token)] if token in self.tokens else 0.0


class AdaptiveTable:
    """M[(a, b)] -> successors: a table that never changes, and learnt rows that hide its own.

    Args:
        table: counted in a corpus.
        top: successors of a row taken from the table. Learnt rows may have more.
        learnt: rows changed by `boost`, key -> {token: weight}. Default None: none yet.
        most: learnt rows kept, the newest. Default None: all.
    """

    def __init__(
        self, table: Table, top: int, learnt: dict[int, dict[int, float]] | None = None, most: int | None = None
    ) -> None:
        self.vocabulary = table.vocabulary
        self.learnt: dict[int, dict[int, float]] = {} if learnt is None else learnt
        self._table = table
        self._top = top
        self._most = most
        self._rows: dict[int, Successors | None] = {}

    def row(self, key: int) -> Successors | None:
        """Return the successors of a pair, or None if it is unknown."""
        try:
            return self._rows[key]
        except KeyError:
            row = self._rows[key] = self._read(key)
            return row

    def _read(self, key: int) -> Successors | None:
        if len(self._rows) >= _CACHED:
            self._rows.clear()
        learnt = self.learnt.get(key)
        if learnt is not None:
            pairs = sorted(learnt.items(), key=lambda pair: (-pair[1], pair[0]))
            return Successors([token for token, _ in pairs], [weight for _, weight in pairs])
        tokens, weights = self._table.row(key, self._top)
        return Successors(tokens, weights) if tokens else None

    def boost(self, key: int, token: int, by: float, cap: float) -> None:
        """Add `by` to M[key][token], up to `cap`; missing rows and entries are created."""
        row = self.learnt.get(key)
        if row is None:
            row = self.learnt[key] = dict(zip(*self._table.row(key, self._top), strict=True))
            if self._most is not None and len(self.learnt) > self._most:
                oldest = next(iter(self.learnt))
                del self.learnt[oldest]
                self._rows.pop(oldest, None)
        row[token] = min(row.get(token, 0.0) + by, cap)
        self._rows.pop(key, None)

    def adapt(self, ids: Sequence[int], by: float, cap: float) -> None:
        """Boost every tri-gram of some tokens, once for each occurrence."""
        for a, b, c in zip(ids, ids[1:], ids[2:], strict=False):
            self.boost(a * self.vocabulary + b, c, by, cap)
