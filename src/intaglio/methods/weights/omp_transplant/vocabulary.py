"""Token contents of a tokenizer, and the matching of two vocabularies.

A byte-level vocabulary spells bytes by letters of its own ("G with a dot" for a space), a SentencePiece vocabulary
writes U+2581 for a space and `<0xE2>` for a byte, WordPiece marks continuations. Compared by these spellings most
shared tokens would be missed, so tokens are compared by the bytes that they decode to, special tokens by their role.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from intaglio.checkpoint.from_scratch import byte_letters

Scheme = Literal["letters", "metaspace", "wordpiece", "plain"]
"""Spelling of text: bytes as letters, spaces as U+2581, word parts marked by `##`, or plain."""
Join = Literal["bytes", "strings"]
Kind = Literal["text", "byte", "special"]

WORD_START = {"letters": "\u0120", "metaspace": "\u2581", "wordpiece": "\u0120", "plain": "\u0120"}
"""Prefix of tokens that start a word; unknown schemes are treated as byte-level."""
ROLES = ("eos", "bos", "pad", "unk", "mask", "cls", "sep")
"""In order of priority: a token that both begins and ends texts is matched as EOS, which must be generated."""
FALLBACK_ROLES = {"cls": "bos", "bos": "cls", "sep": "eos", "eos": "sep"}
"""Fallback where a tokenizer lacks a role: encoders put CLS and SEP around a text."""
PROBE = " ".join(map(str, (*range(10, 2000, 7), 65536, 1_000_000, 31_415_926_535)))
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BYTE_OF_LETTER = {letter: byte for byte, letter in enumerate(byte_letters())}


@dataclass(frozen=True)
class Token:
    """An entry of a vocabulary: its row, spelling, decoded bytes (the name of a special token), and kind.

    A `byte` token is a byte of a SentencePiece vocabulary.
    """

    id: int
    text: str
    content: bytes
    kind: Kind


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of a tokenizer by ascending id (with gaps), special-token ids by role, and the spelling scheme."""

    tokens: Mapping[int, Token]
    roles: Mapping[str, int]
    scheme: Scheme
    tokenizer: Any

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> Vocabulary:
        """Read a tokenizer of transformers."""
        vocab = tokenizer.get_vocab()
        scheme = _detect_scheme(tokenizer, vocab)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {int(i) for i in tokenizer.all_special_ids} | {int(i) for i, token in added.items() if token.special}
        tokens = {}
        for text, i in sorted(vocab.items(), key=lambda item: item[1]):
            if i in special:
                tokens[i] = Token(i, text, text.encode("utf-8", "replace"), "special")
            elif i in added:
                tokens[i] = Token(i, text, text.encode("utf-8", "replace"), "text")
            else:
                tokens[i] = Token(i, text, *_decode_token(text, scheme))
        ids: dict[str, Any] = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ROLES}
        return cls(tokens, {role: int(i) for role, i in ids.items() if i in tokens}, scheme, tokenizer)

    @property
    def rows(self) -> int:
        """Return the rows that an embedding needs, ids without a token included."""
        return max(len(self.tokens), max(self.tokens, default=-1) + 1)

    @cached_property
    def _by_content(self) -> dict[bytes, list[Token]]:
        tokens = defaultdict(list)
        for token in self.tokens.values():
            if token.kind != "special" and token.content:
                tokens[token.content].append(token)
        return tokens

    @cached_property
    def _by_string(self) -> dict[tuple[str, str], int]:
        return {_string_key(token.text, self.scheme): token.id for token in self.tokens.values()}

    @cached_property
    def _by_text(self) -> dict[str, Token]:
        return {token.text: token for token in self.tokens.values()}

    def find(self, token: Token, other: Vocabulary, join: Join) -> int | None:
        """Return the id of the same token in this vocabulary, or None."""
        if token.kind == "special":
            return self._find_special(token, other)
        if join == "strings":
            token_id = self._by_string.get(_string_key(token.text, other.scheme))
            return None if token_id is None or self.tokens[token_id].kind == "special" else token_id
        candidates = self._by_content.get(token.content, [])
        # The same spelling first, so that a vocabulary joined with itself is the identity; then a token of the same
        # kind, then text: a byte token whose character also has a token of its own never occurs in text.
        best = min(
            candidates, key=lambda t: (t.text != token.text, t.kind != token.kind, t.kind != "text"), default=None
        )
        return None if best is None else best.id

    def _find_special(self, token: Token, other: Vocabulary) -> int | None:
        roles = [role for role in ROLES if other.roles.get(role) == token.id]
        for role in roles:
            if role in self.roles:
                return self.roles[role]
        for role in roles:
            if FALLBACK_ROLES.get(role) in self.roles:
                return self.roles[FALLBACK_ROLES[role]]
        match = self._by_text.get(token.text)
        return None if match is None else match.id

    def byte(self, token: Token, other: Vocabulary) -> int | None:
        """Return the id of the byte token for a one-byte character, or vice versa; None where there is none.

        Only needed for the match by strings: by bytes both are the same.
        """
        if token.kind == "byte":
            key = _string_key(chr(token.content[0]), self.scheme)
        elif token.kind == "text" and len(token.text) == 1 and ord(token.text) < 256:
            key = ("", f"<0x{ord(token.text):02X}>")
        else:
            return None
        return self._by_string.get(key)

    def prefix(self, token: Token, other: Vocabulary, join: Join) -> int | None:
        """Return the id of the longest proper prefix of a token that is a token here and not white space, or None."""
        if token.kind != "text":
            return None
        for prefix in _prefixes(token, other.scheme, join):
            token_id = self.find(prefix, other, join)
            if token_id is not None:
                return token_id
        return None

    def pieces(self, token: Token) -> list[int]:
        """Return the ids by which this vocabulary encodes a token of another, without special tokens; possibly none.

        Incomplete characters are encoded too, where the vocabulary can.
        """
        content = token.content
        model = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "model", None)
        if model is not None and self.scheme == "letters":
            letters = byte_letters()
            return [piece.id for piece in model.tokenize("".join(letters[byte] for byte in content))]
        try:
            text = content.decode()
        except UnicodeDecodeError:
            byte_tokens = [self._by_content.get(bytes([byte]), []) for byte in content]
            return [tokens[0].id for tokens in byte_tokens] if all(byte_tokens) else []
        if model is not None and self.scheme == "metaspace":
            return [piece.id for piece in model.tokenize(text.replace(" ", "\u2581"))]
        return [int(i) for i in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    @cached_property
    def digits(self) -> int:
        """Return the most digits of one token when numbers are encoded; 0 where none has any."""
        ids = self.tokenizer(PROBE, add_special_tokens=False, verbose=False)["input_ids"]
        contents = (self.tokens[i].content for i in ids if i in self.tokens and self.tokens[i].kind != "special")
        return max((sum(48 <= byte <= 57 for byte in content) for content in contents), default=0)


def _detect_scheme(tokenizer: Any, vocab: Mapping[str, int]) -> Scheme:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        kinds = {str(node.get("type")) for part in ("decoder", "pre_tokenizer") for node in _nodes(backend, part)}
        if "ByteLevel" in kinds:
            return "letters"
        if "WordPiece" in kinds:
            return "wordpiece"
        if kinds & {"Metaspace", "ByteFallback"}:
            return "metaspace"
    letters, metaspace = (sum(text.startswith(mark) for text in vocab) for mark in ("\u0120", "\u2581"))
    if letters or metaspace:
        return "letters" if letters >= metaspace else "metaspace"
    return "wordpiece" if any(text.startswith("##") for text in vocab) else "plain"


def _nodes(backend: Any, part: str) -> Iterator[Mapping[str, Any]]:
    """Yield a component of a tokenizer and its nested components."""
    own = getattr(backend, part)
    waiting = [] if own is None else [json.loads(own.__getstate__())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
        waiting += [v for v in (node.values() if isinstance(node, dict) else node) if isinstance(v, (dict, list))]


def _decode_token(text: str, scheme: Scheme) -> tuple[bytes, Kind]:
    if scheme == "letters" and all(letter in _BYTE_OF_LETTER for letter in text):
        return bytes(_BYTE_OF_LETTER[letter] for letter in text), "text"
    if scheme == "metaspace":
        lone = _BYTE.fullmatch(text)
        return (bytes([int(lone[1], 16)]), "byte") if lone else (text.replace("\u2581", " ").encode(), "text")
    if scheme == "wordpiece":
        if text.startswith("##") and len(text) > 2:
            return text[2:].encode(), "text"
        # Punctuation is a token of its own anywhere; anything else starts a word.
        return (f" {text}" if text[:1].isalnum() else text).encode(), "text"
    return text.encode("utf-8", "replace"), "text"


def _string_key(text: str, scheme: Scheme) -> tuple[str, str]:
    mark = WORD_START[scheme]
    return ("start", text[len(mark) :]) if text.startswith(mark) else ("", text)


def _prefixes(token: Token, scheme: Scheme, join: Join) -> Iterator[Token]:
    """Yield the proper prefixes of a token, longest first."""
    if join == "strings":
        mark = WORD_START[scheme]
        start = len(mark) if token.text.startswith(mark) else 0
        for end in range(len(token.text) - 1, start, -1):
            if token.text[start:end].strip():
                yield Token(token.id, token.text[:end], b"", "text")
        return
    for end in range(len(token.content) - 1, 0, -1):
        part = token.content[:end]
        if part.strip() and token.content[end] & 0xC0 != 0x80:  # do not split a character
            yield Token(token.id, "", part, "text")


@dataclass(frozen=True)
class SharedVocabulary:
    """Matching of a donor's tokens to a base's: `{donor id: base id}`, special tokens included."""

    base: Vocabulary
    donor: Vocabulary
    ids: Mapping[int, int]

    @property
    def overlap(self) -> float:
        """Return the share of shared tokens in the smaller vocabulary."""
        smaller = min(len(self.base.tokens), len(self.donor.tokens))
        return len(self.ids) / smaller if smaller else 0.0


def match_tokens(base: Vocabulary, donor: Vocabulary, by: Join = "bytes") -> SharedVocabulary:
    """Find the donor's tokens in the base's vocabulary.

    Args:
        base: vocabulary whose rows will be taken.
        donor: vocabulary whose ids they will have.
        by: `bytes` (default): tokens are equal if they decode to the same bytes; `strings`: if they are spelt the same,
            apart from the word-start mark, as in the released tool.
    """
    ids = {token.id: base.find(token, donor, by) for token in donor.tokens.values()}
    return SharedVocabulary(base, donor, {i: j for i, j in ids.items() if j is not None})
