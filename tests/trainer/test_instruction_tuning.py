"""Instruction tuning learns answers and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import intaglio
from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.methods.objectives.meap import MEAP
from intaglio.trainer import InstructionTuning, KeyedRNG
from tests.trainer.helpers import checkpoint, run, same, weights

DRAWS = KeyedRNG(0)
PAIRS = [
    {"prompt": "name the river", "answer": "the north"},
    {"instruction": "name the town", "input": "by the river", "output": "the old town in the north"},
    {"prompt": "what", "completion": "the river"},
]


def rows_of(ckpt: Checkpoint, pairs: Any = PAIRS, **fields: Any) -> list[dict[str, Any]]:
    """What the objective makes of pairs."""
    examples = [{**pair, "id": n} for n, pair in enumerate(pairs)]
    return list(InstructionTuning(**{"length": 48, **fields}).prepare(ckpt, examples, DRAWS))


def test_the_answer_and_the_end_are_learnt_and_nothing_else() -> None:
    ckpt = checkpoint()
    row = rows_of(ckpt, chat=False, pack=False)[1]
    learnt_T = row["labels"] != -100
    assert ckpt.tokenizer.decode(row["input_ids"][learnt_T]) == "the old town in the north</s>"
    assert ckpt.tokenizer.decode(row["input_ids"][~learnt_T]) == "name the town\nby the river"


def test_prompts_go_into_the_chat_template_by_default() -> None:
    ckpt = checkpoint()
    with_it, without = (rows_of(ckpt, chat=chat, pack=False)[0] for chat in (True, False))
    assert ckpt.tokenizer.decode(with_it["input_ids"]).startswith("<s>user\nname the river</s>\n<s>assistant\n")
    assert ckpt.tokenizer.decode(without["input_ids"]).startswith("name the river")


@torch.no_grad()
def test_pairs_that_are_packed_have_the_loss_that_each_has_alone() -> None:
    ckpt = checkpoint()
    ckpt.model.eval()
    packed = rows_of(ckpt, chat=False)
    assert len(packed) == 1
    objective = InstructionTuning(length=48)
    together = objective.loss(ckpt.model, objective.collate(packed, DRAWS)).total
    summed, count = 0.0, 0
    for row in rows_of(ckpt, chat=False, pack=False):
        begin = int((row["labels"] == -100).sum())
        logits_TV = ckpt.model(input_ids=row["input_ids"][None]).logits[0, begin - 1 : -1]
        summed += float(F.cross_entropy(logits_TV, row["input_ids"][begin:], reduction="sum"))
        count += len(row["input_ids"]) - begin
    assert float(together) == pytest.approx(summed / count, abs=1e-5)


def test_a_pair_is_never_split_and_a_long_answer_is_cut() -> None:
    ckpt = checkpoint()
    assert [len(row["lengths"]) for row in rows_of(ckpt, chat=False, length=16)] == [1, 1, 1]
    cut = rows_of(ckpt, [{"prompt": "what", "answer": "the river " * 40}], chat=False, length=16)[0]
    assert len(cut["input_ids"]) == 16
    assert cut["input_ids"][-1] == ckpt.tokenizer.eos_token_id


def test_it_is_what_meap_does_with_nothing_hidden() -> None:
    one, two = checkpoint(), checkpoint()
    # The mask token is one that is there, so that the vocabulary stays.
    off = MEAP(mode="finetuning", enabled=False, length=48, mask_token="<unk>")
    for ckpt, objective in ((one, off), (two, InstructionTuning(length=48))):
        run(ckpt, [{**pair, "id": n} for n, pair in enumerate(PAIRS)], objective=objective, steps=2)
    assert same(weights(one), weights(two))


def test_it_learns_its_pairs() -> None:
    ckpt = checkpoint()
    done = intaglio.train(
        ckpt, PAIRS, objective=intaglio.InstructionTuning(length=48), steps=60, batch_size=1, learning_rate=3e-3
    )
    assert done.history[-1].loss < 0.2 * done.history[0].loss


@pytest.mark.parametrize(
    ("pair", "sentence"),
    [
        ({"prompt": "what"}, "example 1 of the training data has no prompt and answer"),
        ({"prompt": "what", "answer": " "}, "its answer is empty"),
        ({"prompt": "the river " * 40, "answer": "a"}, "its prompt is .* tokens; from 1 to 14 fit beside an answer"),
    ],
)
def test_malformed_pairs_are_one_sentence(pair: dict[str, str], sentence: str) -> None:
    with pytest.raises(IntaglioError, match=sentence):
        rows_of(checkpoint(), [PAIRS[0], pair], chat=False, length=16)


def test_an_encoder_is_refused() -> None:
    with pytest.raises(IntaglioError, match="needs a causal decoder"):
        rows_of(checkpoint("bert"))
