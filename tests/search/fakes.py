"""Encoders without a model, for tests of the index."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from intaglio.search.encoders import SparseVectors


class BagOfWords:
    """Encode words by hash, dense or sparse."""

    max_tokens = 50

    def __init__(self, kind: str = "dense", name: str = "bag", dimensions: int = 32) -> None:
        self.kind, self.name, self.dimensions = kind, name, dimensions
        self.encoded: list[str] = []

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    @property
    def fingerprint(self) -> str:
        return f"{self.name}-{self.kind}-{self.dimensions}"

    def count_tokens(self, texts: Sequence[str], query: bool = False) -> list[int]:
        return [len(text.split()) for text in texts]

    def encode_queries(self, texts: Sequence[str]) -> Any:
        counts = np.zeros((len(texts), self.dimensions), np.float32)
        for row, text in zip(counts, texts, strict=True):
            for word in text.lower().split():
                row[zlib.crc32(word.encode()) % self.dimensions] += 1
        if self.kind == "dense":
            return counts / np.linalg.norm(counts, axis=1, keepdims=True)
        rows, terms = np.nonzero(counts)
        return SparseVectors(np.searchsorted(rows, np.arange(len(texts) + 1)), terms, counts[rows, terms])

    def encode_documents(self, texts: Sequence[str]) -> Any:
        self.encoded += texts
        return self.encode_queries(texts)

    def term(self, term: int) -> str:
        return f"t{term}"
