"""Embeddings of instructions, by a sentence encoder or by TF-IDF.

Dimension letters: N texts, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from intaglio.checkpoint import load
from intaglio.measures.embeddings import embed_texts
from intaglio.methods.base import Progress, no_progress

TFIDF = "tfidf"
"""Name of the vectors that need no encoder."""
MAX_TOKENS = 256
"""Tokens of a text that an encoder reads, as in the training of all-MiniLM-L6-v2."""
COMPONENTS = 100
"""Dimensions of reduced TF-IDF vectors."""


def embed(texts: Sequence[str], how: str, *, batch_size: int = 32, progress: Progress = no_progress) -> np.ndarray:
    """Return unit-length vectors of the texts, float64 [N, D]."""
    unique = list(dict.fromkeys(texts))
    vectors_ND = _tfidf(unique) if how == TFIDF else _encode(unique, how, batch_size, progress)
    length_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    vectors_ND = vectors_ND / np.where(length_N1 > 0, length_N1, 1)
    row_of = {text: row for row, text in enumerate(unique)}
    return vectors_ND[[row_of[text] for text in texts]]


def _tfidf(texts: Sequence[str]) -> np.ndarray:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    try:
        words_NV = vectorizer.fit_transform(texts)
    except ValueError:  # no text has a word
        return np.zeros((len(texts), 1))
    max_length = min(words_NV.shape) - 1
    if max_length < 2 or words_NV.shape[1] <= COMPONENTS:
        return np.asarray(words_NV.toarray())
    svd = TruncatedSVD(min(COMPONENTS, max_length), algorithm="arpack", random_state=0)
    return np.asarray(svd.fit_transform(words_NV))


def _encode(texts: Sequence[str], name: str, batch_size: int, progress: Progress) -> np.ndarray:
    encoder = load(name)
    vectors_ND = embed_texts(
        encoder, texts, max_length=MAX_TOKENS, batch_size=batch_size, progress=progress, label="paser: embedding"
    )
    return vectors_ND.double().numpy()
