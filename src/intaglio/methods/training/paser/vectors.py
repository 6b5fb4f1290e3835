"""What instructions are about, as vectors: of a sentence encoder, or of the words that they use.

Dimension letters: N texts, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from intaglio.checkpoint import load
from intaglio.errors import IntaglioError
from intaglio.measures.embeddings import pool
from intaglio.methods.base import Progress, no_progress
from intaglio.modeling.anatomy import anatomy, final_hidden

WORDS = "tfidf"
"""The vectors that need no encoder."""
TOKENS = 256
"""Of a text that an encoder reads, as all-MiniLM-L6-v2 was trained."""
COMPONENTS = 100
"""Dimensions that word counts are cut to."""


def vectors(texts: Sequence[str], how: str, *, batch_size: int = 32, progress: Progress = no_progress) -> np.ndarray:
    """One vector of unit length a text, float64 [N, D].

    Args:
        texts: what is embedded; equal ones are embedded once.
        how: `tfidf` (TF-IDF of the words, cut to 100 dimensions by a singular value decomposition), or an encoder: a
            bundled name, a directory or a hub id, whose last hidden state is averaged over tokens.
        batch_size: texts that pass through the encoder at a time. Default 32.
        progress: called after each batch.

    Raises:
        IntaglioError: there is no such encoder, or it has no tokenizer.
    """
    different = list(dict.fromkeys(texts))
    found_ND = _of_words(different) if how == WORDS else _encoded(different, how, batch_size, progress)
    length_N1 = np.linalg.norm(found_ND, axis=1, keepdims=True)
    found_ND = found_ND / np.where(length_N1 > 0, length_N1, 1)
    place = {text: row for row, text in enumerate(different)}
    return found_ND[[place[text] for text in texts]]


def _of_words(texts: Sequence[str]) -> np.ndarray:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    counted = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    try:
        words_NV = counted.fit_transform(texts)
    except ValueError:  # no text has a word
        return np.zeros((len(texts), 1))
    most = min(words_NV.shape) - 1
    if most < 2 or words_NV.shape[1] <= COMPONENTS:
        return np.asarray(words_NV.toarray())
    cut = TruncatedSVD(min(COMPONENTS, most), algorithm="arpack", random_state=0)
    return np.asarray(cut.fit_transform(words_NV))


@torch.no_grad()
def _encoded(texts: Sequence[str], name: str, batch_size: int, progress: Progress) -> np.ndarray:
    encoder = load(name)
    if encoder.tokenizer is None:
        raise IntaglioError(f"the encoder {name!r} has no tokenizer, so it reads no text")
    parts, tokenizer = anatomy(encoder.model.eval()), encoder.tokenizer
    most = min(TOKENS, encoder.context)
    ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=most, verbose=False)["input_ids"]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    order = sorted(range(len(texts)), key=lambda row: len(ids[row]))  # little padding
    found: dict[int, Any] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [ids[row] for row in rows]}, padding_side="right", return_tensors="pt")
        mask = batch["attention_mask"]
        hidden_BLD = final_hidden(parts, {"input_ids": batch["input_ids"], "attention_mask": mask})
        pooled_BD = pool(hidden_BLD, mask.bool().to(hidden_BLD.device)).double().cpu().numpy()
        found.update(zip(rows, pooled_BD, strict=True))
        progress(min(start + batch_size, len(order)), len(order), "paser: embedding")
    return np.stack([found[row] for row in range(len(texts))])
