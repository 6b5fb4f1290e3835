"""The table as one run of a model sees it: the corpus's rows, and on top of them what the target said.

A key is a pair of tokens as one number, a * vocabulary + b.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate

from intaglio.methods.decoding.aded.table import Table

_CACHED = 20_000
"""Rows of the corpus held as lists at a time; beyond, all are read anew."""


class Row:
    """The successors of one pair of tokens.

    Args:
        tokens: the heaviest first, the smaller id on a tie.
        weights: of each, above 0.

    Attributes:
        scale: what a weight is divided by for its share: the sum of the row, at least 1.
    """

    __slots__ = ("_sums", "scale", "tokens", "weights")

    def __init__(self, tokens: Sequence[int], weights: Sequence[float]) -> None:
        self.tokens = tokens
        self.weights = weights
        self.scale = max(sum(weights), 1.0)
        self._sums: list[float] | None = None

    def draw(self, level: float) -> int:
        """The place of a successor drawn in proportion to the weights.

        Args:
            level: uniform in [0, 1).
        """
        sums = self._sums
        if sums is None:
            sums = self._sums = list(accumulate(self.weights))
        return bisect(sums, level * sums[-1], 0, len(sums) - 1)  # rounding can reach the end, no further

    def weight(self, token: int) -> float:
        """M[key][token], 0 where it is not known.

        Args:
            token: a successor or not.
        """
        return self.weights[self.tokens.index(token)] if token in self.tokens else 0.0


class Memory:
    """M[(a, b)] -> successors: a table that never changes, and learnt rows that hide its own.

    Args:
        table: counted in a corpus.
        top: successors of a row that are taken from the table. Learnt rows may have more.
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
        self._rows: dict[int, Row | None] = {}

    def row(self, key: int) -> Row | None:
        """The successors of a pair, or None where nothing is known.

        Args:
            key: the pair.
        """
        try:
            return self._rows[key]
        except KeyError:
            found = self._rows[key] = self._read(key)
            return found

    def _read(self, key: int) -> Row | None:
        if len(self._rows) >= _CACHED:
            self._rows.clear()
        known = self.learnt.get(key)
        if known is not None:
            pairs = sorted(known.items(), key=lambda pair: (-pair[1], pair[0]))
            return Row([token for token, _ in pairs], [weight for _, weight in pairs])
        tokens, weights = self._table.row(key, self._top)
        return Row(tokens, weights) if tokens else None

    def boost(self, key: int, token: int, by: float, cap: float) -> None:
        """M[key][token] += by, at most `cap`; row and entry are made where they are missing.

        Args:
            key: the pair.
            token: what followed it.
            by: how much.
            cap: the largest weight.
        """
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
        """Boost every tri-gram inside some tokens, as often as it stands there.

        Args:
            ids: the last tokens said.
            by: how much.
            cap: the largest weight.
        """
        for a, b, c in zip(ids, ids[1:], ids[2:], strict=False):
            self.boost(a * self.vocabulary + b, c, by, cap)
