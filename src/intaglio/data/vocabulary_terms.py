"""Tokens of a vocabulary as terms: their texts, those that are words, and those that begin a word.

Dimension letters: V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DAMAGED = "\ufffd"
"""Stands for bytes that are no text of their own."""
CONTINUES, BEGINS = "##", ("\u0120", "\u2581")
"""Signs of WordPiece (a token continues a word), and of byte-level BPE and SentencePiece (a token begins a word)."""

_UNUSED = re.compile(r"[\[<]unused_?\d+[\]>]")


def token_texts(tokenizer: Any, vocabulary: int) -> list[str]:
    """Return the text of every token id; "" for ids that the tokenizer does not know."""
    known = min(vocabulary, len(tokenizer))
    texts: list[str] = tokenizer.batch_decode([[token] for token in range(known)], clean_up_tokenization_spaces=False)
    return texts + [""] * (vocabulary - known)


def usable_terms(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Return which tokens may be terms, bool [V]: not special or unused, and with text other than white space."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return torch.tensor(
        [
            bool(text.strip()) and token not in special and _UNUSED.fullmatch(text) is None
            for token, text in enumerate(texts)
        ]
    )


def word_beginnings(tokenizer: Any, vocabulary: int) -> Tensor:
    """Return which tokens begin a word, bool [V]; without signs of any kind, all do."""
    known = min(vocabulary, len(tokenizer))
    tokens = [str(token or "") for token in tokenizer.convert_ids_to_tokens(list(range(known)))]
    if any(token.startswith(CONTINUES) and token != CONTINUES for token in tokens):
        begins = [not (token.startswith(CONTINUES) and token != CONTINUES) for token in tokens]
    elif any(token.startswith(BEGINS) for token in tokens):
        begins = [token.startswith(BEGINS) for token in tokens]
    else:
        begins = [True] * known
    return torch.tensor(begins + [False] * (vocabulary - known))
