"""Byte forms of a tokenizer's tokens, as constraints see them.

Dimension letters: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from llguidance import LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerFast

from intaglio.errors import IntaglioError, first_line, shorten

_READ: WeakKeyDictionary[Any, dict[tuple[int, int], LLTokenizer]] = WeakKeyDictionary()
"""Tokenizers already converted (a second each), by end token and vocabulary size."""


class Vocabulary:
    """The tokens that a constrained output may consist of.

    Args:
        forms: byte form of each token id; empty for ids that no text contains (special and unused ids).
        stops: ids that end an output.
        tokenizer: llguidance's tokenizer of the same ids. Default: built from `forms`.

    Attributes:
        usable_V: bool, whether a token is part of texts.
        characters_V: int64, characters that begin in a token's bytes.

    Raises:
        IntaglioError: no id ends an output.
    """

    def __init__(self, forms: Sequence[bytes], stops: Collection[int], tokenizer: LLTokenizer | None = None) -> None:
        self.forms = tuple(forms)
        self.stops = tuple(sorted(stop for stop in set(stops) if 0 <= stop < len(forms)))
        if not self.stops:
            raise IntaglioError(
                "no token ends an output; give eos_token_id to generate, or a tokenizer that has an end-of-text token"
            )
        self.usable_V = np.array([bool(form) for form in forms])
        self.usable_V[list(self.stops)] = False
        self.characters_V = np.array([sum(byte & 0xC0 != 0x80 for byte in form) for form in forms])
        self.tokenizer = tokenizer or LLTokenizer(_Wrapper(self))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.forms)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, size: int, stops: Collection[int]) -> Vocabulary:
        """Return the vocabulary of a fast tokenizer.

        Args:
            tokenizer: a fast tokenizer of transformers.
            size: ids that the model knows; those beyond the tokenizer's are unused.
            stops: ids that end an output.

        Raises:
            IntaglioError: no tokenizer, or one that llguidance cannot read.
        """
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise IntaglioError(
                f"constraints need a fast tokenizer (tokenizer.json); {type(tokenizer).__name__} was given"
            )
        stop = min(stops, default=0)
        known = _READ.setdefault(tokenizer, {})
        if (stop, size) not in known:
            try:
                known[stop, size] = from_tokenizer(tokenizer, n_vocab=max(size, len(tokenizer)), eos_token=stop)
            except Exception as error:  # llguidance raises its own classes and plain ones alike
                raise IntaglioError(
                    f"llguidance cannot read the tokenizer {shorten(str(tokenizer.name_or_path))!r}: "
                    f"{first_line(error)}"
                ) from error
        read = known[stop, size]
        forms = [b"" if read.is_special_token(id) else read.decode_bytes([id]) for id in range(size)]
        for id in range(len(tokenizer), size):
            forms[id] = b""
        return cls(forms, stops, read)

    def text(self, data: bytes) -> str | None:
        """Return the whole characters of a prefix; None if no continuation makes it valid UTF-8."""
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            cut = error.reason == "unexpected end of data"
            return data[: error.start].decode() if cut else None


class _Wrapper:
    """A vocabulary as llguidance reads it."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = vocabulary.stops[0]
        # Every id needs a form of its own; those of no text begin with a byte that UTF-8 never contains.
        self.tokens = [form or b"\xff%d" % id for id, form in enumerate(vocabulary.forms)]
        self.special_token_ids = [id for id, form in enumerate(vocabulary.forms) if not form]
        self._ids = {form: id for id, form in reversed(list(enumerate(vocabulary.forms))) if form}

    def __call__(self, text: str | bytes) -> list[int]:
        """Tokenize greedily by the longest form; bytes without a form are left out."""
        data, ids = text.encode() if isinstance(text, str) else text, []
        while data:
            size = next((n for n in range(len(data), 0, -1) if data[:n] in self._ids), 0)
            if size:
                ids.append(self._ids[data[:size]])
            data = data[size or 1 :]
        return ids
