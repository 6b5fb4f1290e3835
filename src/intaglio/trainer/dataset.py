"""Training dataset: from a user's data to rows, in memory in an order keyed by the seed, or read from a stream.

A *row* is an example ready to be collated: a dict, with `input_ids` if it consists of tokens. A row without counts as
one token. Dimension letters: T tokens of a row, R rows, K batches, P exchanged rows.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from intaglio.checkpoint import Checkpoint
from intaglio.data.segments import Segments
from intaglio.data.texts import Corpus, load_texts
from intaglio.errors import IntaglioError
from intaglio.trainer.protocols import Example, Objective, Prepares
from intaglio.trainer.rng import KeyedRNG, generator

SAMPLE = 256
"""Rows of a stream that determine its digest and mean length."""


@dataclass(frozen=True)
class Rows:
    """Rows to train on: a table in memory, or passes over a stream.

    Of a stream, `digest` and `mean`, the average number of tokens of a row, come from its first rows.
    """

    table: list[Example] | None
    read: Callable[[], Iterator[Example]]
    digest: str
    mean: float

    def hold_out(self, share: float, rng: KeyedRNG) -> tuple[Rows, list[Example]]:
        """Return the rows without a random share of them, and that share.

        Raises:
            IntaglioError: the rows are a stream, or one of the two parts is empty.
        """
        if self.table is None:
            raise IntaglioError("a share of the rows is to be held out, which needs data in memory; give a list")
        chosen, held_out = hold_out(self.table, share, rng.seed)
        rest = [self.table[n] for n in chosen]
        mean = sum(map(row_tokens, rest)) / len(rest)
        return Rows(rest, lambda: iter(rest), self.digest, mean), [self.table[n] for n in held_out]

    def slots(
        self,
        total: int,
        step_rows: int,
        rng: KeyedRNG,
        batch_rows: int = 1,
        homogeneous_ratio: float | None = None,
    ) -> Dataset[Example]:
        """Return the data set of a whole run, `total` rows in training order."""
        if self.table is None:
            if homogeneous_ratio is not None:
                raise IntaglioError("homogeneous_ratio groups examples by task, which must be in memory; give a list")
            return _StreamSlots(self.read, total, step_rows)
        if homogeneous_ratio is None:
            count = len(self.table)
            return _TableSlots(self.table, total, step_rows, lambda epoch: rng.permutation(count, epoch))
        tasks = self._tasks(batch_rows)
        return _TableSlots(
            self.table,
            total,
            step_rows,
            lambda epoch: homogeneous_order(
                tasks, batch_rows, homogeneous_ratio, generator(rng.seed, "homogeneous", epoch)
            ),
        )

    def _tasks(self, batch_rows: int) -> list[str]:
        """Return the task of each row of the table."""
        rows = self.table or []
        without = next((number for number, row in enumerate(rows) if "task" not in row), None)
        if without is not None:
            raise IntaglioError(f"homogeneous_ratio groups examples by their task, and example {without} has none")
        if len(rows) < batch_rows:
            raise IntaglioError(
                f"homogeneous_ratio needs a full batch, and {len(rows)} examples fill none of {batch_rows}"
            )
        return [str(row["task"]) for row in rows]


def homogeneous_order(tasks: Sequence[str], batch_rows: int, ratio: float, draws: torch.Generator) -> Tensor:
    """Return an order of rows in which most batches have rows of one task.

    Each task is shuffled and cut into batches; what is left over of the tasks is joined in a random order and cut too,
    and rows that fill no batch are left out. Then `1 - ratio` of each batch is pooled, shuffled and dealt out again.
    The authors of KaLM-Embedding (Zhao et al., 2025, arXiv 2506.20923) round that part down and draw it anew in each
    process.

    Args:
        tasks: of the rows.
        batch_rows: rows of a batch; at most as many as there are.
        ratio: share of a batch that stays in its task.
        draws: source of the shuffles.
    """
    rows_of: dict[str, list[int]] = {}
    for row, task in enumerate(tasks):
        rows_of.setdefault(task, []).append(row)

    def shuffled(values: Tensor) -> Tensor:
        return values[torch.randperm(len(values), generator=draws)]

    def batches(rows_R: Tensor) -> Tensor:
        return rows_R[: len(rows_R) // batch_rows * batch_rows].view(-1, batch_rows)

    own = [shuffled(torch.tensor(rows)) for rows in rows_of.values()]
    rests = [rows_R[len(rows_R) // batch_rows * batch_rows :] for rows_R in own]
    rest_R = torch.cat([rests[int(place)] for place in torch.randperm(len(rests), generator=draws)])
    batches_KR = shuffled(torch.cat([*map(batches, own), batches(rest_R)]))
    exchanged = round(batch_rows * (1 - ratio))
    if exchanged:
        pool_P = shuffled(batches_KR[:, -exchanged:].flatten())
        batches_KR[:, -exchanged:] = pool_P.view(-1, exchanged)
    return batches_KR.flatten()


@dataclass
class _TableSlots(Dataset[Example]):
    table: list[Example]
    total: int
    step_rows: int
    order: Callable[[int], Tensor]
    """Return the rows of an epoch; as many in each."""

    def __post_init__(self) -> None:
        self._epoch, self._rows = 0, self.order(0)

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, slot: int) -> Example:
        epoch, position = divmod(slot, len(self._rows))
        if self._epoch != epoch:
            self._epoch, self._rows = epoch, self.order(epoch)
        index = int(self._rows[position])
        place = {"id": index, "epoch": epoch, "step": slot // self.step_rows, "steps": self.total // self.step_rows}
        return {**self.table[index], **place}


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
                place = {"step": slot // self.step_rows, "steps": self.total // self.step_rows}
                yield {**row, "id": index, "epoch": epoch, **place}
                slot += 1
            if slot == before:
                raise IntaglioError(
                    f"the data ended after {slot} rows, {self.total} are needed; give more, train shorter, or give data"
                    " that can be read again from its start"
                )


def hold_out(rows: Sequence[Any], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the indices of rows to train on and of a random share of them to hold out, both in order.

    Raises:
        IntaglioError: one of the two is empty.
    """
    count = round(share * len(rows))
    if not 0 < count < len(rows):
        raise IntaglioError(f"a share of {share} of {len(rows)} rows leaves {count} held out; give more data")
    order = torch.randperm(len(rows), generator=generator(seed, "held out rows")).tolist()
    return sorted(order[count:]), sorted(order[:count])


def read_rows(checkpoint: Checkpoint, data: Any, objective: Objective, rng: KeyedRNG) -> Rows:
    """Turn a user's data into rows; an objective with `prepare` makes its own."""
    data = _opened(data)

    def read(source: Iterable[Any]) -> Iterator[Example]:
        examples: Iterable[Example] = (as_example(checkpoint, n, item) for n, item in enumerate(source))
        if isinstance(objective, Prepares):
            examples = objective.prepare(checkpoint, examples, rng)
        return (_checked(checkpoint, n, row) for n, row in enumerate(examples))

    if isinstance(data, (list, tuple)):
        table = list(read(data))
        if not table:
            raise IntaglioError("the training data is empty; give at least one example with two tokens")
        return Rows(table, lambda: iter(table), _digest(table), sum(map(row_tokens, table)) / len(table))
    return _stream(data, read, rng)


def _opened(data: Any) -> Any:
    """Return the examples of a name, a corpus or segments as a list, and other data unchanged."""
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
    """Return a user's data as a list of examples; None for a stream."""
    data = _opened(data)
    if not isinstance(data, (list, tuple)):
        return None
    return [as_example(checkpoint, number, item, keep_text=True) for number, item in enumerate(data)]


def _on_disk(data: Any) -> bool:
    """Return whether items can be read by index, as from a data set of torch or of `datasets`."""
    return hasattr(data, "__len__") and hasattr(data, "__getitem__")


def _stream(data: Any, read: Callable[[Iterable[Any]], Iterator[Example]], rng: KeyedRNG) -> Rows:
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
        head = list(itertools.islice(read(_ordered(data, rng, 0)), SAMPLE))

        def again() -> Iterator[Example]:
            return read(_ordered(data, rng, next(passes)))

    if not head:
        raise IntaglioError("the training data is empty; give at least one example with two tokens")
    return Rows(None, again, _digest(head), sum(map(row_tokens, head)) / len(head))


def _ordered(data: Any, rng: KeyedRNG, epoch: int) -> Iterator[Any]:
    """Return a pass over a data set: in the epoch's order where items can be read by index, else in its own order."""
    if not _on_disk(data):
        return iter(data)
    return (data[int(index)] for index in rng.permutation(len(data), epoch))


def _segment_rows(segments: Segments) -> list[Example]:
    masks = itertools.repeat(None) if segments.mask_NT is None else segments.mask_NT
    return [
        {"input_ids": row_T if mask_T is None else row_T[mask_T]}
        for row_T, mask_T in zip(segments.ids_NT, masks, strict=False)
    ]


def as_example(checkpoint: Checkpoint, number: int, item: Any, *, keep_text: bool = False) -> Example:
    """Return an item of the user's data as an example with its `id`, a text tokenised into `input_ids`.

    A text ends with the tokenizer's end-of-text token, if there is one, and is dropped unless `keep_text`.
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
    """Return the token ids of a text, with the end-of-text token unless `end` is False."""
    if not isinstance(text, str):
        raise IntaglioError(f"{what} has a text that is {type(text).__name__}; only a string is accepted")
    if checkpoint.tokenizer is None:
        raise IntaglioError("the checkpoint has no tokenizer, so it can only be trained on examples with input_ids")
    ids: list[int] = checkpoint.tokenizer(text, verbose=False)["input_ids"]
    stop = checkpoint.tokenizer.eos_token_id
    return [*ids, stop] if end and stop is not None and ids[-1:] != [stop] else ids


def _checked(checkpoint: Checkpoint, number: int, row: Example) -> Example:
    """Return a row with validated ids, int64 [T], if it has any."""
    what = f"row {number} of the training data"
    if "input_ids" not in row:
        return row  # such as images: the objective checks them
    ids_T = as_ids(row["input_ids"], what)
    try:
        checkpoint.check_ids(ids_T)
    except IntaglioError as error:
        raise IntaglioError(f"{what}: {error}") from None
    return {**row, "input_ids": ids_T}


def as_ids(value: Any, what: str) -> Tensor:
    """Return token ids as an int64 tensor [T]; `what` names them in error messages."""
    try:
        ids_T = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise IntaglioError(f"{what}: input_ids must be one row of integers") from None
    if ids_T.ndim != 1 or (ids_T.numel() and (ids_T.is_floating_point() or ids_T.dtype == torch.bool)):
        raise IntaglioError(f"{what}: input_ids must be one row of integers")
    if not ids_T.numel():
        raise IntaglioError(f"{what} is empty; at least one token is needed")
    return ids_T.to(torch.int64)


def row_tokens(row: Example) -> int:
    """Return the number of tokens that a row counts as."""
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
