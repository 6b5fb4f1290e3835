"""The loop trains what it should, leaves the rest alone, and says what is wrong in one sentence."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import intaglio
from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.trainer import CausalLM, Example, KeyedRNG, Loss, ModifierSession, TrainingRun, train
from intaglio.trainer.causal_lm import causal_batch, next_token_loss
from intaglio.trainer.history import columns
from tests.families import DECODERS
from tests.trainer.helpers import TEXTS, checkpoint, far, run, same, weights
from tests.trainer.test_resume import Killed, killer


class Owning:
    """Next-token loss scaled by a module of its own, with parts, noting what it was given."""

    def __init__(self) -> None:
        self.scale = nn.Linear(1, 1)
        nn.init.constant_(self.scale.weight, 0.5)
        nn.init.constant_(self.scale.bias, 0.5)
        self.seen: list[tuple[int, int, int, float]] = []

    def modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({"scale": self.scale})

    def collate(self, examples: Sequence[Example], rng: KeyedRNG) -> dict[str, Any]:
        for example in examples:
            draw = float(torch.rand((), generator=rng(example)))
            self.seen.append((example["epoch"], example["id"], example["step"], draw))
        return causal_batch(examples)

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Loss:
        nll = next_token_loss(model, batch).total
        penalty = self.scale(torch.ones(1)).square().sum()
        return Loss(nll + penalty, {"nll": nll, "penalty": penalty})


class Breaking(Owning):
    """A loss that is not a number from the fifth batch on."""

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Loss:
        good = super().loss(model, batch)
        self.seen.append((0, 0, 0, 0.0))
        return Loss(good.total * (float("nan") if len(self.seen) > 4 else 1.0))

    def collate(self, examples: Sequence[Example], rng: KeyedRNG) -> dict[str, Any]:
        return causal_batch(examples)


def test_the_loss_falls_on_a_tiny_corpus() -> None:
    ckpt = intaglio.new("llama", width=32, depth=2, context=64)
    done = run(ckpt, steps=60, batch_size=8, learning_rate=1e-2, evaluate=TEXTS[:4])
    first, last = done.history[0], done.history[-1]
    assert first.loss > 5.0 > 2.5 > last.loss
    assert last.evaluation["loss"] < 2.5
    assert [line.step for line in done.history] == list(range(1, 61))


def test_two_fresh_runs_are_equal_and_another_seed_is_not() -> None:
    one, two, three = checkpoint(), checkpoint(), checkpoint()
    histories = [run(one, steps=4).history, run(two, steps=4).history, run(three, steps=4, seed=1).history]
    assert histories[0] == histories[1] != histories[2]
    assert same(weights(one), weights(two))
    assert not same(weights(one), weights(three))


def test_batches_and_accumulation_split_the_same_step() -> None:
    data = [list(range(3, 5 + n)) for n in (1, 9, 3, 14, 2, 2, 11, 5, 7)]  # a batch may hold 4 targets or 40
    found = []
    for batch_size, accumulate in ((8, 1), (4, 2), (1, 8)):
        ckpt = checkpoint()
        rows = CausalLM(length=16, pack=False)
        done = run(
            ckpt,
            data,
            objective=rows,
            batch_size=batch_size,
            gradient_accumulation_steps=accumulate,
            steps=4,
            evaluate=data,
        )
        found.append((weights(ckpt), [(line.loss, line.evaluation.get("loss", 0.0)) for line in done.history]))
    for other, losses in found[1:]:
        assert far(found[0][0], other) < 1e-5
        for one, two in zip(losses, found[0][1], strict=True):
            assert one == pytest.approx(two, abs=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_every_decoder_family_trains(family: str) -> None:
    ckpt = checkpoint(family)
    before = weights(ckpt)
    done = run(ckpt, steps=2, warmup=0)
    assert len(done.history) == 2
    assert not same(before, weights(ckpt))


def test_what_the_objective_owns_is_trained_and_its_parts_are_logged() -> None:
    objective, ckpt = Owning(), checkpoint()
    before = objective.scale.weight.clone()
    done = run(ckpt, objective=objective, log_every=4, gradient_accumulation_steps=2)
    assert not torch.equal(before, objective.scale.weight)
    for line in done.history:
        assert set(line.parts) == {"nll", "penalty"}
        assert line.loss == pytest.approx(sum(line.parts.values()), rel=1e-5)


def test_a_frozen_model_stays_and_what_the_objective_owns_is_attached(tmp_path: Any) -> None:
    objective, ckpt = Owning(), checkpoint(dtype=torch.bfloat16)
    objective.slug = "owning"
    before = weights(ckpt)
    run(ckpt, objective=objective, freeze=True, steps=3, learning_rate=1e-2)
    assert same(before, weights(ckpt))
    assert all(p.requires_grad for p in ckpt.model.parameters())
    attached = ckpt.attachments["owning"]
    assert torch.equal(attached.tensors["scale.weight"], objective.scale.weight)
    assert float(objective.scale.weight.detach()) != 0.5
    ckpt.save(tmp_path / "out")
    back = intaglio.load(tmp_path / "out")
    assert torch.equal(back.attachments["owning"].tensors["scale.bias"], objective.scale.bias)
    with pytest.raises(IntaglioError, match="nothing is left to train"):
        run(checkpoint(), freeze=True)


def test_a_fit_may_leave_no_note() -> None:
    objective, ckpt = Owning(), checkpoint()
    objective.slug = "owning"
    run(ckpt, objective=objective, freeze=True, steps=1, note=False)
    assert (ckpt.record.steps, ckpt.attachments) == ([], {})


def test_a_run_shows_how_it_goes_while_it_goes(tmp_path: Any) -> None:
    pages: list[str] = []

    def look(done: int, total: int, what: str) -> None:
        if (tmp_path / "run" / "progress.html").is_file():
            pages.append((tmp_path / "run" / "progress.html").read_text(encoding="utf-8"))

    run(checkpoint(), directory=tmp_path / "run", progress=look, evaluate=TEXTS[:3])
    assert "Step 2 of 8" in pages[0]
    assert "to go" in pages[0]
    last = (tmp_path / "run" / "progress.html").read_text(encoding="utf-8")
    assert "Step 8 of 8" in last
    assert "held out" in last
    assert "<script" not in last


def test_tensorboard_gets_every_part_where_the_user_wants_it(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    run(checkpoint(), objective=Owning(), report_to=["tensorboard"], steps=3, evaluate=TEXTS[:2], evaluate_every=1)
    run(checkpoint(), report_to=["tensorboard"], steps=3, log_directory="elsewhere")
    for folder, parts in (("runs", {"train/part/nll", "train/part/penalty"}), ("elsewhere", set())):
        events = EventAccumulator(str(tmp_path / folder)).Reload()
        names = set(events.Tags()["scalars"])
        assert names >= parts | {"train/loss", "train/learning_rate"}
        assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]


class Digits:
    """Classification of vectors that are no tokens."""

    def modules(self) -> nn.ModuleDict:
        return nn.ModuleDict()

    def collate(self, examples: Sequence[Example], rng: KeyedRNG) -> dict[str, Any]:
        return {"x": torch.stack([e["x"] for e in examples]), "y": torch.tensor([e["y"] for e in examples])}

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Loss:
        scores = model(batch["x"])
        return Loss(nn.functional.cross_entropy(scores, batch["y"]), outputs=scores)


class Memory(ModifierSession):
    """Remembers the predictions for each example, as early-learning regularization does."""

    def attach(self, run: TrainingRun) -> Memory:
        assert run.rows is not None
        self.table = torch.zeros(run.rows, 3)
        return self

    def extra_loss(self, model: nn.Module, batch: dict[str, Any], outputs: Any) -> Loss:
        probs = outputs.softmax(-1)
        self.table[batch["id"]] = 0.7 * self.table[batch["id"]] + 0.3 * probs.detach()
        term = (1 - (self.table[batch["id"]] * probs).sum(-1)).log().mean()
        return Loss(3 * term, {"memory": term})

    def state_dict(self) -> dict[str, Any]:
        return {"table": self.table}

    def load_state_dict(self, state: Any) -> None:
        self.table = state["table"]


def test_rows_need_not_be_tokens_nor_models_language_models(tmp_path: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    data = [{"x": torch.randn(4, generator=draw) + n % 3, "y": n % 3} for n in range(30)]
    settings = {"objective": Digits(), "optimizer": "sgd", "learning_rate": 0.05, "epochs": 5, "steps": None}

    def ran(**more: Any) -> tuple[Any, Memory, dict[str, Any]]:
        torch.manual_seed(1)
        memory, net = Memory(), nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        return run(net, data, modifiers=[memory], **settings, **more), memory, weights(Checkpoint(net))

    whole, memory, end = ran()
    assert (whole.steps, whole.tokens) == (75, 150)
    assert whole.history[-1].loss < whole.history[0].loss
    assert torch.allclose(memory.table.sum(1), torch.full((30,), 1 - 0.7**5))
    with pytest.raises(Killed):
        ran(directory=tmp_path, save_every=10, progress=killer(47))
    again, other, there = ran(directory=tmp_path, save_every=10)
    assert again.history == whole.history
    assert torch.equal(memory.table, other.table)
    assert same(there, end)


def test_a_plain_module_is_evaluated_as_it_is_and_leaves_no_record() -> None:
    net = nn.Sequential(nn.Linear(4, 3))
    data = [{"x": torch.randn(4), "y": n % 3} for n in range(6)]
    seen: list[Any] = []

    def judge(model: Any) -> dict[str, float]:
        seen.append((model is net, model.training))
        return {"loss": 1.0}

    done = run(net, data, objective=Digits(), steps=2, evaluate=judge, evaluate_every=1)
    assert seen == [(True, False)] * 2
    assert net.training
    assert [line.evaluation for line in done.history] == [{"loss": 1.0}] * 2
    held_out = run(net, data, objective=Digits(), steps=1, evaluate=data).history[-1].evaluation
    assert 0 < held_out["loss"] < 5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "objective is missing; training Linear needs one"),
        ({"objective": Digits(), "gradient_checkpointing": True}, "Linear has no gradient checkpointing"),
        ({"objective": Digits(), "freeze": True}, "nothing is left to train"),
    ],
)
def test_a_plain_module_that_cannot_be_trained_so_is_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(IntaglioError, match=sentence):
        train(nn.Linear(4, 3), [{"x": torch.randn(4), "y": 0}], steps=1, batch_size=1, **arguments)


def test_draws_are_keyed_by_seed_epoch_and_example() -> None:
    by_key: dict[tuple[int, int], float] = {}
    for batch_size, accumulate in ((2, 1), (1, 2)):
        objective = Owning()
        run(
            checkpoint(),
            TEXTS[:3],
            objective=objective,
            batch_size=batch_size,
            gradient_accumulation_steps=accumulate,
            steps=6,
        )
        seen = objective.seen[:12]  # the loader reads ahead
        assert [step for _, _, step, _ in seen] == [n // 2 for n in range(12)]
        for epoch in range(4):
            assert sorted(place for e, place, _, _ in seen if e == epoch) == [0, 1, 2]
        for epoch, place, _, draw in seen:
            assert by_key.setdefault((epoch, place), draw) == draw
    assert len(set(by_key.values())) == 12


def test_epochs_and_tokens_give_whole_steps() -> None:
    data = torch.arange(3, 3 + 10 * 8).reshape(10, 8)
    rows = CausalLM(length=8)
    assert run(checkpoint(), data, objective=rows, steps=None, epochs=2, batch_size=3).steps == 7
    done = run(checkpoint(), data, objective=rows, steps=None, tokens=100, batch_size=3)
    assert (done.steps, done.tokens) == (4, 96)


def test_modes_gradients_and_generators_are_left_as_they_were() -> None:
    ckpt = checkpoint()
    frozen = ckpt.model.get_input_embeddings().weight.requires_grad_(False)
    ckpt.model.model.layers[0].train()
    modes = {name: module.training for name, module in ckpt.model.named_modules()}
    before, cache = frozen.clone(), ckpt.model.config.use_cache
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    expected = (torch.rand(3), random.random(), np.random.rand())
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    run(ckpt, evaluate=lambda ckpt: {"draw": float(torch.rand(()))})
    assert torch.equal(torch.rand(3), expected[0])
    assert (random.random(), np.random.rand()) == expected[1:]
    assert {name: module.training for name, module in ckpt.model.named_modules()} == modes
    assert not frozen.requires_grad
    assert torch.equal(frozen, before)
    assert ckpt.model.config.use_cache == cache
    assert all(p.grad is None for p in ckpt.model.parameters())
    assert "forward" not in vars(ckpt.model)


def test_the_record_says_what_was_done() -> None:
    ckpt = checkpoint()
    done = run(ckpt, seed=3)
    (step,) = ckpt.record.steps
    assert (step.slug, step.seed) == ("train", 3)
    assert step.parameters["objective"] == {"CausalLM": {"length": 24, "pack": True}}
    assert step.parameters["steps"] == 8
    curve = columns(done.history)
    data = step.chosen.pop("data")
    assert step.chosen == {"steps": 8, "tokens": done.tokens, "curve": curve}
    assert (data["rows"], len(data["digest"])) == (49, 64)


def test_evaluation_by_a_function_and_progress() -> None:
    modes: list[bool] = []
    seen: list[tuple[int, int]] = []

    def measure(ckpt: Any) -> dict[str, float]:
        modes.append(ckpt.model.training)
        return {"answer": 42.0}

    done = run(
        checkpoint(), evaluate=measure, evaluate_every=3, progress=lambda step, total, what: seen.append((step, total))
    )
    assert [line.step for line in done.history if line.evaluation] == [3, 6, 8]
    assert done.history[-1].evaluation == {"answer": 42.0}
    assert modes == [False] * 3
    assert seen == [(n, 8) for n in range(1, 9)]


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_state(tmp_path: Any) -> None:
    ckpt = checkpoint()
    with pytest.raises(
        IntaglioError, match=r"the loss is nan at step 5; the last good state is .*checkpoint-3"
    ) as caught:
        run(ckpt, objective=Breaking(), directory=tmp_path, save_every=3)
    assert "\n" not in str(caught.value)
    assert all(bool(torch.isfinite(p).all()) for p in ckpt.model.parameters())
    assert (tmp_path / "checkpoint-3" / "loop.json").is_file()
    with pytest.raises(IntaglioError, match="no earlier state was saved"):
        run(checkpoint(), objective=Breaking())
    assert ckpt.record.steps == []


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Any) -> None:
    with pytest.raises(IntaglioError, match="not finite after step 1"):
        run(
            checkpoint(),
            directory=tmp_path,
            save_every=1,
            learning_rate=3e38,
            warmup=0,
            schedule="constant",
            max_grad_norm=0,
        )
    assert not list(tmp_path.glob("checkpoint-*/loop.json"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"steps": None}, "exactly one of steps, tokens and epochs sets the length of training; none is given"),
        ({"epochs": 1}, "steps and epochs are given"),
        ({"steps": 0}, "steps: 0 is not accepted, it should be greater than or equal to 1"),
        ({"steps": "3"}, "steps: '3' is not accepted, it should be a valid integer"),
        ({"learning_rate": 0}, "learning_rate: 0 is not accepted, it should be greater than 0"),
        ({"learning_rate": float("nan")}, "learning_rate: nan is not accepted"),
        ({"schedule": "cosin"}, "schedule: 'cosin' is not accepted, it should be 'cosine', 'linear' or 'constant'"),
        ({"schedule": "linear", "final_share": 0.1}, "only the schedule cosine ends above zero"),
        ({"warmup": 1.5}, "warmup is 1.5; a share of the steps below 1"),
        ({"precision": "float8"}, "precision: 'float8' is not accepted"),
        ({"learning_rat": 1.0}, "learning_rat: there is no such field here; did you mean learning_rate?"),
        ({"data": []}, "the training data is empty"),
        ({"data": [[5]]}, "the training data is empty"),
        ({"data": 3}, "the training data is int"),
        ({"data": [3]}, "example 0 of the training data is int"),
        ({"data": [{"text": 3}]}, "a text that is int"),
        ({"data": "no-such-texts"}, "no file, no folder"),
        ({"objective": 3}, "objective is int; it needs modules, collate and loss"),
        ({"evaluate": []}, "is empty"),
    ],
)
def test_bad_input_is_one_sentence(arguments: dict[str, Any], sentence: str) -> None:
    data = arguments.pop("data", TEXTS)
    ckpt = checkpoint()
    before = weights(ckpt)
    with pytest.raises(IntaglioError, match=sentence) as caught:
        run(ckpt, data, **{**({} if "objective" in arguments else {"objective": CausalLM()}), **arguments})
    assert "\n" not in str(caught.value)
    assert same(before, weights(ckpt))


def test_half_precision_weights_and_texts_without_a_tokenizer_are_refused() -> None:
    half = checkpoint(dtype=torch.bfloat16)
    with pytest.raises(IntaglioError, match="too coarse for small updates"):
        run(half)
    bare = checkpoint()
    bare.tokenizer = None
    with pytest.raises(IntaglioError, match="has no tokenizer"):
        run(bare)
    assert train(bare, torch.arange(16).reshape(2, 8), steps=1, batch_size=1).steps == 1


def test_several_processes_must_share_a_batch_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(IntaglioError, match="batch_size is 2; it must be a multiple of the 3 processes"):
        run(checkpoint())
