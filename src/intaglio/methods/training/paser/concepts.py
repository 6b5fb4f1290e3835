"""Concepts as key phrases, and the graph that decides whether samples are consistent.

Concepts are the phrases of RAKE (Rose et al., Automatic Keyword Extraction from Individual Documents, 2010): the text
between stop words and punctuation, ranked by the degree of its words over their frequency.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import combinations

import numpy as np

_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_LETTER = re.compile(r"[^\W\d_]")


@lru_cache(maxsize=1)
def _stop_words() -> frozenset[str]:
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return frozenset(ENGLISH_STOP_WORDS)


def key_phrases(text: str, most: int | None = None) -> list[str]:
    """Return the distinct phrases of a text, best first.

    A word scores deg / freq, where deg counts the words of the phrases that contain it; a phrase scores the sum.
    """
    phrases = list(_phrases(text.lower()))
    frequency: Counter[str] = Counter()
    degree: Counter[str] = Counter()
    for phrase in phrases:
        frequency.update(phrase)
        for word in phrase:
            degree[word] += len(phrase)
    score = {" ".join(phrase): sum(degree[word] / frequency[word] for word in phrase) for phrase in phrases}
    return sorted(score, key=lambda phrase: (-score[phrase], phrase))[:most]


def _phrases(text: str) -> Iterable[tuple[str, ...]]:
    """Yield runs of words between stop words and punctuation that contain a letter."""
    stop, end = _stop_words(), 0
    phrase: list[str] = []
    for match in [*_WORD.finditer(text), None]:
        ended = match is None or text[end : match.start()].strip(" \t") or match[0] in stop
        if ended and any(_LETTER.search(word) for word in phrase):
            yield tuple(phrase)
        if match is not None:
            phrase = [] if ended else phrase
            phrase += [] if match[0] in stop else [match[0]]
            end = match.end()


def merge_synonyms(phrases: Sequence[str], vectors_ND: np.ndarray, least: float) -> dict[str, str]:
    """Map each phrase to the closest earlier one with a cosine of at least `least`, or to itself."""
    representative: dict[str, str] = {}
    representatives: list[int] = []  # rows of representatives
    for row, phrase in enumerate(phrases):
        cosine = vectors_ND[representatives] @ vectors_ND[row] if representatives else np.empty(0)
        near = int(cosine.argmax()) if len(cosine) else -1
        if near >= 0 and cosine[near] >= least:
            representative[phrase] = phrases[representatives[near]]
        else:
            representative[phrase] = phrase
            representatives.append(row)
    return representative


class ConsistencyGraph:
    """Accepted concepts, with an edge between two that occur in the same accepted sample.

    A sample is consistent iff no two of its concepts are both in the graph without an edge: new concepts and known
    combinations are fine. It depends on the order of samples, and gets stricter as it grows.
    """

    def __init__(self) -> None:
        self._neighbours: dict[str, set[str]] = {}

    def consistent(self, concepts: Iterable[str]) -> bool:
        """Return whether a sample fits."""
        known = [concept for concept in dict.fromkeys(concepts) if concept in self._neighbours]
        return all(b in self._neighbours[a] for a, b in combinations(known, 2))

    def add(self, concepts: Iterable[str]) -> None:
        """Add the concepts of an accepted sample; a single concept adds nothing."""
        for a, b in combinations(dict.fromkeys(concepts), 2):
            self._neighbours.setdefault(a, set()).add(b)
            self._neighbours.setdefault(b, set()).add(a)

    def __len__(self) -> int:
        """Concepts in the graph."""
        return len(self._neighbours)
