"""Token batches: segments of equal length cut from a corpus, and the bytes of their text.

Dimension letters: N segments, T tokens of a segment.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from intaglio.data.texts import Corpus
from intaglio.errors import IntaglioError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LEAST_LENGTH = 8
"""Fewest tokens of a segment."""

_SEPARATOR = "\n\n"


@dataclass(frozen=True, eq=False)
class Segments:
    """Token ids of equal length.

    Args:
        ids_NT: int64 [N, T], token ids.
        mask_NT: bool [N, T], False where a token is padding; None (default) when nothing is padded.

    Raises:
        IntaglioError: a shape or a type is wrong, or there is no segment.
    """

    ids_NT: Tensor
    mask_NT: Tensor | None = None

    def __post_init__(self) -> None:
        if self.ids_NT.ndim != 2 or self.ids_NT.dtype != torch.int64 or self.ids_NT.numel() == 0:
            shape = list(self.ids_NT.shape)
            raise IntaglioError(
                f"segments need int64 token ids of shape [segments, tokens], got {self.ids_NT.dtype} {shape}"
            )
        mask = self.mask_NT
        if mask is not None and (mask.dtype != torch.bool or mask.shape != self.ids_NT.shape):
            raise IntaglioError(
                f"the mask must be bool of shape {list(self.ids_NT.shape)}, got {mask.dtype} {list(mask.shape)}"
            )

    @classmethod
    def of(cls, ids: Tensor | Sequence[Sequence[int]]) -> Segments:
        """Return segments without padding, from a tensor of any integer type or lists of equal length.

        Raises:
            IntaglioError: the ids are not integers in two dimensions.
        """
        try:
            tensor = torch.as_tensor(ids)
        except (TypeError, ValueError, RuntimeError) as error:
            raise IntaglioError(f"token ids must be integers in rows of equal length: {error}") from None
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise IntaglioError(f"token ids must be integers, got {tensor.dtype}")
        return cls(tensor.to(torch.int64))

    @property
    def n(self) -> int:
        """The number of segments N."""
        return self.ids_NT.shape[0]

    @property
    def length(self) -> int:
        """The number of tokens of a segment T, special and padding tokens included."""
        return self.ids_NT.shape[1]

    @property
    def tokens(self) -> int:
        """The number of tokens without padding."""
        return self.ids_NT.numel() if self.mask_NT is None else int(self.mask_NT.sum())

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the shape, the ids and the mask."""
        total = hashlib.sha256(f"{self.n}x{self.length}".encode("ascii"))
        total.update(self.ids_NT.cpu().numpy().astype("<i8").tobytes())
        if self.mask_NT is not None:
            total.update(self.mask_NT.cpu().numpy().tobytes())
        return total.hexdigest()

    def batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Yield keyword arguments for a model: `input_ids` [B, T] and, if there is a mask, `attention_mask` [B, T].

        Raises:
            IntaglioError: the batch size is below 1.
        """
        if batch_size < 1:
            raise IntaglioError(f"batch_size is {batch_size}; it must be at least 1")
        return self._batches(batch_size)

    def _batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        for start in range(0, self.n, batch_size):
            batch = {"input_ids": self.ids_NT[start : start + batch_size]}
            if self.mask_NT is not None:
                batch["attention_mask"] = self.mask_NT[start : start + batch_size].to(torch.int64)
            yield batch


def special_affixes(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Return the token ids that the tokenizer puts before and after every text (Gemma: BOS; BERT: [CLS] and [SEP])."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if plain and full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    if not full:
        return [], []
    raise IntaglioError("cannot tell which special tokens the tokenizer adds; it encodes 'a' differently with them")


def _ordered(corpus: Corpus, seed: int, order: str) -> list[str]:
    if order == "file":
        return list(corpus.documents)
    keyed = zip(corpus.hashes, corpus.documents, strict=True)
    return [d for _, d in sorted((hashlib.sha256(f"{seed}:{h}".encode("ascii")).digest(), d) for h, d in keyed)]


def segments(
    tokenizer: PreTrainedTokenizerFast,
    corpus: Corpus,
    samples: int,
    length: int,
    seed: int,
    order: Literal["shuffled", "file"] = "shuffled",
    fewer: bool = False,
) -> Segments:
    """Return exactly `samples` segments of `length` tokens from the front of the joined documents.

    With `fewer`, short texts give as many segments as they hold, instead of an error.

    The documents are ordered by SHA-256 of "seed:document hash", so that the order of two documents does not depend on
    the rest of the corpus; they are joined by two newlines and tokenised one by one until there are enough tokens.
    Every segment starts and ends with the tokenizer's own special tokens. A smaller number of samples gives the first
    ones of a larger number.
    """
    if samples < 1:
        raise IntaglioError(f"samples is {samples}; it must be at least 1")
    if length < LEAST_LENGTH:
        raise IntaglioError(f"length is {length} tokens; it must be at least {LEAST_LENGTH}")
    if order not in ("shuffled", "file"):
        raise IntaglioError(f"order is {order!r}; accepted: shuffled, file")
    prefix, suffix = special_affixes(tokenizer)
    inner = length - len(prefix) - len(suffix)
    if inner < 1:
        raise IntaglioError(f"length is {length} tokens; the special tokens alone take {len(prefix) + len(suffix)}")
    stream: list[int] = []
    for number, document in enumerate(_ordered(corpus, seed, order)):
        if len(stream) >= samples * inner:
            break
        # The separator comes first: a byte-level pre-tokenizer then splits it as between two paragraphs.
        text = _SEPARATOR + document if number else document
        stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if fewer:
        samples = max(1, min(samples, len(stream) // inner))
    if len(stream) < samples * inner:
        raise IntaglioError(
            f"the texts {corpus.name!r} give {len(stream) // inner} segments of {length} tokens, {samples} are needed;"
            " give more text, fewer samples or a shorter length"
        )
    rows = [prefix + stream[i * inner : (i + 1) * inner] + suffix for i in range(samples)]
    return Segments.of(rows)


def _is_byte_level(tokenizer: PreTrainedTokenizerFast) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return False
    decoder = json.loads(backend.decoder.__getstate__())
    return "ByteLevel" in {decoder.get("type"), *(part.get("type") for part in decoder.get("decoders", ()))}


def _byte_level_count(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> int:
    # A byte-level vocabulary spells a token with a letter per byte; only added tokens are spelled literally.
    added = tokenizer.added_tokens_decoder
    plain = [token for token in ids if token not in added]
    names = tokenizer.convert_ids_to_tokens(plain)
    if None in names:
        raise IntaglioError(f"the token id {plain[names.index(None)]} is not in the tokenizer's vocabulary")
    literal = sum(len(added[token].content.encode("utf-8")) for token in ids if token in added)
    return sum(map(len, names)) + literal


def _decoded_count(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> int:
    return len(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False).encode("utf-8"))


def segment_bytes(tokenizer: PreTrainedTokenizerFast, segments: Segments) -> list[int]:
    """Return, for each segment, the UTF-8 bytes of the text of its scored tokens.

    A causal model scores every token but the first of a segment: where that is BOS, all of the text is scored, else all
    but its first token. Special tokens and padding have no bytes. Bits per byte is the summed negative log2-likelihood
    of the scored tokens over this number.

    With a byte-level vocabulary (GPT-2, Llama 3, Qwen, SmolLM2) the count is exact for any cut, also inside a
    character. With others it is the length of the decoded segment less that of the unscored part; a character broken by
    a cut counts as the three bytes of the replacement character.
    """
    special = set(tokenizer.all_special_ids)
    byte_level = _is_byte_level(tokenizer)
    counts = []
    for index, row in enumerate(segments.ids_NT.tolist()):
        mask = [True] * len(row) if segments.mask_NT is None else segments.mask_NT[index].tolist()
        first = mask.index(True) if any(mask) else len(row)
        shown = [(i, token) for i, token in enumerate(row) if mask[i] and token not in special]
        scored = [token for i, token in shown if i > first]
        unscored = [token for i, token in shown if i <= first]
        if byte_level:
            counts.append(_byte_level_count(tokenizer, scored))
        else:
            counts.append(_decoded_count(tokenizer, unscored + scored) - _decoded_count(tokenizer, unscored))
    return counts
