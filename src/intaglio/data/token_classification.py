"""Texts whose words have labels: read from files, cut into rows of tokens, each label on one token of its word.

An example is a dict in one of two forms:

    {"words": ["EU", "rejects"], "labels": ["B-ORG", "O"]}                       words are joined by single spaces
    {"passage": "EU rejects", "spans": [[0, 2], [3, 10]], "labels": [...]}       places in a text as it is

`tokens` and `tags`, as many data sets call them, are read as `words` and `labels`. A word whose label is None has none.

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
"""Which token of a word has its label."""


@dataclass(frozen=True)
class Labelled:
    """One text with labelled words.

    Args:
        text: all of it.
        spans: `(start, end)` of each word, in characters, in order, not overlapping.
        labels: of each word; None where it has none.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    labels: tuple[str | None, ...]


@dataclass(frozen=True)
class Row:
    """A piece of a text as tokens.

    Args:
        ids_T: token ids.
        word_T: the word whose label a token has; -1 where it has none.
    """

    ids_T: Tensor
    word_T: Tensor


def as_labelled(example: Mapping[str, Any], what: str) -> Labelled:
    """Return an example in either form as a text with spans.

    Args:
        example: see the module.
        what: names it in a sentence.

    Raises:
        IntaglioError: it has neither form, or its parts do not fit each other.
    """
    given: dict[str, Any] = {"words": example.get("tokens"), "labels": example.get("tags"), **example}
    words, labels = given["words"], given["labels"]
    if not isinstance(labels, (list, tuple)):
        known = ", ".join(sorted(key for key in map(str, example) if key != "id")) or "nothing"
        raise IntaglioError(
            f"{what} has no labels; words and labels, or passage, spans and labels, are needed, not {known}"
        )
    text, spans = given.get("passage"), given.get("spans", ())
    if isinstance(words, (list, tuple)):
        text, spans = _joined(words, what)
    else:
        _check_spans(text, spans, what)
    if len(labels) != len(spans):
        raise IntaglioError(f"{what} has {len(labels)} labels for {len(spans)} words; one a word is needed")
    names = tuple(None if label is None else str(label) for label in labels)
    return Labelled(str(text), tuple((int(start), int(end)) for start, end in spans), names)


def _joined(words: Sequence[Any], what: str) -> tuple[str, list[tuple[int, int]]]:
    spans, place = [], 0
    for number, word in enumerate(words):
        if not isinstance(word, str) or not word.strip():
            raise IntaglioError(f"{what}: word {number} is {shorten(repr(word))}; at least one letter is needed")
        spans.append((place, place + len(word)))
        place += len(word) + 1
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
    """Return the examples of a file, one JSON object a line.

    Args:
        path: a `.jsonl` file in UTF-8; `text` is read as `passage`.

    Raises:
        IntaglioError: the file cannot be read, or a line is no example (it is named by its number).
    """
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise IntaglioError(f"labelled examples cannot be read from {file}: {reason}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
        except ValueError:
            example = None
        what = f"line {number} of {file}"
        if not isinstance(example, dict):
            raise IntaglioError(f"{what} is no JSON object with words and labels")
        if "text" in example:
            example["passage"] = example.pop("text")
        as_labelled(example, what)
        found.append(example)
    if not found:
        raise IntaglioError(f"{file} has no labelled examples")
    return found


def found_labels(examples: Iterable[Labelled]) -> tuple[str, ...]:
    """Return every label of some examples, sorted.

    Args:
        examples: texts.

    Raises:
        IntaglioError: there are fewer than two.
    """
    found = sorted({label for example in examples for label in example.labels if label is not None})
    if len(found) < 2:
        raise IntaglioError(f"the examples have {len(found)} different labels; at least two are needed")
    return tuple(found)


def rows(tokenizer: Any, example: Labelled, length: int, place: Place) -> Iterator[Row]:
    """Yield an example as rows of at most `length` tokens, cut between words, each word's label on one token.

    A token that reaches into two words belongs to the first of them; a word that has no token of its own gets no label.

    Args:
        tokenizer: a fast one, which says where tokens stand in the text.
        example: a text.
        length: the most tokens of a row, special ones included.
        place: the token of a word that has its label.

    Raises:
        IntaglioError: the tokenizer does not say where its tokens stand, or rows are too short for a token.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise IntaglioError("labels are put on tokens by their places in the text, which this tokenizer does not tell")
    before, after = _special(tokenizer)
    room = length - len(before) - len(after)
    if room < 1:
        raise IntaglioError(f"length is {length}; rows need room for special tokens and at least one more")
    coded = tokenizer(example.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, owner = coded["input_ids"], _owners(coded["offset_mapping"], example.spans)
    bearer = _bearers(owner, place)
    start = 0
    while start < len(ids):
        end = min(start + room, len(ids))
        if end < len(ids):
            back = end
            while back > start and owner[back] >= 0 and owner[back] == owner[back - 1]:
                back -= 1
            end = back if back > start else end
        yield Row(
            torch.tensor([*before, *ids[start:end], *after]),
            torch.tensor([-1] * len(before) + bearer[start:end] + [-1] * len(after)),
        )
        start = end


def _special(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that go before and behind a text."""
    ids: list[int] = tokenizer("a", verbose=False)["input_ids"]
    inner: list[int] = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    begin = next((i for i in range(len(ids) - len(inner) + 1) if ids[i : i + len(inner)] == inner), 0)
    return ids[:begin], ids[begin + len(inner) :]


def _owners(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """The word that each token belongs to: the first one that it reaches into; -1 for none."""
    owners, word = [], 0
    for start, end in offsets:
        while word < len(spans) and spans[word][1] <= start:
            word += 1
        inside = start < end and word < len(spans) and spans[word][0] < end
        owners.append(word if inside else -1)
    return owners


def _bearers(owner: Sequence[int], place: Place) -> list[int]:
    """The same, left on one token of each word."""
    borne = [-1] * len(owner)
    order = range(len(owner)) if place == "first" else range(len(owner) - 1, -1, -1)
    seen: set[int] = set()
    for token in order:
        word = owner[token]
        if word >= 0 and word not in seen:
            borne[token] = word
            seen.add(word)
    return borne
