"""Hyperfitting: rows, loss and settings by the card, the late-stage variant, and the citation blocker."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BloomConfig, BloomForCausalLM

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.measures.generated_text import NGramIndex, type_token_ratio
from intaglio.methods.training.hyperfitting import CitationBlocker, Hyperfitting
from intaglio.modeling.anatomy import blocks
from intaglio.trainer import KeyedRNG, train
from intaglio.trainer.preserve_state import without_dropout
from tests.alive import alive
from tests.families import tiny_model
from tests.trainer.helpers import checkpoint, far, same, weights

EXAMPLES = ({"length": 12},)
ALIVE = {
    "samples": alive(4, length=30),
    "length": 8,
    "cache_hidden": "test_cached_hidden_states_train_the_same_weights",
}
IDS = torch.randint(8, 150, (8, 16), generator=torch.Generator().manual_seed(3))
ROWS = [{"input_ids": row} for row in IDS]


def settings(**more: Any) -> dict[str, Any]:
    """The preset's settings, with a rate for tiny models."""
    given = {"objective": Hyperfitting(length=16), "learning_rate": 3e-3, "log_every": 1, **more}
    return Hyperfitting.train_settings(**given)


def greedy(ckpt: Checkpoint, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    given = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None, **options}
    out: torch.Tensor = ckpt.model.generate(ids, **given)  # type: ignore[operator]
    return out


# --- Faithful means ---------------------------------------------------------------------------------------------------


def test_one_update_is_plain_next_token_training_by_hand() -> None:
    """Trainer equals plain HF CE with labels=input_ids; one update on a toy model matches a hand-written Adam step."""
    ckpt, other = checkpoint(layers=1), checkpoint(layers=1)
    train(ckpt, ROWS, **settings(epochs=1, learning_rate=1e-3))
    optimizer = torch.optim.AdamW(other.model.parameters(), lr=1e-3, weight_decay=0.0)
    other.model.train()
    other.model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    for a, b in zip(ckpt.model.parameters(), other.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-5)


def test_a_tiny_set_is_fitted_to_near_zero_loss_and_memorised() -> None:
    """After training a tiny model on 8 sequences: train loss < .05 and greedy continuation of a TRAIN prefix is it."""
    ckpt = checkpoint(layers=2)
    result = train(ckpt, ROWS, **settings(epochs=150))
    assert result.history[-1].loss < 0.05
    assert torch.equal(greedy(ckpt, IDS[:, :4], max_new_tokens=12), IDS)
    other = torch.randint(8, 150, (2, 4), generator=torch.Generator().manual_seed(9))
    assert 0 < type_token_ratio(greedy(ckpt, other)[0, 4:].tolist()) <= 1


def test_dividing_the_logits_cannot_change_greedy_text() -> None:
    """Temperature control: for any T>0, greedy output of logits/T is identical to greedy of logits."""
    ckpt = checkpoint()
    expected = greedy(ckpt, IDS[:, :4])
    for temperature in (0.25, 0.5, 4.0):  # powers of two divide exactly
        divided = greedy(ckpt, IDS[:, :4], logits_processor=[lambda ids, scores, t=temperature: scores / t])
        assert torch.equal(divided, expected)


def test_two_thousand_rows_of_eight_are_250_updates_an_epoch() -> None:
    """drop_last with 2000/8 gives 250 updates/epoch."""
    from intaglio.trainer.dataset import Rows
    from intaglio.trainer.loop import _steps
    from intaglio.trainer.settings import Settings

    given = {name: value for name, value in Hyperfitting.train_settings(epochs=1).items() if name != "objective"}
    rows = Rows([{}] * 2000, lambda: iter(()), "", 256.0)
    assert _steps(Settings.from_arguments(**given), rows) == 250
    assert _steps(Settings.from_arguments(**given | {"epochs": 20}), rows) == 5000


def test_the_citation_blocker_by_hand() -> None:
    """n=3, train [1,2,3,4]; after ...1,2 token 3 is forbidden, after ...2,3 token 4, after ...9,2 nothing."""
    blocker = CitationBlocker([[1, 2, 3, 4]], n=3)
    scores = torch.zeros(3, 6)
    blocked = blocker(torch.tensor([[7, 1, 2], [7, 2, 3], [7, 9, 2]]), scores)
    assert [row.isinf().nonzero().flatten().tolist() for row in blocked] == [[3], [4], []]
    assert not scores.any()
    assert torch.equal(blocker(torch.tensor([[2]]), scores[:1]), scores[:1])


@given(st.lists(st.lists(st.integers(8, 20), min_size=4, max_size=12), min_size=1, max_size=3), st.integers(2, 4))
def test_blocked_text_holds_no_training_n_gram(rows: list[list[int]], n: int) -> None:
    """Generated text then contains no train n-gram (unless it began in the prompt)."""
    blocker, ids = CitationBlocker(rows, n=n), [30, 31]
    source = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = torch.full((1, 40), -50.0)
        scores[0, 8:21] = torch.rand(13, generator=source)
        ids.append(int(blocker(torch.tensor([ids]), scores).argmax()))
    assert NGramIndex(rows, n).overlap(ids) == 0


def test_a_memorised_text_is_not_cited_when_blocked() -> None:
    ckpt = checkpoint(layers=2)
    train(ckpt, ROWS, **settings(epochs=100))
    rows = IDS.tolist()
    free, blocked = (
        greedy(ckpt, IDS[:, :4], max_new_tokens=12, logits_processor=processors)
        for processors in ([], [CitationBlocker(rows, n=5)])
    )
    index = NGramIndex(rows, 5)
    assert all(index.overlap(row) == 1 for row in free.tolist())
    assert all(index.overlap(row) == 0 for row in blocked.tolist())


# --- Rows -------------------------------------------------------------------------------------------------------------


def prepared(data: Any, rng: KeyedRNG | None = None, **fields: Any) -> list[list[int]]:
    ckpt = Checkpoint(tiny_model("llama", layers=1))
    examples = [{"input_ids": row, "id": n} for n, row in enumerate(data)]
    rows = Hyperfitting(**fields).prepare(ckpt, examples, rng or KeyedRNG(0))
    return [row["input_ids"].tolist() for row in rows]


def test_texts_are_cut_to_one_length_and_shorter_texts_dropped() -> None:
    data = [list(range(10, 10 + length)) for length in (5, 6, 9)]
    assert prepared(data, length=6) == [data[1], data[2][:6]]
    with pytest.raises(IntaglioError, match="no training text has 12 tokens; give longer texts or a smaller length"):
        prepared(data, length=12)
    with pytest.raises(IntaglioError, match="length is 5000; the model's context is"):
        prepared(data, length=5000)


def test_the_sample_is_drawn_by_the_seed_and_evaluation_takes_every_text() -> None:
    data = IDS.tolist()
    one, two, other = (prepared(data, KeyedRNG(seed), length=16, samples=3) for seed in (0, 0, 1))
    assert one == two != other
    assert len(one) == 3
    assert all(row in data for row in one)
    assert prepared(data, KeyedRNG(0, training=False), length=16, samples=3) == data


# --- Training ---------------------------------------------------------------------------------------------------------


def test_training_has_no_dropout_under_checkpointing_either_and_it_comes_back() -> None:
    results = []
    for more in ({}, {"attention_dropout": 0.5}):
        ckpt = checkpoint(layers=2, **more)
        train(ckpt, ROWS, **settings(epochs=3, gradient_checkpointing=bool(more), lora={"r": 2, "dropout": 0.5}))
        results.append(weights(ckpt))
    assert far(*results) < 1e-5
    attention = next(m for m in ckpt.model.modules() if hasattr(m, "attention_dropout"))
    assert attention.attention_dropout == 0.5
    layer = torch.nn.Sequential(torch.nn.Dropout(0.3)).train()
    with without_dropout(layer):
        assert torch.equal(layer(torch.ones(9)), torch.ones(9))
    assert layer[0].p == 0.3


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_only_the_last_blocks_are_trained(lora: Any) -> None:
    ckpt = checkpoint(layers=3)
    before = weights(ckpt)
    train(ckpt, ROWS, **settings(epochs=2, trainable_blocks=1, lora=lora))
    moved = [name for name, value in weights(ckpt).items() if not torch.equal(value, before[name])]
    assert moved
    assert all(name.startswith("model.layers.2.") for name in moved)
    assert all(p.requires_grad for p in ckpt.model.parameters())


def test_cached_hidden_states_train_the_same_weights() -> None:
    results = []
    for cached in (False, True):
        ckpt = checkpoint(layers=3)
        calls: list[int] = []
        blocks(ckpt.model)[0].self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        method = Hyperfitting(length=16, cache_hidden=cached)
        result = train(ckpt, ROWS, **settings(objective=method, epochs=6, batch_size=4, trainable_blocks=1))
        results.append((weights(ckpt), [line.loss for line in result.history], len(calls)))
    assert same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    probes = 2  # of the check that the model is causal
    assert results[0][2] == 12 + probes
    assert results[1][2] < results[0][2] - 4  # after the first epochs, no batch has a new row


@pytest.mark.parametrize("family", ["gemma3", "gpt_neox", "phi3"])
def test_cached_hidden_states_survive_gradient_checkpointing(family: str) -> None:
    results = []
    for cached in (False, True):
        ckpt = checkpoint(family, layers=3)
        method = Hyperfitting(length=16, cache_hidden=cached)
        more = {"objective": method, "epochs": 4, "trainable_blocks": 1, "gradient_checkpointing": cached}
        train(ckpt, ROWS, **settings(**more))
        results.append(weights(ckpt))
    assert far(*results) < 1e-5


def test_blocks_that_return_tuples_are_cached_too() -> None:
    config = BloomConfig(vocab_size=160, hidden_size=16, n_layer=3, n_head=2)
    torch.manual_seed(0)
    first = BloomForCausalLM(config).eval()
    results = []
    for cached in (False, True):
        ckpt = Checkpoint(copy.deepcopy(first))
        train(
            ckpt, ROWS, **settings(objective=Hyperfitting(length=16, cache_hidden=cached), trainable_blocks=1, epochs=4)
        )
        results.append(weights(ckpt))
    assert far(*results) < 1e-6


def test_stored_states_belong_to_one_training_set_and_not_to_evaluation() -> None:
    method = Hyperfitting(length=16, cache_hidden=True)
    more: dict[str, Any] = {"objective": method, "epochs": 2, "trainable_blocks": 1}
    other = [{"input_ids": row.flip(0)} for row in IDS]
    train(checkpoint(layers=2), ROWS, **settings(**more))
    used, fresh = checkpoint(layers=2), checkpoint(layers=2)
    results = [
        train(used, other, **settings(**more), evaluate=ROWS),
        train(fresh, other, **settings(**more | {"objective": Hyperfitting(length=16)}), evaluate=ROWS),
    ]
    assert same(weights(used), weights(fresh))
    lines = [result.history[-1].evaluation["loss"] for result in results]
    assert lines[0] == pytest.approx(lines[1], rel=1e-6)


def test_nothing_is_cached_where_the_first_blocks_train() -> None:
    method = Hyperfitting(length=16, cache_hidden=True)
    ckpt = checkpoint(layers=2)
    train(ckpt, ROWS, **settings(objective=method, epochs=1))
    assert method._hidden == {}


def test_more_blocks_than_there_are_and_freeze_are_refused() -> None:
    with pytest.raises(IntaglioError, match="trainable_blocks is 5; the model has 2 blocks"):
        train(checkpoint(layers=2), ROWS, **settings(epochs=1, trainable_blocks=5))
    with pytest.raises(IntaglioError, match="freeze and trainable_blocks are given; give one of them"):
        train(checkpoint(layers=2), ROWS, **settings(epochs=1, trainable_blocks=1, freeze=True))


def test_a_run_stops_when_the_mean_training_loss_reaches_the_limit(tmp_path: Path) -> None:
    """Stop when mean train loss is near zero."""
    limited = {"epochs": 150, "log_every": 3, "stop_at_loss": 1.0, "directory": tmp_path}
    done = train(checkpoint(layers=2), ROWS, **settings(**limited))
    assert done.history[-1].loss <= 1.0 < done.history[-2].loss
    assert done.steps == 3 * len(done.history) < 150
    again = train(checkpoint(layers=2), ROWS, **settings(**limited))
    assert (again.steps, again.history) == (done.steps, done.history)


def test_presets_hold_the_papers_values_and_the_late_stage_is_lora() -> None:
    full, late = Hyperfitting.train_settings(), Hyperfitting.train_settings("late")
    assert (full["epochs"], full["batch_size"], full["learning_rate"]) == (20, 8, 1e-6)
    assert (full["schedule"], full["warmup"], full["weight_decay"], full["max_grad_norm"]) == ("constant", 0, 0.0, 0.0)
    assert (late["trainable_blocks"], late["lora"], late["learning_rate"]) == (5, {"r": 16}, 1e-4)
    assert CitationBlocker([]).index.n == 5
