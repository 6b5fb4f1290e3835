"""Token-classification data: texts with labelled words, cut into rows of tokens.

An example is a dict in one of two forms:

    {"words": ["EU", "rejects"], "labels": ["B-ORG", "O"]}                       words are joined by single spaces
    {"passage": "EU rejects", "spans": [[0, 2], [3, 10]], "labels": [...]}       character offsets in a text

`tokens` and `tags`, as many data sets call them, are read as `words` and `labels`. The label of a word may be None.

Dimension letters: T tokens of a row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from intaglio.errors import IntaglioError, shorten

Place = Literal["first", "last"]
"""The token of a word that carries its label."""


@dataclass(frozen=True)
class Labelled:
    """A text, the `(start, end)` of its words in characters, in order, and their labels (None where unlabelled)."""

    text: str
    spans: tuple[tuple[int, int], ...]
    labels: tuple[str | None, ...]


@dataclass(frozen=True)
class Row:
    """A part of a text as token ids, and the word whose label each token carries (-1 for none)."""

    ids_T: Tensor
    word_T: Tensor


def as_labelled(example: Mapping[str, Any], what: str) -> Labelled:
    """Return an example in either form as a text with spans."""
    fields: dict[str, Any] = {"words": example.get("tokens"), "labels": example.get("tags"), **example}
    words, labels = fields["words"], fields["labels"]
    if not isinstance(labels, (list, tuple)):
        known = ", ".join(sorted(key for key in map(str, example) if key != "id")) or "nothing"
        raise IntaglioError(
            f"{what} has no labels; words and labels, or passage, spans and labels, are needed, not {known}"
        )
    text, spans = fields.get("passage"), fields.get("spans", ())
    if isinstance(words, (list, tuple)):
        text, spans = _join_words(words, what)
    else:
        _check_spans(text, spans, what)
    if len(labels) != len(spans):
        raise IntaglioError(f"{what} has {len(labels)} labels for {len(spans)} words; one per word is needed")
    names = tuple(None if label is None else str(label) for label in labels)
    return Labelled(str(text), tuple((int(start), int(end)) for start, end in spans), names)


def _join_words(words: Sequence[Any], what: str) -> tuple[str, list[tuple[int, int]]]:
    spans, start = [], 0
    for number, word in enumerate(words):
        if not isinstance(word, str) or not word.strip():
            raise IntaglioError(f"{what}: word {number} is {shorten(repr(word))}; at least one letter is needed")
        spans.append((start, start + len(word)))
        start += len(word) + 1
    return " ".join(words), spans


def _check_spans(text: Any, spans: Any, what: str) -> None:
    if not isinstance(text, str) or not isinstance(spans, (list, tuple)):
        raise IntaglioError(f"{what} has no words; words and labels, or passage, spans and labels are needed")
    end_before = 0
    for span in spans:
        numbers = isinstance(span, (list, tuple)) and len(span) == 2 and all(type(n) is int for n in span)
        if not numbers or not end_before <= span[0] < span[1] <= len(text):
            raise IntaglioError(
                f"{what} has the span {shorten(repr(span))}; start and end inside its {len(text)} characters are "
                "needed, in order and not overlapping"
            )
        end_before = span[1]


def read_labelled(path: str | Path) -> list[dict[str, Any]]:
    """Return the examples of a file, one JSON object per line."""
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise IntaglioError(f"labelled examples cannot be read from {file}: {reason}") from error
    examples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
        except ValueError:
            example = None
        what = f"line {number} of {file}"
        if not isinstance(example, dict):
            raise IntaglioError(f"{what} is not a JSON object with words and labels")
        if "text" in example:
            example["passage"] = example.pop("text")
        as_labelled(example, what)
        examples.append(example)
    if not examples:
        raise IntaglioError(f"{file} has no labelled examples")
    return examples


def found_labels(examples: Iterable[Labelled]) -> tuple[str, ...]:
    """Return all labels of some examples, sorted."""
    labels = sorted({label for example in examples for label in example.labels if label is not None})
    if len(labels) < 2:
        raise IntaglioError(f"the examples have {len(labels)} different labels; at least two are needed")
    return tuple(labels)


def rows(tokenizer: Any, example: Labelled, length: int, place: Place) -> Iterator[Row]:
    """Yield an example as rows of at most `length` tokens, cut between words, each word's label on a single token.

    A token that spans two words belongs to the first; a word without a token of its own gets no label.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise IntaglioError("labels are assigned to tokens by character offsets, which needs a fast tokenizer")
    before, after = _special(tokenizer)
    inner = length - len(before) - len(after)
    if inner < 1:
        raise IntaglioError(f"length is {length}; rows need room for special tokens and at least one more")
    encoded = tokenizer(example.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, owner = encoded["input_ids"], _word_of_tokens(encoded["offset_mapping"], example.spans)
    labelled = _label_positions(owner, place)
    start = 0
    while start < len(ids):
        end = min(start + inner, len(ids))
        if end < len(ids):
            back = end
            while back > start and owner[back] >= 0 and owner[back] == owner[back - 1]:
                back -= 1
            end = back if back > start else end
        yield Row(
            torch.tensor([*before, *ids[start:end], *after]),
            torch.tensor([-1] * len(before) + labelled[start:end] + [-1] * len(after)),
        )
        start = end


def _special(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the special tokens before and after a text."""
    ids: list[int] = tokenizer("a", verbose=False)["input_ids"]
    inner: list[int] = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    begin = next((i for i in range(len(ids) - len(inner) + 1) if ids[i : i + len(inner)] == inner), 0)
    return ids[:begin], ids[begin + len(inner) :]


def _word_of_tokens(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Return the word of each token, the first that it overlaps; -1 for none."""
    owners, word = [], 0
    for start, end in offsets:
        while word < len(spans) and spans[word][1] <= start:
            word += 1
        inside = start < end and word < len(spans) and spans[word][0] < end
        owners.append(word if inside else -1)
    return owners


def _label_positions(owner: Sequence[int], place: Place) -> list[int]:
    """Return the word of each token that carries a label; -1 for the others."""
    result = [-1] * len(owner)
    order = range(len(owner)) if place == "first" else range(len(owner) - 1, -1, -1)
    seen: set[int] = set()
    for token in order:
        word = owner[token]
        if word >= 0 and word not in seen:
            result[token] = word
            seen.add(word)
    return result
