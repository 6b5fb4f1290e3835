"""Posting lists: BM25 and learned-sparse retrieval, exact, over any number of segments.

Dimension letters: P postings, V terms of a segment, T query terms, N rows, K results.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from intaglio.errors import IntaglioError, did_you_mean

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NO_FLOATS, _NO_BYTES = np.empty(0, np.float32), np.empty(0, np.uint8)
KEPT_TERMS = 1 << 16
"""Most terms of earlier queries that are looked up once for a snapshot."""
_ARRAYS = ("keys", "ptr", "rows", "values", "bounds")


def check_installed() -> None:
    """Refuse, in a sentence, if the packages of BM25 and sparse search are missing."""
    for package in ("numba", "bm25s", "snowballstemmer"):
        if find_spec(package) is None:
            raise IntaglioError(f"BM25 and sparse search need {package}: pip install 'intaglio[search]'")


@lru_cache(maxsize=1 << 20)
def term_key(term: str) -> int:
    """Return a term's 64-bit key (BLAKE2b)."""
    return int.from_bytes(hashlib.blake2b(term.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class Analyzer:
    """Tokenizer of BM25: that of bm25s (lower case, words of two letters or more), stop words, a Snowball stemmer.

    Args:
        language: of the stemmer and the stop words; "none" for neither.
    """

    def __init__(self, language: str) -> None:
        check_installed()
        import bm25s
        import snowballstemmer

        if language != "none" and language not in snowballstemmer.algorithms():
            raise IntaglioError(
                f"the language {language!r} has no stemmer:"
                f" {did_you_mean(language, [*snowballstemmer.algorithms(), 'none'])}"
            )
        self._tokenize = bm25s.tokenize
        self._stemmer = None if language == "none" else snowballstemmer.stemmer(language)
        self._stem = lru_cache(maxsize=1 << 18)(self._stemmer.stemWord) if self._stemmer else None
        try:
            bm25s.tokenize(["a"], stopwords=language, show_progress=False)
            self.stopwords: str | list[str] = language
        except ValueError:
            self.stopwords = []  # bm25s has no list for this language

    def _stems(self, words: Sequence[str]) -> list[str]:
        assert self._stem is not None
        return [self._stem(word) for word in words]

    def ids(self, texts: Sequence[str]) -> tuple[list[list[int]], list[str]]:
        """Return the token ids of each text, and the terms by id."""
        result = self._tokenize(
            list(texts), stopwords=self.stopwords, stemmer=self._stems if self._stem else None, show_progress=False
        )
        return result.ids, sorted(result.vocab, key=result.vocab.__getitem__)

    def terms(self, text: str) -> list[str]:
        """Return the terms of a text in order, repeated ones included."""
        (ids,), vocabulary = self.ids([text])
        return [vocabulary[i] for i in ids]

    def spans(self, text: str, terms: set[str]) -> Iterator[tuple[int, int]]:
        """Yield where the text's words have one of these stems."""
        for match in re.finditer(r"(?u)\b\w\w+\b", text):
            word = match[0].lower()
            if (self._stem(word) if self._stem else word) in terms:
                yield match.span()


@dataclass(frozen=True)
class Postings:
    """The posting lists of a segment, in order of key and row.

    Args:
        keys: of the terms, ascending, uint64 [V].
        ptr: start of each list, int64 [V + 1].
        rows: int32 [P].
        values: term frequencies (uint16 or uint32) or weights (float32), [P].
        bounds: greatest value of each list, [V].
        lengths: tokens of each row, int32 [N]; empty for learned-sparse values.
        shortest: least length in each list, int32 [V]; empty for learned-sparse values.
    """

    keys: NDArray[np.uint64]
    ptr: NDArray[np.int64]
    rows: NDArray[np.int32]
    values: NDArray[Any]
    bounds: NDArray[Any]
    lengths: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    shortest: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    _norms: dict[tuple[float, ...], NDArray[np.float32]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_lists(
        cls, keys_V: NDArray[Any], counts_V: NDArray[Any], rows_P: NDArray[Any], values_P: NDArray[Any],
        lengths_N: NDArray[Any] | None = None,
    ) -> Postings:  # fmt: skip
        """Build from lists in order of key and row, none of them empty."""
        ptr = np.concatenate([[0], np.cumsum(counts_V)]).astype(np.int64)
        if values_P.dtype != np.float32:
            values_P = values_P.astype(np.uint16 if values_P.max(initial=0) < 1 << 16 else np.uint32)
        bounds = np.maximum.reduceat(values_P, ptr[:-1]) if len(keys_V) else values_P[:0]
        rows = rows_P.astype(np.int32)
        if lengths_N is None:
            return cls(keys_V, ptr, rows, values_P, bounds)
        lengths = lengths_N.astype(np.int32)
        shortest = np.minimum.reduceat(lengths[rows], ptr[:-1]) if len(keys_V) else lengths[:0]
        return cls(keys_V, ptr, rows, values_P, bounds, lengths, shortest)

    @classmethod
    def from_texts(cls, texts: Sequence[str], analyzer: Analyzer) -> Postings:
        """Count the terms of some texts."""
        ids, vocabulary = analyzer.ids(texts)
        keys = np.fromiter(map(term_key, vocabulary), np.uint64, len(vocabulary))
        order = np.argsort(keys)
        rank = np.empty(len(keys), np.int64)
        rank[order] = np.arange(len(keys))
        lengths = np.fromiter(map(len, ids), np.int32, len(ids))
        tokens = np.fromiter((i for row in ids for i in row), np.int64, int(lengths.sum()))
        size = max(len(ids), 1)
        codes, counts = np.unique(rank[tokens] * size + np.repeat(np.arange(len(ids)), lengths), return_counts=True)
        used, occurrences = np.unique(codes // size, return_counts=True)
        return cls.from_lists(keys[order][used], occurrences, codes % size, counts, lengths)

    @classmethod
    def from_vectors(cls, ptr_N: NDArray[Any], terms_P: NDArray[Any], weights_P: NDArray[Any]) -> Postings:
        """Invert sparse vectors in rows (CSR): ptr [N + 1], term ids and positive weights [P]."""
        rows = np.repeat(np.arange(len(ptr_N) - 1), np.diff(ptr_N))
        order = np.argsort(terms_P, kind="stable")
        keys, counts = np.unique(terms_P, return_counts=True)
        return cls.from_lists(keys.astype(np.uint64), counts, rows[order], weights_P[order].astype(np.float32))

    @classmethod
    def merge(cls, parts: Sequence[Postings], alive: Sequence[NDArray[np.bool_]]) -> Postings:
        """Concatenate the surviving rows of segments."""
        keys = np.unique(np.concatenate([part.keys for part in parts]))
        slots, kept, counts = [], [], np.zeros(len(keys), np.int64)
        for part, live in zip(parts, alive, strict=True):
            keep = live[part.rows]
            slot = np.repeat(np.searchsorted(keys, part.keys), np.diff(part.ptr))[keep]
            counts += np.bincount(slot, minlength=len(keys))
            slots.append(slot)
            kept.append(keep)
        next_K = np.concatenate([[0], np.cumsum(counts)])[:-1]
        rows = np.empty(int(counts.sum()), np.int32)
        values = np.empty(len(rows), np.result_type(*(part.values.dtype for part in parts)))
        base = 0
        for part, live, slot, keep in zip(parts, alive, slots, kept, strict=True):
            own = np.bincount(slot, minlength=len(keys))
            starts = np.concatenate([[0], np.cumsum(own)])[:-1]
            target = np.arange(len(slot)) + (next_K - starts)[slot]
            rows[target] = (base - 1 + np.cumsum(live))[part.rows[keep]]
            values[target] = part.values[keep]
            next_K = next_K + own
            base += int(live.sum())
        used = counts > 0
        lengths = [part.lengths[live] for part, live in zip(parts, alive, strict=True) if len(part.lengths)]
        return cls.from_lists(keys[used], counts[used], rows, values, np.concatenate(lengths) if lengths else None)

    def arrays(self, prefix: str) -> dict[str, NDArray[Any]]:
        """Return the arrays by name, for a segment file."""
        names = (*_ARRAYS, "lengths", "shortest") if len(self.lengths) else _ARRAYS
        return {f"{prefix}.{name}": getattr(self, name) for name in names}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], prefix: str) -> Postings:
        """Return the posting lists of a segment file."""
        names = [name for name in (*_ARRAYS, "lengths", "shortest") if f"{prefix}.{name}" in arrays]
        values: dict[str, Any] = {name: arrays[f"{prefix}.{name}"] for name in names}
        return cls(**values)

    def find(self, keys_T: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return the list of each key, or -1."""
        if not len(self.keys):
            return np.full(len(keys_T), -1)
        at = np.minimum(np.searchsorted(self.keys, keys_T), len(self.keys) - 1)
        return np.where(self.keys[at] == keys_T, at, -1)

    def norms(self, k1: float, b: float, mean: float) -> NDArray[np.float32]:
        """Return k1 (1 - b + b length / mean) of each row."""
        if (k1, b, mean) not in self._norms:
            self._norms.clear()
            self._norms[k1, b, mean] = np.asarray(BM25(k1, b).norm(self.lengths, mean), np.float32)
        return self._norms[k1, b, mean]

    def values_at(self, slot: int, rows: NDArray[Any]) -> NDArray[np.float32]:
        """Return the values of rows in a list, 0 where a row is not in it."""
        own = self.rows[self.ptr[slot] : self.ptr[slot + 1]]
        at = np.minimum(np.searchsorted(own, rows), len(own) - 1)
        return np.where(own[at] == rows, self.values[self.ptr[slot] + at], 0).astype(np.float32)


@dataclass(frozen=True)
class BM25:
    """BM25 in Lucene's variant, with statistics of the live rows at query time.

        score(q, d) = Σ_t n_t log(1 + (N - df_t + 1/2) / (df_t + 1/2)) f_td / (f_td + k1 (1 - b + b |d| / mean|d|))

    Args:
        k1: term-frequency saturation.
        b: length normalisation.
    """

    k1: float
    b: float

    def weigh(self, df: int, rows: int) -> float:
        """Return the inverse document frequency."""
        return math.log(1 + (rows - df + 0.5) / (df + 0.5))

    def norm(self, length: Any, mean: float) -> Any:
        """Return k1 (1 - b + b length / mean)."""
        return self.k1 * (1 - self.b + self.b * length / mean)


@dataclass(frozen=True)
class _Term:
    """A term's weight (inverse document frequency, or 1) and in each segment (slot or -1, start, end, bound)."""

    weight: float
    lists: list[tuple[int, int, int, float]]


class LexicalSearch:
    """Searches the posting lists of a snapshot's segments.

    Args:
        segments: posting lists, in order.
        alive: live rows of each segment, uint8 [N]; None where all are.
        sizes: rows of each segment.
        bm25: the weighting; None for learned-sparse vectors.
    """

    def __init__(
        self,
        segments: Sequence[Postings],
        alive: Sequence[NDArray[np.uint8] | None],
        sizes: Sequence[int],
        bm25: BM25 | None,
    ) -> None:
        from intaglio.kernels import postings_numba

        self._segments, self._alive, self._sizes, self._bm25 = segments, alive, sizes, bm25
        self._kernels = postings_numba
        self._terms: dict[int, _Term] = {}
        if bm25:
            live = [p.lengths if a is None else p.lengths[a != 0] for p, a in zip(segments, alive, strict=True)]
            self._rows = sum(map(len, live))
            # At least 1, so that a corpus of stop words alone is no division by zero.
            self._mean = max(sum(int(part.sum(dtype=np.int64)) for part in live), 1) / max(self._rows, 1)

    def _term(self, key: int) -> _Term:
        """Return a term's lists and weight, kept for later queries."""
        if key not in self._terms:
            if len(self._terms) >= KEPT_TERMS:
                self._terms.clear()
            self._terms[key] = self._look_up(key)
        return self._terms[key]

    def _look_up(self, key: int) -> _Term:
        lists, df = [], 0
        for part, alive in zip(self._segments, self._alive, strict=True):
            slot = int(part.find(np.array([key], np.uint64))[0])
            if slot < 0:
                lists.append((-1, 0, 0, 0.0))
                continue
            start, end, bound = int(part.ptr[slot]), int(part.ptr[slot + 1]), float(part.bounds[slot])
            if self._bm25:
                df += end - start if alive is None else int(self._kernels.count_allowed(part.rows, start, end, alive))
                bound /= bound + self._bm25.norm(float(part.shortest[slot]), self._mean)
            lists.append((slot, start, end, bound))
        return _Term(self._bm25.weigh(df, self._rows) if self._bm25 else 1.0, lists)

    def search(
        self, terms: Mapping[int, float], k: int, allowed: Sequence[NDArray[np.uint8]] | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the scores and positions (rows counted over all segments) of the best live rows with a positive score.

        Args:
            terms: count (BM25) or weight of each term in the query, by key.
            k: most rows.
            allowed: rows that pass a filter, in each segment; all of them live. Default: the live rows.
        """
        scores_K, keys_K, size, base = np.empty(k, np.float32), np.empty(k, np.int64), 0, 0
        weighed = [(count * term.weight, term.lists) for key, count in terms.items() for term in (self._term(key),)]
        for number, (part, rows) in enumerate(zip(self._segments, self._sizes, strict=True)):
            own = [(weight, *lists[number]) for weight, lists in weighed if lists[number][0] >= 0]
            if own:
                weights, _, starts, ends, bounds = zip(*own, strict=True)
                weights_T = np.array(weights, np.float32)
                norms = part.norms(self._bm25.k1, self._bm25.b, self._mean) if self._bm25 else _NO_FLOATS
                mask = self._alive[number] if allowed is None else allowed[number]
                size = self._kernels.search(
                    part.rows, part.values, norms, _NO_BYTES if mask is None else mask, np.array(starts, np.int64),
                    np.array(ends, np.int64), weights_T, weights_T * np.array(bounds, np.float32), base, rows,
                    scores_K, keys_K, size,
                )  # fmt: skip
            base += rows
        order = np.lexsort((keys_K[:size], -scores_K[:size]))
        return scores_K[:size][order], keys_K[:size][order]

    def explain(self, terms: Mapping[int, float], segment: int, row: int) -> dict[int, float]:
        """Return what each matching term adds to a row's score, by key."""
        part, result = self._segments[segment], {}
        for key, count in terms.items():
            term = self._term(key)
            slot = term.lists[segment][0]
            value = float(part.values_at(slot, np.array([row]))[0]) if slot >= 0 else 0.0
            if value:
                if self._bm25:
                    value /= value + float(part.norms(self._bm25.k1, self._bm25.b, self._mean)[row])
                result[key] = count * term.weight * value
        return result


__all__ = ["BM25", "Analyzer", "LexicalSearch", "Postings", "check_installed", "term_key"]
