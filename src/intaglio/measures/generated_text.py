"""Metrics of generated outputs: repetition within a text, diversity between texts, overlap with training data.

Outputs are sequences of items: token ids, or `words` where a tokenizer's variants of a word should count as equal.
Dimension letters: L sequence, T positions of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from itertools import permutations
from statistics import fmean
from typing import Any

import torch

from intaglio.checkpoint import Checkpoint
from intaglio.data.segments import Segments
from intaglio.errors import IntaglioError
from intaglio.modeling.anatomy import HeadOnly, anatomy, final_hidden

Items = Sequence[Hashable]
WINDOW = 96
"""Last items of a text over which its type-token ratio is taken."""
OVERLAP = 5
"""Items of an n-gram that counts as copied."""
ELEMENTS = 1 << 24
"""Limit of elements in a float32 table of logits computed at a time."""


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def ngrams(items: Items, n: int) -> list[tuple[Hashable, ...]]:
    """Return the n-grams of a sequence in order."""
    if n < 1:
        raise IntaglioError(f"n is {n}; an n-gram has at least one item")
    return [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]


def type_token_ratio(items: Items, window: int | None = WINDOW) -> float:
    """Return the share of distinct items among the last `window` (None: all); 0 of nothing."""
    last = items if window is None else items[-window:]
    return len(set(last)) / max(len(last), 1)


def repetition(items: Items, n: int = 2) -> float:
    """Return the share of a text's n-grams that occurred in it before; 0 of texts shorter than n."""
    every = ngrams(items, n)
    return 1 - len(set(every)) / len(every) if every else 0.0


def distinct_n(outputs: Sequence[Items], n: int) -> float:
    """Return the number of different n-grams of several outputs over the number of their items; 0 of nothing."""
    total = sum(map(len, outputs))
    return len({gram for items in outputs for gram in ngrams(items, n)}) / total if total else 0.0


def self_overlap(outputs: Sequence[Items], n: int = 2) -> float:
    """Return the mean over ordered pairs of outputs of the share of n-grams that the first shares with the second.

    1 for equal outputs, 0 for outputs without a common n-gram, and for fewer than two.
    """
    pairs = permutations([ngrams(items, n) for items in outputs], 2)
    shares = [fmean(gram in other for gram in own) for own, other in pairs if own]
    return fmean(shares) if shares else 0.0


def oracle_at_k(scores: Sequence[float], k: int) -> float:
    """Return the best of the first k scores of a prompt's outputs.

    Raises:
        IntaglioError: k is below 1 or above the number of scores.
    """
    if not 1 <= k <= len(scores):
        raise IntaglioError(f"k is {k}; from 1 to the number of outputs, {len(scores)}, is accepted")
    return max(scores[:k])


class NGramIndex:
    """The n-grams of a training set, for overlap measures and for blocking them.

    Args:
        sequences: training sequences.
        n: items of an n-gram, at least 2. Default 5.

    Attributes:
        continuations: for each prefix of n - 1 items, the items that complete an n-gram of the training set.
    """

    def __init__(self, sequences: Iterable[Items], n: int = OVERLAP) -> None:
        if n < 2:
            raise IntaglioError(f"n is {n}; an n-gram that counts as copied has at least 2 items")
        self.n = n
        self.continuations: dict[tuple[Hashable, ...], set[Any]] = defaultdict(set)
        self._sequences = [list(items) for items in sequences]
        for items in self._sequences:
            for gram in ngrams(items, n):
                self.continuations[gram[:-1]].add(gram[-1])

    def __contains__(self, gram: tuple[Hashable, ...]) -> bool:
        """Return whether an n-gram is in the training set."""
        return gram[-1] in self.continuations.get(gram[:-1], ())

    def overlap(self, items: Items) -> float:
        """Return the share of a text's n-grams that are in the training set; 0 of shorter texts."""
        every = ngrams(items, self.n)
        return fmean(gram in self for gram in every) if every else 0.0

    def longest_overlap(self, items: Items) -> int:
        """Return the most items in a row that a text shares with a training sequence; 0 if fewer than n."""
        longest = 0
        for start in range(len(items) - self.n + 1):
            size = max(self.n, longest + 1)
            while start + size <= len(items) and self._occurs(list(items[start : start + size])):
                longest, size = size, size + 1
        return longest

    def _occurs(self, part: list[Hashable]) -> bool:
        if any(gram not in self for gram in ngrams(part, self.n)):
            return False
        starts = ((row, i) for row in self._sequences for i, item in enumerate(row) if item == part[0])
        return any(row[i : i + len(part)] == part for row, i in starts)


@torch.no_grad()
def predictive_entropy(checkpoint: Checkpoint, data: Segments, batch_size: int = 4) -> float:
    """Return the mean entropy of the next-token distribution on held-out segments, in nats.

    H = -mean over positions of sum_v p(v) log p(v), with each segment's own tokens as context
    """
    checkpoint.check_ids(data.ids_NT)
    parts = anatomy(checkpoint.model)
    head = HeadOnly(parts, frozen=False)
    step = max(1, ELEMENTS // checkpoint.vocabulary)
    total, count = 0.0, 0
    for batch in data.batches(batch_size):
        for hidden_LD in final_hidden(parts, batch)[:, :-1]:
            for hidden_TD in hidden_LD.split(step):
                log_p_TV = head.logits(hidden_TD[None])[0].float().log_softmax(-1)
                total -= float((log_p_TV.exp() * log_p_TV).nan_to_num().sum())
                count += len(log_p_TV)
    return total / count
