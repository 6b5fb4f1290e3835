"""Data: in memory in a keyed order, or read as it goes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from datasets import Dataset

from intaglio.data.segments import Segments
from intaglio.data.texts import Corpus
from intaglio.errors import IntaglioError
from intaglio.trainer import CausalLM, KeyedRNG
from intaglio.trainer.dataset import Rows, read_rows
from tests.trainer.helpers import TEXTS, checkpoint, run

WHOLE = CausalLM(length=16, pack=False)
TABLE = [[n, n + 1, n + 2] for n in range(3, 23)]


def rows_of(data: Any, seed: int = 0) -> Rows:
    """Rows that are the examples themselves."""
    return read_rows(checkpoint(), data, WHOLE, KeyedRNG(seed))


def order(rows: Rows, total: int, seed: int = 0) -> list[tuple[int, int]]:
    """Epoch and first token of each slot of a run."""
    slots: Any = rows.slots(total, 4, KeyedRNG(seed))
    found = slots if not hasattr(slots, "__len__") else (slots[n] for n in range(len(slots)))
    return [(row["epoch"], int(row["input_ids"][0])) for row in found]


def test_an_epoch_has_every_example_once_in_an_order_of_its_own() -> None:
    found = order(rows_of(TABLE), 60)
    epochs = [[token for epoch, token in found if epoch == e] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(3, 23))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert found == order(rows_of(TABLE), 60)
    assert found != order(rows_of(TABLE), 60, seed=1)


class Disk:
    """A data set of which only the items asked for are in memory."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(TABLE)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.read.append(index)
        return {"input_ids": TABLE[index]}


def test_a_data_set_on_the_disk_is_read_item_by_item_in_a_keyed_order() -> None:
    disk = Disk()
    rows = rows_of(disk)
    assert rows.table is None
    found = order(rows, 40)
    for epoch in (0, 1):
        assert sorted(token for e, token in found if e == epoch) == list(range(3, 23))
    assert found[:20] != [(0, token) for _, token in found[20:]]
    assert all(isinstance(index, int) for index in disk.read)


def test_a_datasets_data_set_is_accepted() -> None:
    found = order(rows_of(Dataset.from_dict({"input_ids": TABLE})), 20)
    assert sorted(token for _, token in found) == list(range(3, 23))


def test_a_stream_is_not_read_further_than_it_must_be() -> None:
    taken: list[int] = []

    def endless() -> Iterator[list[int]]:
        number = 0
        while True:
            taken.append(number)
            yield [3 + number % 100, 4, 5]
            number += 1

    rows = rows_of(endless())
    assert len(order(rows, 300)) == 300
    assert len(taken) <= 301


def test_a_stream_that_ends_early_is_one_sentence() -> None:
    with pytest.raises(IntaglioError, match="the data ended after 20 rows, 24 are needed"):
        order(rows_of(iter(TABLE)), 24)
    with pytest.raises(IntaglioError, match="epochs needs data of known length"):
        run(checkpoint(), Disk(), steps=None, epochs=1)


def test_texts_examples_ids_and_corpora_are_the_same_data() -> None:
    ids = [[*checkpoint().tokenizer(text)["input_ids"], 2] for text in TEXTS]
    given = (
        TEXTS,
        Corpus("texts", tuple(TEXTS)),
        [{"text": t} for t in TEXTS],
        [{"input_ids": row} for row in ids],
        ids,
    )
    assert len({rows_of(data).digest for data in given}) == 1


def test_masked_tokens_of_segments_are_left_out() -> None:
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 5:] = False
    rows = rows_of(Segments(torch.arange(16).reshape(2, 8), mask))
    assert [row["input_ids"].tolist() for row in rows.table or []] == [list(range(8)), list(range(8, 13))]


def test_the_digest_tells_data_apart() -> None:
    assert rows_of(TABLE).digest == rows_of(TABLE).digest != rows_of(TABLE[1:]).digest
    assert rows_of(Disk()).digest == rows_of(Disk()).digest
