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
from intaglio.trainer.contrastive import Contrastive
from intaglio.trainer.dataset import Rows, homogeneous_order, read_rows
from tests.trainer.helpers import PAIRS, TEXTS, checkpoint, run

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


TASKS = ["a"] * 9 + ["b"] * 6 + ["c"] * 3


@pytest.mark.parametrize(("ratio", "exchanged"), [(1.0, 0), (0.75, 1), (0.0, 4)])
def test_homogeneous_batches(ratio: float, exchanged: int) -> None:
    """Each batch comes from one task, except a fraction (1 - homogeneous_ratio) of slots swapped with other tasks."""
    order = homogeneous_order(TASKS, 4, ratio, torch.Generator().manual_seed(3))
    assert len(order) == len(set(order.tolist())) == 16  # 18 rows fill four batches
    batches = [[TASKS[row] for row in batch] for batch in order.view(-1, 4).tolist()]
    pure = [len(set(batch[: 4 - exchanged])) <= 1 for batch in batches]
    assert sum(pure) >= 3
    assert sum(len(set(batch)) == 1 for batch in batches) < 4
    again = homogeneous_order(TASKS, 4, 1.0, torch.Generator().manual_seed(3)).view(-1, 4)
    assert torch.equal(order.view(-1, 4)[:, : 4 - exchanged], again[:, : 4 - exchanged])
    if exchanged:
        assert not torch.equal(order, again.flatten())


def test_homogeneous_order_takes_every_row_of_a_task_in_turn() -> None:
    orders = [homogeneous_order(["a"] * 8, 4, 1.0, torch.Generator().manual_seed(seed)) for seed in range(2)]
    assert all(sorted(order.tolist()) == list(range(8)) for order in orders)
    assert not torch.equal(*orders)
    first = {homogeneous_order(TASKS, 4, 1.0, torch.Generator().manual_seed(seed))[0].item() // 9 for seed in range(9)}
    assert first == {0, 1}  # batches are shuffled, and the tasks of the first differ


def test_epochs_of_homogeneous_batches_begin_with_a_whole_batch() -> None:
    table = [{"input_ids": [3 + n, 4], "task": task} for n, task in enumerate(TASKS)]
    rows = Rows(table, lambda: iter(table), "", 2.0)
    slots: Any = rows.slots(48, 4, KeyedRNG(0), 4, 1.0)
    found = [slots[n] for n in range(48)]
    assert [row["epoch"] for row in found] == [0] * 16 + [1] * 16 + [2] * 16
    assert [row["step"] for row in found] == [n // 4 for n in range(48)]
    ids = [[row["id"] for row in found[start : start + 16]] for start in (0, 16, 32)]
    assert ids[0] != ids[1] != ids[2]
    assert all(found[n]["task"] == TASKS[found[n]["id"]] for n in range(48))
    other: Any = rows.slots(48, 4, KeyedRNG(1), 4, 1.0)
    assert [other[n]["id"] for n in range(16)] != ids[0]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (PAIRS[:6], "groups examples by their task, and example 0 has none"),
        ([{**pair, "task": "a"} for pair in PAIRS[:1]], "needs a full batch, and 1 examples fill none of 2"),
        (iter([{**pair, "task": "a"} for pair in PAIRS]), "must be in memory; give a list"),
    ],
)
def test_homogeneous_batches_need_tasks_in_memory(data: Any, says: str) -> None:
    with pytest.raises(IntaglioError, match=says):
        run(checkpoint(layers=1), data, objective=Contrastive(), homogeneous_ratio=1.0)
    with pytest.raises(IntaglioError, match=r"homogeneous_ratio: 1\.5 is not accepted"):
        run(checkpoint(layers=1), PAIRS, objective=Contrastive(), homogeneous_ratio=1.5)


def test_training_batches_have_one_task() -> None:
    seen: list[set[str]] = []

    class Watched(Contrastive):
        def collate(self, examples: Any, rng: Any) -> Any:
            seen.append({example["task"] for example in examples})
            return super().collate(examples, rng)

    pairs = [{**pair, "task": "ab"[n % 2]} for n, pair in enumerate(PAIRS[:8])]
    run(
        checkpoint(layers=1),
        pairs,
        objective=Watched(),
        homogeneous_ratio=1.0,
        batch_size=2,
        gradient_accumulation_steps=2,
        steps=2,
    )
    assert len(seen) == 4
    assert [len(tasks) for tasks in seen] == [1] * 4
    assert set.union(*seen) == {"a", "b"}


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
