"""Count n-grams in tokenised texts with bounded memory, for the n-gram store and the tri-gram table.

Dimension letters: C contexts, T most likely successors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from intaglio.errors import IntaglioError

_CHUNK = 1 << 20


class NGramCounts:
    """Counts of (context, next token) pairs.

    Args:
        vocabulary: token ids are below this.
        context: tokens of a context.
        most: pairs kept when a chunk is merged in.
    """

    def __init__(self, vocabulary: int, context: int, most: int) -> None:
        self._vocabulary = vocabulary
        self._context = context
        self._most = most
        self.pairs = np.zeros(0, dtype=np.int64)
        self.counts = np.zeros(0, dtype=np.int64)

    def add(self, sequences: Sequence[np.ndarray]) -> None:
        """Count every window of int64 token ids; the rarest pairs are dropped if there are too many."""
        all_pairs, weights = [self.pairs], [self.counts]
        for ids in sequences:
            windows = len(ids) - self._context
            if windows < 1:
                continue
            pairs = np.zeros(windows, dtype=np.int64)
            for offset in range(self._context + 1):
                pairs = pairs * self._vocabulary + ids[offset : offset + windows]
            all_pairs.append(pairs)
            weights.append(np.ones(windows, dtype=np.int64))
        self.pairs, inverse = np.unique(np.concatenate(all_pairs), return_inverse=True)
        self.counts = np.bincount(inverse, np.concatenate(weights), len(self.pairs)).astype(np.int64)
        if len(self.pairs) > self._most:
            kept = np.sort(np.argsort(-self.counts, kind="stable")[: self._most])
            self.pairs, self.counts = self.pairs[kept], self.counts[kept]

    def table(self, contexts: int, top: int) -> dict[str, np.ndarray]:
        """Return the `contexts` most frequent contexts with their `top` successors, as `NGramStore` keeps them."""
        keys, tokens = np.divmod(self.pairs, self._vocabulary)
        names, first = np.unique(keys, return_index=True)
        totals = np.add.reduceat(self.counts, first) if len(first) else np.zeros(0, dtype=np.int64)
        # Within a context: the most frequent first, the smaller id on a tie.
        order = np.lexsort((tokens, -self.counts, keys))
        sizes = np.diff(np.append(first, len(keys)))
        rank = np.arange(len(keys)) - np.repeat(first, sizes)
        kept = np.sort(np.argsort(-totals, kind="stable")[:contexts])
        index = np.full(len(names), -1)
        index[kept] = np.arange(len(kept))
        row = np.repeat(index, sizes)
        chosen = (rank < top) & (row >= 0)
        following = np.full((len(kept), top), -1, dtype=np.int32)
        counts = np.zeros((len(kept), top), dtype=np.int32)
        following[row[chosen], rank[chosen]] = tokens[order][chosen]
        counts[row[chosen], rank[chosen]] = np.minimum(self.counts[order][chosen], np.iinfo(np.int32).max)
        return {"keys": names[kept], "totals": totals[kept], "following": following, "counts": counts}


def chunks(sequences: Iterable[Sequence[int]], vocabulary: int) -> Iterable[list[np.ndarray]]:
    """Yield token ids as arrays, about a million tokens at a time.

    Raises:
        IntaglioError: a token id outside the vocabulary.
    """
    chunk: list[np.ndarray] = []
    held = 0
    for sequence in sequences:
        ids = np.asarray(sequence, dtype=np.int64)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            raise IntaglioError(
                f"the corpus holds the token id {wrong}; the vocabulary has the ids 0 to {vocabulary - 1}, so it was "
                "made with another tokenizer"
            )
        chunk.append(ids)
        held += len(ids)
        if held >= _CHUNK:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk
