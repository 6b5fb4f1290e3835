"""BM25 equals a fresh bm25s index, and sparse search the exact products, after any adds and deletes."""

from __future__ import annotations

import bm25s
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.errors import IntaglioError
from intaglio.kernels import postings_numba
from intaglio.search.lexical import BM25, Analyzer, LexicalSearch, Postings, term_key

WORDS = ["alpha", "beta", "gamma", "delta", "running", "runs", "carved", "carving", "mask", "masks"]
ANALYZER = Analyzer("english")
texts = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join), min_size=1, max_size=8)


def fresh_scores(documents: list[str], query: str) -> dict[str, float]:
    """The scores of a new bm25s index, by document (which are distinct)."""
    retriever = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
    retriever.index([ANALYZER.terms(text) for text in documents], show_progress=False)
    terms = [term for term in ANALYZER.terms(query) if term in retriever.vocab_dict]
    return dict(zip(documents, retriever.get_scores(terms).tolist(), strict=True)) if terms else {}


def named(batches: list[list[str]]) -> list[list[str]]:
    """Make the texts distinct by a word of their own."""
    return [[f"{text} own{i}x{j}" for j, text in enumerate(batch)] for i, batch in enumerate(batches)]


@settings(max_examples=60)
@given(
    batches=st.lists(texts, min_size=1, max_size=4),
    query=st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map(" ".join),
    seed=st.integers(0, 2**32 - 1),
    merged=st.booleans(),
)
def test_bm25_equals_a_fresh_index_after_adds_and_deletes(
    batches: list[list[str]], query: str, seed: int, merged: bool
) -> None:
    batches, rng = named(batches), np.random.default_rng(seed)
    parts = [Postings.from_texts(batch, ANALYZER) for batch in batches]
    alive = [rng.random(len(batch)) < 0.7 for batch in batches]
    kept = [
        text for batch, live in zip(batches, alive, strict=True) for text, keep in zip(batch, live, strict=True) if keep
    ]
    masks = [live.astype(np.uint8) for live in alive]
    rows = [text for batch in batches for text in batch]
    if merged:
        parts, masks, rows = [Postings.merge(parts, alive)], [None], kept
    lists = LexicalSearch(parts, masks, [len(part.lengths) for part in parts], BM25(1.5, 0.75))
    terms = [term_key(term) for term in ANALYZER.terms(query)]
    scores, positions = lists.search({key: float(terms.count(key)) for key in terms}, max(len(rows), 1))
    expected = {text: score for text, score in fresh_scores(kept, query).items() if score > 0} if kept else {}
    assert {rows[position] for position in positions} == set(expected)
    assert scores.tolist() == pytest.approx([expected[rows[position]] for position in positions], rel=1e-5)
    assert (np.diff(scores) <= 0).all()


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 40), parts=st.integers(1, 3), masked=st.booleans())
def test_sparse_search_returns_the_greatest_products(seed: int, k: int, parts: int, masked: bool) -> None:
    rng = np.random.default_rng(seed)
    # Weights in eighths: sums are exact in float32, so ties and ranks are too.
    matrices = [
        np.where(rng.random((int(rng.integers(1, 90)), 20)) < 0.3, rng.integers(1, 16, 20) / 8, 0) for _ in range(parts)
    ]
    query = {int(term): int(rng.integers(1, 9)) / 8 for term in rng.choice(24, 6, replace=False)}
    segments, masks = [], []
    for matrix in matrices:
        rows, terms = np.nonzero(matrix)
        ptr = np.searchsorted(rows, np.arange(len(matrix) + 1))
        segments.append(Postings.from_vectors(ptr, terms, matrix[rows, terms]))
        masks.append(rng.integers(0, 2, len(matrix)).astype(np.uint8) if masked else None)
    scores, positions = LexicalSearch(segments, masks, [len(m) for m in matrices], None).search(query, k)
    dense = np.zeros(24)
    dense[list(query)] = list(query.values())
    exact = np.concatenate(
        [m @ dense[:20] * (1 if mask is None else mask) for m, mask in zip(matrices, masks, strict=True)]
    )
    order = np.lexsort((np.arange(len(exact)), -exact))
    best = [row for row in order.tolist() if exact[row] > 0][:k]
    assert positions.tolist() == best
    assert scores.tolist() == exact[best].tolist()


def test_sparse_search_over_many_windows_skips_nothing() -> None:
    rng = np.random.default_rng(0)
    rows = 3 * postings_numba.WINDOW + 17
    terms = rng.zipf(1.3, (rows, 12)) % 300
    ptr, flat, weights = [0], [], []
    for row in terms:
        own = np.unique(row)
        flat.append(own)
        weights.append(rng.integers(1, 64, len(own)) / 16)
        ptr.append(ptr[-1] + len(own))
    flat, weights = np.concatenate(flat), np.concatenate(weights)
    lists = LexicalSearch([Postings.from_vectors(np.array(ptr), flat, weights)], [None], [rows], None)
    for _ in range(20):
        query = {int(term): int(rng.integers(1, 32)) / 16 for term in np.unique(rng.zipf(1.3, 15) % 300)}
        dense = np.zeros(300)
        dense[list(query)] = list(query.values())
        exact = np.add.reduceat(weights * dense[flat], ptr[:-1])
        scores, positions = lists.search(query, 10)
        assert positions.tolist() == np.lexsort((np.arange(rows), -exact))[:10].tolist()
        assert scores.tolist() == np.sort(exact)[::-1][:10].tolist()


def test_a_term_in_every_document_and_an_unknown_term() -> None:
    postings = Postings.from_texts(["mask one", "mask two", "mask three"], ANALYZER)
    lists = LexicalSearch([postings], [None], [3], BM25(1.5, 0.75))
    assert len(lists.search({term_key("mask"): 1.0}, 10)[0]) == 3
    assert len(lists.search({term_key("absent"): 1.0}, 10)[0]) == 0


def test_an_explanation_adds_up_to_the_score() -> None:
    postings = Postings.from_texts(["mask mask alpha", "beta mask", "alpha"], ANALYZER)
    lists = LexicalSearch([postings], [None], [3], BM25(1.5, 0.75))
    query = {term_key("mask"): 1.0, term_key("alpha"): 2.0}
    scores, positions = lists.search(query, 1)
    parts = lists.explain(query, 0, int(positions[0]))
    assert set(parts) == set(query)
    assert sum(parts.values()) == pytest.approx(scores[0], rel=1e-5)


def test_texts_of_stop_words_alone_have_no_terms() -> None:
    postings = Postings.from_texts(["the of and", ""], ANALYZER)
    lists = LexicalSearch([postings], [None], [2], BM25(1.5, 0.75))
    assert len(lists.search({term_key("the"): 1.0}, 5)[0]) == 0


def test_spans_are_of_words_with_the_same_stem() -> None:
    text = "Carved, carving and carves; a scar."
    assert [text[a:b] for a, b in ANALYZER.spans(text, {"carv"})] == ["Carved", "carving", "carves"]


def test_an_unknown_language_is_refused() -> None:
    with pytest.raises(IntaglioError, match="'englich' has no stemmer: did you mean english"):
        Analyzer("englich")
