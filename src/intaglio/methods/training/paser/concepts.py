"""Which samples speak of the same things in ways that do not fit: concepts as key phrases, consistency as a graph.

Concepts are the phrases of RAKE (Rose et al., Automatic Keyword Extraction from Individual Documents, 2010): what
stands between stop words and punctuation, ranked by the degree of its words over their frequency.
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
    """The phrases of a text, best first; each once.

    A word scores deg / freq, where deg counts the words of the phrases that it stands in; a phrase scores the sum.

    Args:
        text: any; case does not count.
        most: phrases at the most. Default: all.
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
    """Runs of words between stop words and anything but spaces; a run without a letter says nothing."""
    stop, end = _stop_words(), 0
    phrase: list[str] = []
    for found in [*_WORD.finditer(text), None]:
        ended = found is None or text[end : found.start()].strip(" \t") or found[0] in stop
        if ended and any(_LETTER.search(word) for word in phrase):
            yield tuple(phrase)
        if found is not None:
            phrase = [] if ended else phrase
            phrase += [] if found[0] in stop else [found[0]]
            end = found.end()


def merged(phrases: Sequence[str], vectors_ND: np.ndarray, least: float) -> dict[str, str]:
    """Which phrase stands for each: the first one before it that is as close as `least`, or else itself.

    Args:
        phrases: all different.
        vectors_ND: one of unit length for each.
        least: cosine from which two phrases are one concept.
    """
    stands: dict[str, str] = {}
    own: list[int] = []  # rows that stand for themselves
    for row, phrase in enumerate(phrases):
        cosine = vectors_ND[own] @ vectors_ND[row] if own else np.empty(0)
        near = int(cosine.argmax()) if len(cosine) else -1
        if near >= 0 and cosine[near] >= least:
            stands[phrase] = phrases[own[near]]
        else:
            stands[phrase] = phrase
            own.append(row)
    return stands


class ConsistencyGraph:
    """Concepts that were accepted, with an edge between two that stood in one accepted sample.

    A sample is consistent iff no two of its concepts are both in the graph without an edge: what is new, and what was
    seen together before, is fine. It depends on the order in which samples come, and gets stricter as it grows.
    """

    def __init__(self) -> None:
        self._beside: dict[str, set[str]] = {}

    def consistent(self, concepts: Iterable[str]) -> bool:
        """Whether a sample fits.

        Args:
            concepts: of the sample.
        """
        known = [concept for concept in dict.fromkeys(concepts) if concept in self._beside]
        return all(b in self._beside[a] for a, b in combinations(known, 2))

    def add(self, concepts: Iterable[str]) -> None:
        """Take the concepts of an accepted sample in; one concept alone adds nothing.

        Args:
            concepts: of the sample.
        """
        for a, b in combinations(dict.fromkeys(concepts), 2):
            self._beside.setdefault(a, set()).add(b)
            self._beside.setdefault(b, set()).add(a)

    def __len__(self) -> int:
        """Concepts in the graph."""
        return len(self._beside)
