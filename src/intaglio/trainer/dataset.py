"""From what a user gives as data to rows: in memory, in an order keyed by the seed, or read from a stream.

A *row* is an example that is ready to be collated: a dict, with `input_ids` where it is of tokens. One without counts
as one token. Dimension letters: T tokens of a row.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from intaglio.checkpoint import Checkpoint
from intaglio.data.segments import Segments
from intaglio.data.texts import Corpus, load_texts
from intaglio.errors import IntaglioError
from intaglio.trainer.protocols import Example, Objective, Prepares
from intaglio.trainer.rng import KeyedRNG

SAMPLE = 256
"""Rows of a stream that its identity and its mean length are taken from."""


@dataclass(frozen=True)
class Rows:
    """Rows to train on.

    Args:
        table: all of them, where they are in memory; None for a stream.
        read: begins a pass over the rows; a stream's passes come one after the other.
        digest: SHA-256 over the rows (of a stream over its first ones).
        mean: tokens of a row on average (of a stream over its first ones).
    """

    table: list[Example] | None
    read: Callable[[], Iterator[Example]]
    digest: str
    mean: float

    def slots(self, total: int, step_rows: int, draws: KeyedRNG) -> Dataset[Example]:
        """The data of a whole run as one data set of `total` rows, in the order they are trained on.

        Args:
            total: rows of the run.
            step_rows: rows of an optimizer step.
            draws: keys the order of an epoch.
        """
        if self.table is not None:
            return _TableSlots(self.table, total, step_rows, draws)
        return _StreamSlots(self.read, total, step_rows)


@dataclass
class _TableSlots(Dataset[Example]):
    table: list[Example]
    total: int
    step_rows: int
    draws: KeyedRNG
    _order: tuple[int, Tensor] = field(default_factory=lambda: (-1, torch.empty(0)), repr=False)

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, slot: int) -> Example:
        epoch, place = divmod(slot, len(self.table))
        if self._order[0] != epoch:
            self._order = (epoch, self.draws.order(len(self.table), epoch))
        index = int(self._order[1][place])
        return {**self.table[index], "id": index, "epoch": epoch, "step": slot // self.step_rows}


@dataclass
class _StreamSlots(IterableDataset[Example]):
    read: Callable[[], Iterator[Example]]
    total: int
    step_rows: int

    def __iter__(self) -> Iterator[Example]:
        return itertools.islice(self._endless(), self.total)

    def _endless(self) -> Iterator[Example]:
        slot = 0
        for epoch in itertools.count():
            before = slot
            for index, row in enumerate(self.read()):
                yield {**row, "id": index, "epoch": epoch, "step": slot // self.step_rows}
                slot += 1
            if slot == before:
                raise IntaglioError(
                    f"the data ended after {slot} rows, {self.total} are needed; give more, train shorter, or give data"
                    " that can be read again from its start"
                )


def read_rows(checkpoint: Checkpoint, data: Any, objective: Objective, draws: KeyedRNG) -> Rows:
    """Turn what a user gives as data into rows.

    Args:
        checkpoint: its tokenizer reads texts, its vocabulary bounds the ids.
        data: see `train`.
        objective: may make rows of its own out of the examples.
        draws: for what the objective draws once.

    Raises:
        IntaglioError: there is no data, or an example is malformed (it is named by its number).
    """
    data = _opened(data)

    def read(source: Iterable[Any]) -> Iterator[Example]:
        examples: Iterable[Example] = (as_example(checkpoint, n, item) for n, item in enumerate(source))
        if isinstance(objective, Prepares):
            examples = objective.prepare(checkpoint, examples, draws)
        return (_checked(checkpoint, n, row) for n, row in enumerate(examples))

    if isinstance(data, (list, tuple)):
        table = list(read(data))
        if not table:
            raise IntaglioError("the training data is empty; give at least one example with two tokens")
        return Rows(table, lambda: iter(table), _digest(table), sum(map(row_tokens, table)) / len(table))
    return _stream(data, read, draws)


def _opened(data: Any) -> Any:
    """The examples that a name, a corpus or segments stand for, as a list; anything else that has examples as it is."""
    if isinstance(data, (str, os.PathLike)):
        data = load_texts(data)
    if isinstance(data, Corpus):
        return list(data.documents)
    if isinstance(data, Tensor):
        data = Segments.of(data)
    if isinstance(data, Segments):
        return _segment_rows(data)
    if not (isinstance(data, Iterable) or _on_disk(data)) or isinstance(data, (dict, bytes)):
        raise IntaglioError(
            f"the training data is {type(data).__name__}; accepted: texts, examples with input_ids, segments, a corpus,"
            " the name of texts, or anything that yields examples"
        )
    return data


def all_examples(checkpoint: Checkpoint, data: Any) -> list[Example] | None:
    """Return a user's data as examples, where they are in memory; else None.

    Args:
        checkpoint: its tokenizer is used.
        data: see `train`.

    Raises:
        IntaglioError: there is no data, or an example is malformed.
    """
    data = _opened(data)
    if not isinstance(data, (list, tuple)):
        return None
    return [as_example(checkpoint, number, item, keep_text=True) for number, item in enumerate(data)]


def _on_disk(data: Any) -> bool:
    """Whether any item can be had by its number, as from a data set of torch or of `datasets`."""
    return hasattr(data, "__len__") and hasattr(data, "__getitem__")


def _stream(data: Any, read: Callable[[Iterable[Any]], Iterator[Example]], draws: KeyedRNG) -> Rows:
    passes = itertools.count()
    if not _on_disk(data) and iter(data) is data:  # a generator: it can be read once

        def begin() -> Iterator[Example]:
            return read(data)

        first = begin()
        head = list(itertools.islice(first, SAMPLE))
        rest: Iterator[Example] = itertools.chain(head, first)

        def again() -> Iterator[Example]:
            return rest
    else:
        head = list(itertools.islice(read(_ordered(data, draws, 0)), SAMPLE))

        def again() -> Iterator[Example]:
            return read(_ordered(data, draws, next(passes)))

    if not head:
        raise IntaglioError("the training data is empty; give at least one example with two tokens")
    return Rows(None, again, _digest(head), sum(map(row_tokens, head)) / len(head))


def _ordered(data: Any, draws: KeyedRNG, epoch: int) -> Iterator[Any]:
    """A pass over data that lie on the disk: in an order of their own where any item can be had, else as they come."""
    if not _on_disk(data):
        return iter(data)
    return (data[int(index)] for index in draws.order(len(data), epoch))


def _segment_rows(segments: Segments) -> list[Example]:
    masks = itertools.repeat(None) if segments.mask_NT is None else segments.mask_NT
    return [
        {"input_ids": row_T if mask_T is None else row_T[mask_T]}
        for row_T, mask_T in zip(segments.ids_NT, masks, strict=False)
    ]


def as_example(checkpoint: Checkpoint, number: int, item: Any, *, keep_text: bool = False) -> Example:
    """Return an item of the user's data as an example with its `id`, its text turned into `input_ids`.

    A text ends with the tokenizer's end-of-text token, where it has one.

    Args:
        checkpoint: its tokenizer is used.
        number: of the item, from 0.
        item: a text; token ids; or a dict with `input_ids`, with `text`, or with whatever the objective reads.
        keep_text: whether a text stays beside its tokens, for those who read it. Default False.

    Raises:
        IntaglioError: the item is something else, or a text without a tokenizer.
    """
    if isinstance(item, str):
        item = {"text": item}
    elif isinstance(item, (Tensor, list, tuple)):
        item = {"input_ids": item}
    if not isinstance(item, dict):
        raise IntaglioError(f"example {number} of the training data is {type(item).__name__}; accepted: a text, a dict")
    if "input_ids" not in item and "text" in item:
        rest = {key: value for key, value in item.items() if keep_text or key != "text"}
        item = {**rest, "input_ids": token_ids(checkpoint, item["text"], f"example {number} of the training data")}
    return {**item, "id": number}


def token_ids(checkpoint: Checkpoint, text: Any, what: str, *, end: bool = True) -> list[int]:
    """Return the token ids of a text.

    Args:
        checkpoint: its tokenizer is used.
        text: what is read.
        what: names the text in a sentence.
        end: whether the end-of-text token is put behind it, where the tokenizer has one. Default True.

    Raises:
        IntaglioError: it is no text, or there is no tokenizer.
    """
    if not isinstance(text, str):
        raise IntaglioError(f"{what} has a text that is {type(text).__name__}; only a string is accepted")
    if checkpoint.tokenizer is None:
        raise IntaglioError("the checkpoint has no tokenizer, so it can only be trained on examples with input_ids")
    ids: list[int] = checkpoint.tokenizer(text, verbose=False)["input_ids"]
    stop = checkpoint.tokenizer.eos_token_id
    return [*ids, stop] if end and stop is not None and ids[-1:] != [stop] else ids


def _checked(checkpoint: Checkpoint, number: int, row: Example) -> Example:
    """The row with its ids, if it has any, as an int64 tensor [T], or a sentence on what is wrong with it."""
    what = f"row {number} of the training data"
    if "input_ids" not in row:
        return row  # pictures, pairs of texts: its objective knows what it needs
    ids_T = as_ids(row["input_ids"], what)
    try:
        checkpoint.check_ids(ids_T)
    except IntaglioError as error:
        raise IntaglioError(f"{what}: {error}") from None
    return {**row, "input_ids": ids_T}


def as_ids(value: Any, what: str) -> Tensor:
    """Return token ids as an int64 tensor [T].

    Args:
        value: integers.
        what: names them in a sentence.

    Raises:
        IntaglioError: they are no integers in one row, or none.
    """
    try:
        ids_T = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise IntaglioError(f"{what}: its input_ids are no row of integers") from None
    if ids_T.ndim != 1 or (ids_T.numel() and (ids_T.is_floating_point() or ids_T.dtype == torch.bool)):
        raise IntaglioError(f"{what}: its input_ids are no row of integers")
    if not ids_T.numel():
        raise IntaglioError(f"{what} is empty; at least one token is needed")
    return ids_T.to(torch.int64)


def row_tokens(row: Example) -> int:
    """How many tokens a row counts as.

    Args:
        row: with `input_ids`, or something else, which counts as one.
    """
    return len(row["input_ids"]) if "input_ids" in row else 1


def _digest(rows: Sequence[Example]) -> str:
    total = hashlib.sha256()
    for row in rows:
        for key in sorted(row):
            value = row[key]
            content = value.numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode("utf-8")
            total.update(f"{key}:{len(content)}:".encode())
            total.update(content)
    return total.hexdigest()
