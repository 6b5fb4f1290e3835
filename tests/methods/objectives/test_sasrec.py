"""SASRec predicts each next item; its losses by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import intaglio
from intaglio.errors import IntaglioError
from intaglio.measures.ranking import ranking_metrics
from intaglio.methods.objectives.next_item import ranks
from intaglio.methods.objectives.sasrec import SASRec
from intaglio.trainer import CausalLM, KeyedRNG, train
from tests.methods.objectives.recommenders import recommender, sequences, walks
from tests.trainer.helpers import checkpoint

EXAMPLES = ({"length": 24}, {"length": 24, "loss_type": "softmax"})
ALIVE = {"loss_type": "softmax", "negatives": 3, "length": 8, "window_step": 1.0}
BASE = {"length": 24}
DRAWS = KeyedRNG(0)
ITEMS = walks()


def observe(method: SASRec) -> Any:
    ckpt = checkpoint("llama", layers=1)
    result = intaglio.train(ckpt, [{"input_ids": list(range(8 + n, 68 + n))} for n in range(20)], objective=method,
                            steps=3, batch_size=4, warmup=0, learning_rate=1e-2)  # fmt: skip
    return ckpt.model.state_dict(), [(row.loss, row.parts) for row in result.history]


def rows(method: SASRec) -> list[dict[str, Any]]:
    made = method.prepare(recommender(ITEMS, "gpt2"), [{**s, "id": n} for n, s in enumerate(sequences(ITEMS))], DRAWS)
    return [{**row, "id": n, "epoch": 0} for n, row in enumerate(made)]


@pytest.mark.parametrize("bias", [False, True])
def test_the_loss_by_hand(bias: bool) -> None:
    """-log s(h e_pos) - sum_j log(1 - s(h e_neg)), mean over targets."""
    ckpt, method = recommender(ITEMS, "gpt2"), SASRec(negatives=2)
    if bias:
        ckpt.model.get_output_embeddings().bias = torch.nn.Parameter(torch.randn(ITEMS.vocabulary))
    batch = method.collate(rows(method)[:3], DRAWS)
    logits = ckpt.model(batch["input_ids"]).logits
    total, count = torch.zeros(()), 0
    for b, t in (batch["target"] != -100).nonzero().tolist():
        total = total - F.logsigmoid(logits[b, t, batch["target"][b, t]])
        total = total - F.logsigmoid(-logits[b, t, batch["negatives"][b, t]]).sum()
        count += 1
    assert torch.allclose(method.loss(ckpt.model, batch).total, total / count, atol=1e-5)


def test_the_softmax_is_next_token_training_on_windows() -> None:
    one, two = recommender(ITEMS, "gpt2"), recommender(ITEMS, "gpt2")
    arguments: dict[str, Any] = {"steps": 3, "batch_size": 4}
    train(one, sequences(ITEMS), objective=SASRec(loss_type="softmax"), **arguments)
    train(two, sequences(ITEMS), objective=CausalLM(length=8, pack=False), **arguments)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))


def test_negatives_are_unseen_items_drawn_uniformly() -> None:
    method = SASRec(negatives=50)
    row = rows(method)[0]
    drawn = method.draw_negatives(row, DRAWS)
    assert drawn.shape == (8, 50)
    free = set(range(1, ITEMS.items + 1)) - set(row["seen"].tolist())
    assert set(drawn.flatten().tolist()) == free
    counts = torch.bincount(drawn.flatten())[sorted(free)].double()
    expected = 400 / len(free)
    assert float((counts - expected).abs().max()) < 5 * expected**0.5


def test_while_evaluating_both_losses_are_the_softmax_of_the_last_item() -> None:
    ckpt, held_out = recommender(ITEMS, "gpt2"), KeyedRNG(0, training=False)
    found = []
    for method in (SASRec(), SASRec(loss_type="softmax")):
        batch = method.collate(rows(method)[:4], held_out)
        assert (batch["target"] != -100).sum(1).tolist() == [1] * 4
        found.append(method.loss(ckpt.model, batch).total)
    assert torch.equal(*found)


@pytest.mark.parametrize("loss_type", ["bce", "softmax"])
def test_it_learns_a_cycle(loss_type: Any) -> None:
    ckpt = recommender(ITEMS, "gpt2", width=32)
    train(ckpt, sequences(ITEMS), objective=SASRec(loss_type=loss_type), steps=120, batch_size=32, learning_rate=1e-2)
    assert ranking_metrics(ranks(ckpt, ITEMS.test()), 1)["HR@1"] > 0.6


def test_a_sequence_of_every_item_is_one_sentence() -> None:
    every = [{"input_ids": list(range(1, ITEMS.items + 1))}]
    with pytest.raises(IntaglioError, match="a sequence has every item, so bce has no negatives"):
        train(recommender(ITEMS, "gpt2"), every, objective=SASRec(), steps=1)
