"""Tri-gram table of a corpus: the successors of every pair of tokens, with their relative frequencies.

    M[(a, b)][c] = count(a, b, c) / (discount + sum over c' of count(a, b, c'))

With a discount of 0 this is the paper's table. In a small corpus most pairs occur once, so most weights would be 1;
with a discount of 1 the only successor of such a pair has the weight 1/2.

Dimension letters: R rows (pairs of tokens), E entries of all rows together.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from intaglio import atomic_io
from intaglio.checkpoint.attachments import decode_metadata, encode_metadata
from intaglio.errors import IntaglioError
from intaglio.speculative.drafters.ngram_counts import NGramCounts, chunks

FORMAT = "intaglio trigram table 1"
ENTRIES = 2_000_000
"""Most entries kept by default: at most 48 MB."""
_NAMES = ("keys", "starts", "tokens", "weights")


class Table:
    """An immutable sparse tri-gram table. Built by `build`, `empty` or `load`.

    Args:
        keys_R: the pairs (a, b) as the numbers a * vocabulary + b, int64, increasing.
        starts: int64 [R + 1]; the entries of row r are `starts[r]` to `starts[r + 1]`.
        tokens_E: int32, the third tokens; within a row the heaviest first, the smaller id on a tie.
        weights_E: float32, above 0.
        vocabulary: number of token ids.
        tokenizer: digest of the tokenizer that produced the ids (`tokenizer_digest`); empty if it is unknown.

    Raises:
        IntaglioError: the arrays do not fit each other.
    """

    def __init__(
        self,
        keys_R: np.ndarray,
        starts: np.ndarray,
        tokens_E: np.ndarray,
        weights_E: np.ndarray,
        vocabulary: int,
        tokenizer: str = "",
    ) -> None:
        self.keys_R, self.starts, self.tokens_E, self.weights_E = keys_R, starts, tokens_E, weights_E
        self.vocabulary = vocabulary
        self.tokenizer = tokenizer
        if not self._is_consistent():
            raise IntaglioError("the arrays of a tri-gram table do not fit each other")
        # Reading single elements of these is several times as fast as of the arrays.
        self._keys, self._starts = keys_R.data, starts.data
        self._tokens, self._weights = tokens_E.data, weights_E.data

    def _is_consistent(self) -> bool:
        arrays = (self.keys_R, self.starts, self.tokens_E, self.weights_E)
        if [array.dtype for array in arrays] != [np.int64, np.int64, np.int32, np.float32]:
            return False
        keys, starts, tokens, weights = arrays
        shapes = keys.ndim == starts.ndim == tokens.ndim == weights.ndim == 1
        if not (shapes and len(starts) == len(keys) + 1 and len(tokens) == len(weights)):
            return False
        bounds = starts[0] == 0 and starts[-1] == len(tokens) and bool((np.diff(starts) > 0).all())
        pairs = not len(keys) or (keys[0] >= 0 and keys[-1] < self.vocabulary**2 and bool((np.diff(keys) > 0).all()))
        ids = not len(tokens) or 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocabulary
        return bool(bounds and pairs and ids and np.isfinite(weights).all() and (weights > 0).all())

    @classmethod
    def empty(cls, vocabulary: int) -> Table:
        """Return a table without rows."""
        none = np.zeros(0, np.int64)
        return cls(none, np.zeros(1, np.int64), none.astype(np.int32), none.astype(np.float32), vocabulary)

    @classmethod
    def build(
        cls,
        sequences: Iterable[Sequence[int]],
        vocabulary: int,
        *,
        entries: int = ENTRIES,
        discount: float = 0.0,
        tokenizer: str = "",
    ) -> Table:
        """Count the tri-grams of tokenised texts; equal texts give equal tables.

        Args:
            sequences: token ids of each text; tri-grams never cross from one text to the next.
            vocabulary: number of token ids of the target.
            entries: most entries; if there are more, the rarest tri-grams are dropped, also while counting.
                Default 2,000,000. A row that lost some keeps the weights it had.
            discount: added to the total of every row. Default 0.
            tokenizer: digest kept with the table.

        Raises:
            IntaglioError: a token id outside the vocabulary, or no three tokens in a row.
        """
        if vocabulary**3 >= 2**63:
            raise IntaglioError(f"a vocabulary of {vocabulary} ids is too large for a tri-gram table")
        counter = NGramCounts(vocabulary, 2, 4 * entries)
        for chunk in chunks(sequences, vocabulary):
            counter.add(chunk)
        if not len(counter.pairs):
            raise IntaglioError("the corpus holds no three tokens in a row, so no tri-gram can be counted")
        keys_E, tokens_E = np.divmod(counter.pairs, vocabulary)
        counts_E = counter.counts
        _, rows_E = np.unique(keys_E, return_inverse=True)
        weights_E = counts_E / (np.bincount(rows_E, counts_E)[rows_E] + discount)
        if len(counts_E) > entries:
            kept = np.sort(np.argsort(-counts_E, kind="stable")[:entries])
            keys_E, tokens_E, weights_E = keys_E[kept], tokens_E[kept], weights_E[kept]
        order = np.lexsort((tokens_E, -weights_E, keys_E))
        keys_R, first = np.unique(keys_E, return_index=True)
        starts = np.append(first, len(keys_E)).astype(np.int64)
        return cls(
            keys_R, starts, tokens_E[order].astype(np.int32), weights_E[order].astype(np.float32), vocabulary, tokenizer
        )

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.keys_R)

    @property
    def bytes(self) -> int:
        """Memory of the arrays."""
        return sum(array.nbytes for array in (self.keys_R, self.starts, self.tokens_E, self.weights_E))

    def row(self, key: int, top: int) -> tuple[list[int], list[float]]:
        """Return tokens and weights of the `top` heaviest entries of a row; empty if there is no row.

        The key is a * vocabulary + b.
        """
        index = self.keys_R.searchsorted(key)
        if index == len(self._keys) or self._keys[index] != key:
            return [], []
        start = self._starts[index]
        stop = min(self._starts[index + 1], start + top)
        weights: list[Any] = self._weights[start:stop].tolist()
        return self._tokens[start:stop].tolist(), weights

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays of a file: `keys`, `starts`, `tokens`, `weights`."""
        return dict(zip(_NAMES, (self.keys_R, self.starts, self.tokens_E, self.weights_E), strict=True))

    def about(self) -> dict[str, Any]:
        """Return the metadata of a file."""
        return {"format": FORMAT, "vocabulary": self.vocabulary, "tokenizer": self.tokenizer}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any], name: str) -> Table:
        """Return the table of the arrays and metadata of a file; its `name` is for the error message."""
        try:
            if about["format"] != FORMAT:
                raise KeyError
            keys_R, starts, tokens_E, weights_E = (arrays[key] for key in _NAMES)
            return cls(keys_R, starts, tokens_E, weights_E, int(about["vocabulary"]), about.get("tokenizer", ""))
        except (KeyError, TypeError, ValueError):  # an IntaglioError is a ValueError
            raise IntaglioError(
                f"{name} is no tri-gram table, or a damaged one; make one with Table.build(...).save"
            ) from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table to one safetensors file, atomically."""
        atomic_io.write_bytes(path, save(self.arrays(), encode_metadata(self.about())))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Table:
        """Read a file that `save` wrote, or a checkpoint's `attachments/aded.safetensors`.

        Raises:
            IntaglioError: no such file, or no table.
        """
        if not Path(path).is_file():
            raise IntaglioError(f"there is no tri-gram table {os.fspath(path)}")
        try:
            with safe_open(path, framework="numpy") as file:
                about = decode_metadata(file.metadata())
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        except (SafetensorError, OSError) as error:
            raise IntaglioError(f"{os.fspath(path)} is no tri-gram table: {error}") from error
        return cls.from_arrays(arrays, about, os.fspath(path))
