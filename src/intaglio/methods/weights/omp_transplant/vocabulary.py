"""Vocabularies of two tokenizers made comparable: what each token stands for, and which tokens both have.

A byte-level vocabulary spells bytes by letters of its own ("G with a dot" for a space), one of the SentencePiece kind
writes text with U+2581 for a space and `<0xE2>` for a lone byte, WordPiece marks what goes on a word. Compared by
these spellings most shared tokens would be missed, so tokens are compared by the bytes that they decode to. Special
tokens are compared by their role.
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
"""How a vocabulary spells text: bytes by letters, spaces by U+2581, word parts by `##`, or as it is."""
Join = Literal["bytes", "strings"]
Kind = Literal["text", "byte", "special"]

WORD_START = {"letters": "\u0120", "metaspace": "\u2581", "wordpiece": "\u0120", "plain": "\u0120"}
"""What a token at the beginning of a word begins with; unknown kinds are taken for byte-level ones."""
ROLES = ("eos", "bos", "pad", "unk", "mask", "cls", "sep")
"""In this order, so that a token which both begins and ends texts is matched with the one that ends them: it has to be
said, too."""
ALIKE = {"cls": "bos", "bos": "cls", "sep": "eos", "eos": "sep"}
"""Roles that stand in for one another where a tokenizer lacks the first: encoders put CLS and SEP round a text."""
PROBE = " ".join(map(str, (*range(10, 2000, 7), 65536, 1_000_000, 31_415_926_535)))
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LETTERS = {letter: byte for byte, letter in enumerate(byte_letters())}


@dataclass(frozen=True)
class Token:
    """One entry of a vocabulary.

    Args:
        id: its row.
        text: as the tokenizer spells it.
        content: the bytes that it stands for; of a special token its name.
        kind: `text`, `byte` (a lone byte of a SentencePiece vocabulary) or `special`.
    """

    id: int
    text: str
    content: bytes
    kind: Kind


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of one tokenizer.

    Args:
        tokens: by id, ascending; ids may be missing.
        roles: `{role: id}` of the special tokens that have one.
        scheme: how it spells text.
        tokenizer: it itself.
    """

    tokens: Mapping[int, Token]
    roles: Mapping[str, int]
    scheme: Scheme
    tokenizer: Any

    @classmethod
    def of(cls, tokenizer: Any) -> Vocabulary:
        """Read a tokenizer.

        Args:
            tokenizer: of transformers.
        """
        vocab = tokenizer.get_vocab()
        scheme = _scheme(tokenizer, vocab)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {int(i) for i in tokenizer.all_special_ids} | {int(i) for i, token in added.items() if token.special}
        tokens = {}
        for text, i in sorted(vocab.items(), key=lambda item: item[1]):
            if i in special:
                tokens[i] = Token(i, text, text.encode("utf-8", "replace"), "special")
            elif i in added:
                tokens[i] = Token(i, text, text.encode("utf-8", "replace"), "text")
            else:
                tokens[i] = Token(i, text, *_content(text, scheme))
        ids: dict[str, Any] = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ROLES}
        return cls(tokens, {role: int(i) for role, i in ids.items() if i in tokens}, scheme, tokenizer)

    @property
    def rows(self) -> int:
        """Rows that an embedding for it needs: one for every id, those that no token has included."""
        return max(len(self.tokens), max(self.tokens, default=-1) + 1)

    @cached_property
    def _by_content(self) -> dict[bytes, list[Token]]:
        found = defaultdict(list)
        for token in self.tokens.values():
            if token.kind != "special" and token.content:
                found[token.content].append(token)
        return found

    @cached_property
    def _by_string(self) -> dict[tuple[str, str], int]:
        return {_string_key(token.text, self.scheme): token.id for token in self.tokens.values()}

    @cached_property
    def _by_text(self) -> dict[str, Token]:
        return {token.text: token for token in self.tokens.values()}

    def find(self, token: Token, other: Vocabulary, join: Join) -> int | None:
        """The id of the same token here, or None.

        Args:
            token: of another vocabulary.
            other: that vocabulary.
            join: `bytes` or `strings`.
        """
        if token.kind == "special":
            return self._special(token, other)
        if join == "strings":
            found = self._by_string.get(_string_key(token.text, other.scheme))
            return None if found is None or self.tokens[found].kind == "special" else found
        same = self._by_content.get(token.content, [])
        # The same spelling first, so that a vocabulary joined with itself is the identity; then a token of the same
        # kind, then one of text: a lone byte that a whole character also has a token for is never met in text.
        best = min(same, key=lambda t: (t.text != token.text, t.kind != token.kind, t.kind != "text"), default=None)
        return None if best is None else best.id

    def _special(self, token: Token, other: Vocabulary) -> int | None:
        held = [role for role in ROLES if other.roles.get(role) == token.id]
        for role in held:
            if role in self.roles:
                return self.roles[role]
        for role in held:
            if ALIKE.get(role) in self.roles:
                return self.roles[ALIKE[role]]
        same = self._by_text.get(token.text)
        return None if same is None else same.id

    def byte(self, token: Token, other: Vocabulary) -> int | None:
        """The id of a lone byte for a character of one byte, or the other way round; None where there is none.

        For the join by strings, which does not know that both are the same.

        Args:
            token: of another vocabulary.
            other: that vocabulary.
        """
        if token.kind == "byte":
            key = _string_key(chr(token.content[0]), self.scheme)
        elif token.kind == "text" and len(token.text) == 1 and ord(token.text) < 256:
            key = ("", f"<0x{ord(token.text):02X}>")
        else:
            return None
        return self._by_string.get(key)

    def prefix(self, token: Token, other: Vocabulary, join: Join) -> int | None:
        """The id of the longest true beginning of a token that is a token here and more than white space, or None.

        Args:
            token: of another vocabulary.
            other: that vocabulary.
            join: `bytes` or `strings`.
        """
        if token.kind != "text":
            return None
        for beginning in _beginnings(token, other.scheme, join):
            found = self.find(beginning, other, join)
            if found is not None:
                return found
        return None

    def pieces(self, token: Token) -> list[int]:
        """The ids that this vocabulary writes a token of another one with, without special tokens; maybe none.

        Bytes that are half a character are written too, where the vocabulary can.

        Args:
            token: of another vocabulary.
        """
        content = token.content
        model = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "model", None)
        if model is not None and self.scheme == "letters":
            letters = byte_letters()
            return [piece.id for piece in model.tokenize("".join(letters[byte] for byte in content))]
        try:
            text = content.decode()
        except UnicodeDecodeError:
            lone = [self._by_content.get(bytes([byte]), []) for byte in content]
            return [same[0].id for same in lone] if all(lone) else []
        if model is not None and self.scheme == "metaspace":
            return [piece.id for piece in model.tokenize(text.replace(" ", "\u2581"))]
        return [int(i) for i in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    @cached_property
    def digits(self) -> int:
        """The most digits that one token stands for when numbers are written; 0 where it writes none."""
        ids = self.tokenizer(PROBE, add_special_tokens=False, verbose=False)["input_ids"]
        contents = (self.tokens[i].content for i in ids if i in self.tokens and self.tokens[i].kind != "special")
        return max((sum(48 <= byte <= 57 for byte in content) for content in contents), default=0)


def _scheme(tokenizer: Any, vocab: Mapping[str, int]) -> Scheme:
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
    """A part of a tokenizer and the parts that it is made of."""
    own = getattr(backend, part)
    waiting = [] if own is None else [json.loads(own.__getstate__())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
        waiting += [v for v in (node.values() if isinstance(node, dict) else node) if isinstance(v, (dict, list))]


def _content(text: str, scheme: Scheme) -> tuple[bytes, Kind]:
    if scheme == "letters" and all(letter in _LETTERS for letter in text):
        return bytes(_LETTERS[letter] for letter in text), "text"
    if scheme == "metaspace":
        lone = _BYTE.fullmatch(text)
        return (bytes([int(lone[1], 16)]), "byte") if lone else (text.replace("\u2581", " ").encode(), "text")
    if scheme == "wordpiece":
        if text.startswith("##") and len(text) > 2:
            return text[2:].encode(), "text"
        # Punctuation stands alone there, wherever it was met; anything else begins a word.
        return (f" {text}" if text[:1].isalnum() else text).encode(), "text"
    return text.encode("utf-8", "replace"), "text"


def _string_key(text: str, scheme: Scheme) -> tuple[str, str]:
    mark = WORD_START[scheme]
    return ("start", text[len(mark) :]) if text.startswith(mark) else ("", text)


def _beginnings(token: Token, scheme: Scheme, join: Join) -> Iterator[Token]:
    """What a token begins with, the longest first."""
    if join == "strings":
        mark = WORD_START[scheme]
        start = len(mark) if token.text.startswith(mark) else 0
        for end in range(len(token.text) - 1, start, -1):
            if token.text[start:end].strip():
                yield Token(token.id, token.text[:end], b"", "text")
        return
    for end in range(len(token.content) - 1, 0, -1):
        part = token.content[:end]
        if part.strip() and token.content[end] & 0xC0 != 0x80:  # no half of a character
            yield Token(token.id, "", part, "text")


@dataclass(frozen=True)
class Joined:
    """Which donor tokens the base has.

    Args:
        base: its vocabulary.
        donor: likewise.
        ids: `{donor id: base id}` of the shared ones, special ones included.
    """

    base: Vocabulary
    donor: Vocabulary
    ids: Mapping[int, int]

    @property
    def overlap(self) -> float:
        """Shared tokens over those of the smaller vocabulary: 1 where one holds the other."""
        smaller = min(len(self.base.tokens), len(self.donor.tokens))
        return len(self.ids) / smaller if smaller else 0.0


def join(base: Vocabulary, donor: Vocabulary, by: Join = "bytes") -> Joined:
    """Find the donor's tokens in the base's vocabulary.

    Args:
        base: whose rows will be taken.
        donor: whose ids they will have.
        by: `bytes` (default): two tokens are one if they decode to the same bytes; `strings`: if their spellings are
            the same but for the mark at the beginning of a word, as in the released tool.
    """
    found = {token.id: base.find(token, donor, by) for token in donor.tokens.values()}
    return Joined(base, donor, {i: j for i, j in found.items() if j is not None})
