"""ELR: the loss and its gradient by hand, the table, ELR+'s mixture, averages and second network, the report."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from intaglio.checkpoint import Checkpoint, load
from intaglio.checkpoint.from_scratch import new_image_model
from intaglio.errors import IntaglioError
from intaglio.methods.base import Cost, Workload
from intaglio.methods.training.elr import (
    CLAMP,
    ELR,
    Targets,
    clamped_softmax,
    predict,
    ramp,
    regularizer,
    second_network,
)
from intaglio.recipe.schema import Recipe
from intaglio.trainer import EpochCollator, KeyedRNG, ObjectiveModule, TrainingRun, train, training_rows
from intaglio.trainer.classification import Classification, Classified, classifier_outputs
from intaglio.trainer.label_report import suspicious_labels
from intaglio.trainer.mixing import draw_rows, draw_shares
from intaglio.trainer.rng import generator
from tests.alive import alive
from tests.trainer.helpers import LABELLED, checkpoint, far, run, same, weights
from tests.trainer.test_resume import Killed, killer

EXAMPLES = ({}, {"networks": 2, "warmup_steps": 1})
PLUS = {"networks": 2}
ALIVE = {
    "beta": 0.9,
    "regularization_weight": 1.0,
    "ramp_steps": 10,
    "warmup_steps": 2,
    "networks": "test_two_networks_take_the_steps_of_the_card",
    "mixup_alpha": alive(0.2, **PLUS),
    "ema_decay": alive(0.5, **PLUS),
    "ema_schedule": alive("average", **PLUS),
    "ema_ramp_steps": alive(40, **PLUS),
    "refine_targets": alive(True, **PLUS),
    "second_network": "test_the_second_network_is_drawn_anew",
}
SETTINGS: dict[str, Any] = {"batch_size": 4, "learning_rate": 1e-2, "warmup": 0, "log_every": 1, "max_grad_norm": 0.0}


class Net(nn.Module):
    """Two layers with batch statistics between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.last(self.norm(self.first(pixels.flatten(1))).relu())
        return out


def net(seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net()


def rows(count: int = 24) -> list[dict[str, Any]]:
    draws = torch.Generator().manual_seed(1)
    return [{"pixel_values": torch.randn(1, 2, 3, generator=draws), "label": n % 3} for n in range(count)]


def trained(method: ELR | None, model: Any = None, data: Any = None, **more: Any) -> tuple[Checkpoint, Any]:
    ckpt = Checkpoint(net()) if model is None else model
    given = {**SETTINGS, "steps": 6, **more}
    modifiers = [] if method is None else [method]
    return ckpt, train(ckpt, data or rows(), objective=Classification(), modifiers=modifiers, **given)


def session(method: ELR, model: nn.Module, data: list[dict[str, Any]], **more: Any) -> Any:
    goal = Classification()
    run = TrainingRun(
        Checkpoint(model), 8, len(data), 0, lambda batch, other=None: goal.loss(other or model, batch), examples=data,
        **more,
    )  # fmt: skip
    return method.attach(run)


def batch_of(data: list[dict[str, Any]], ids: list[int]) -> dict[str, Any]:
    batch = Classification().collate([data[n] for n in ids], KeyedRNG(0))
    return {**{name: batch[name] for name in ("pixel_values", "labels")}, "id": torch.tensor(ids)}


def term(method: ELR, logits: Tensor, ids: list[int], table: Targets | None = None) -> Any:
    """The term of a batch of logits, by a session of its own."""
    made = session(method, net(), rows())
    if table is not None:
        made.tables = [table]
    made.before_step(1, {})
    return made.extra_loss(net(), {"id": torch.tensor(ids)}, Classified(logits, None, torch.zeros_like(logits))), made


# --- Faithful means: ELR ----------------------------------------------------------------------------------------------


def test_without_weight_the_loss_is_cross_entropy_and_the_table_moves() -> None:
    """lambda = 0: loss equals cross-entropy exactly, t still updates."""
    plain, history = trained(None)
    ckpt, result = trained(ELR(regularization_weight=0.0))
    assert [line.loss for line in result.history] == [line.loss for line in history.history]
    assert same(weights(ckpt), weights(plain))
    assert float(ckpt.attachments["elr"].tensors["targets"].sum()) > 0


@pytest.mark.parametrize(("beta", "share"), [(0.0, 1.0), (1.0, 0.0)])
def test_the_ends_of_beta(beta: float, share: float) -> None:
    """beta = 0: t equals current softmax. beta = 1: t stays 0 and the term is log(1) = 0."""
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    loss, made = term(ELR(beta=beta), logits, [3, 0, 2, 5])
    assert torch.allclose(made.tables[0].table[[3, 0, 2, 5]], share * logits.softmax(1), atol=1e-3)
    assert (float(loss.total) == 0.0) == (beta == 1.0)


def test_the_worked_example() -> None:
    """From t = 0, beta 0.7, logits (2, 0, -1), label 1, lambda 3: the card's numbers."""
    logits = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    loss, made = term(ELR(), logits, [7])
    assert torch.allclose(
        clamped_softmax(logits)[0].detach().float(), torch.tensor([0.8438, 0.1142, 0.0420]), atol=5e-5
    )
    assert torch.allclose(made.tables[0].table[7], torch.tensor([0.2531, 0.0343, 0.0126]), atol=5e-5)
    cross = F.cross_entropy(logits, torch.tensor([1]))
    assert float(cross.detach()) == pytest.approx(2.169846, abs=1e-6)
    assert float(loss.parts["elr"].detach()) == pytest.approx(-0.245950, abs=1e-6)
    total = cross + loss.total
    assert float(total.detach()) == pytest.approx(1.431997, abs=1e-6)
    total.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert torch.allclose(logits.grad[0].float(), torch.tensor([0.7302, -0.8053, 0.0751]), atol=5e-5)


@given(st.integers(2, 6), st.floats(0.0, 0.99), st.floats(0.0, 7.0), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_the_gradient_is_the_closed_form(classes: int, beta: float, weight: float, seed: int) -> None:
    """Autograd gradient equals the closed form to 1e-6. No gradient reaches t."""
    draws = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, classes, generator=draws, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, classes, (3,), generator=draws)
    loss, made = term(ELR(beta=beta, regularization_weight=weight), logits, [0, 1, 2])
    (F.cross_entropy(logits, labels) + loss.total).backward()  # type: ignore[no-untyped-call]
    t, p = made.tables[0].table[:3].double(), logits.detach().softmax(1)
    assert not made.tables[0].table.requires_grad
    inner = (t * p).sum(1, keepdim=True)
    extra = weight * p / (1 - inner) * (inner - t)
    expected = (p - F.one_hot(labels, classes) + extra) / 3
    assert torch.allclose(logits.grad, expected, atol=1e-6)


@given(st.integers(1, 6), st.sampled_from([0.25, 0.7, 0.9]))
@settings(max_examples=15, deadline=None)
def test_the_table_after_some_visits(visits: int, beta: float) -> None:
    """Rows of t not in the batch are bit-unchanged; row sums after k visits = 1 - beta^k."""
    targets, draws = Targets(5, beta), torch.Generator().manual_seed(visits)
    targets.update(torch.tensor([4]), torch.rand(1, 3, generator=draws))
    other = targets.table[4].clone()
    for _ in range(visits):
        targets.update(torch.tensor([1, 3]), torch.rand(2, 3, generator=draws))
    assert torch.equal(targets.table[4], other)
    assert not targets.table[[0, 2]].any()
    assert torch.allclose(targets.table[[1, 3]].sum(1), torch.full((2,), 1 - beta**visits), atol=1e-5)


def test_the_clamp_keeps_the_logarithm_finite() -> None:
    """<t,p> <= 1 - 1e-4, so the term is >= log(1e-4) = -9.21 per example."""
    logits = torch.tensor([[200.0, 0.0, -200.0]])
    probs = clamped_softmax(logits)
    assert probs.min() == CLAMP
    targets = Targets(1, 0.5)
    for _ in range(60):
        t = targets.update(torch.tensor([0]), probs)
    assert math.log(1e-4) - 1e-3 <= float(regularizer(t, probs)) < -7.5


def test_the_table_moves_before_the_loss() -> None:
    table = Targets(24, 0.5)
    table.update(torch.tensor([2]), torch.tensor([[0.0, 1.0, 0.0]]))
    logits = torch.tensor([[3.0, 0.0, 0.0]])
    loss, made = term(ELR(beta=0.5, regularization_weight=2.0), logits, [2], table)
    p = logits.softmax(1)
    expected = torch.tensor([[0.0, 0.25, 0.0]]) + 0.5 * p
    assert torch.allclose(made.tables[0].table[[2]], expected, atol=1e-3)
    assert float(loss.total) == pytest.approx(2 * float((1 - (expected * p).sum()).log()), abs=1e-3)


def test_warm_up_fills_the_table_without_the_term() -> None:
    plain, _ = trained(None, steps=2)
    ckpt, result = trained(ELR(warmup_steps=2), steps=2)
    assert same(weights(ckpt), weights(plain))
    assert "elr" not in result.history[-1].parts
    assert int((ckpt.attachments["elr"].tensors["targets"].sum(1) > 0).sum()) == 8
    assert "elr" in trained(ELR(warmup_steps=2), steps=3)[1].history[-1].parts


def test_warm_up_of_two_networks_is_plain_training_of_both() -> None:
    data = rows()
    made = session(ELR.plus(warmup_steps=1), net(), data)
    batch, first, second = batch_of(data, [1, 5, 6, 8]), net(), copy.deepcopy(made.second)
    made.before_step(1, batch)
    assert made.change_batch(made.run.model, batch) is batch
    loss = made.extra_loss(made.run.model, batch, Classification().loss(made.run.model, batch).outputs)
    x, labels = batch["pixel_values"], batch["labels"]
    torch.testing.assert_close(loss.total, F.cross_entropy(second(x), labels))
    for targets, network in zip(made.tables, (first, second), strict=True):
        torch.testing.assert_close(targets.table[[1, 5, 6, 8]], 0.3 * network(x).softmax(1).detach())
    with torch.no_grad():
        made.second.last.bias.add_(1.0)
    made.after_step(1)
    assert torch.equal(made.averages[1].last.bias, second.last.bias)


def test_the_seed_draws_the_second_network_and_the_mixtures() -> None:
    data = rows()
    made = session(ELR.plus(), net(), data)
    other: Any = ELR.plus().attach(dataclasses.replace(made.run, seed=1))
    assert not torch.equal(made.second.last.weight, other.second.last.weight)
    batch = batch_of(data, [4, 9, 2, 11])
    for each in (made, other):
        each.before_step(1, batch)
    assert not torch.equal(*(each.change_batch(made.run.model, batch)["targets"] for each in (made, other)))


def test_the_ramp() -> None:
    """sigmoid ramp: r(0) = e^-5 = 0.00674, r(T/2) = e^-1.25 = 0.2865, r(T) = 1."""
    assert [ramp(step, 8) for step in (0, 4, 8, 20)] == pytest.approx([math.exp(-5), math.exp(-1.25), 1, 1])
    assert ramp(3, 0) == 1.0
    logits = torch.tensor([[1.0, 0.0, 0.0]])
    whole, _ = term(ELR(), logits, [0])
    part, _ = term(ELR(ramp_steps=2), logits, [0])
    assert float(part.total) == pytest.approx(math.exp(-1.25) * float(whole.total), rel=1e-5)


# --- Faithful means: ELR+ ---------------------------------------------------------------------------------------------


def test_without_mixing_the_batch_and_targets_are_plain() -> None:
    """ELR+ with alpha=0 gives l=1, q = h[idx], y' = one-hot."""
    data = rows()
    made = session(ELR.plus(mixup_alpha=0.0), net(), data)
    batch = batch_of(data, [4, 9, 2])
    made.before_step(1, batch)
    changed = made.change_batch(made.run.model, batch)
    assert torch.equal(changed["pixel_values"], batch["pixel_values"])
    assert torch.equal(changed["targets"], F.one_hot(batch["labels"], 3).float())
    assert torch.equal(made.q_BK, made.tables[0].table[[4, 9, 2]])


def test_the_mixture_of_a_batch() -> None:
    """q lies in the convex hull of the two rows; inputs and labels share its rate, at least 1/2, and its pairs."""
    data = rows()
    made = session(ELR.plus(beta=0.5), net(), data)
    batch = batch_of(data, [4, 9, 2, 11])
    made.before_step(3, batch)
    peer = copy.deepcopy(made.averages[1])
    changed = made.change_batch(made.run.model, batch)
    rate, pairs = made.mixture.shares_BK[0, 0], made.mixture.rows_BK[:, 1]
    assert 0.5 <= rate < 1
    assert torch.allclose(
        changed["pixel_values"], rate * batch["pixel_values"] + (1 - rate) * batch["pixel_values"][pairs]
    )
    one_hot = F.one_hot(batch["labels"], 3).float()
    assert torch.allclose(changed["targets"], rate * one_hot + (1 - rate) * one_hot[pairs])
    h = made.tables[0].table[[4, 9, 2, 11]]
    assert torch.allclose(made.q_BK, rate * h + (1 - rate) * h[pairs])
    assert torch.allclose(h, 0.5 * peer(batch["pixel_values"]).softmax(1).detach(), atol=1e-6)  # unmixed, unclamped
    again = session(ELR.plus(beta=0.5), net(), data)
    again.before_step(3, batch)
    assert torch.equal(again.change_batch(again.run.model, batch)["targets"], changed["targets"])
    again.before_step(4, batch)
    assert not torch.equal(again.change_batch(again.run.model, batch)["targets"], changed["targets"])


def test_refined_targets_are_multiplied_by_q() -> None:
    data = rows()
    made, plain = (session(ELR.plus(refine_targets=wanted), net(), data) for wanted in (True, False))
    batch = batch_of(data, [4, 9, 2, 11])
    for each in (made, plain):
        each.before_step(1, batch)
    refined, before = (each.change_batch(each.run.model, batch)["targets"] for each in (made, plain))
    product = before * plain.q_BK
    assert torch.allclose(refined, product / product.sum(1, keepdim=True))


def test_the_averages_of_the_weights() -> None:
    """EMA with a=0 copies weights; only parameters are averaged."""
    made = session(ELR.plus(ema_decay=0.0), net(), rows())
    made.before_step(1, {})
    with torch.no_grad():
        made.second.first.weight.add_(1.0)
        made.second.norm.running_mean.add_(1.0)
    made.after_step(1)
    assert torch.equal(made.averages[1].first.weight, made.second.first.weight)
    assert not made.averages[1].norm.running_mean.any()
    made = session(ELR.plus(ema_decay=0.5, ema_ramp_steps=0), net(), rows())
    made.before_step(1, {})
    with torch.no_grad():
        made.run.model.last.bias.fill_(1.0)
        made.averages[0].last.bias.fill_(3.0)
    made.after_step(1)
    assert torch.allclose(made.averages[0].last.bias, torch.full((3,), 2.0))


def test_the_schedules_of_the_decay() -> None:
    for method, step, expected in [
        (ELR.plus(ema_ramp_steps=8), 3, 0.997 * math.exp(-1.25)),
        (ELR.plus(), 1, 0.997 * math.exp(-1.25)),  # half of 8 steps
        (ELR.plus(ema_ramp_steps=8, warmup_steps=2), 5, 0.997 * math.exp(-1.25)),
        (ELR.plus(ema_schedule="average"), 3, 0.75),
        (ELR.plus(ema_schedule="average", ema_decay=0.5), 3, 0.5),
        (ELR.paper(networks=2), 1, 0.997 * ramp(2, 40_000)),
    ]:
        made = session(method, net(), rows())
        made.before_step(step, {})
        assert made.ema_decay() == pytest.approx(expected)


def test_two_networks_take_the_steps_of_the_card() -> None:
    data, method = rows(), ELR.plus(beta=0.6, regularization_weight=2.0)
    made = session(method, net(), data)
    batch = batch_of(data, [1, 5, 6, 8])
    made.before_step(1, batch)
    model, second = made.run.model, made.second
    changed = made.change_batch(model, batch)
    with made.forward_context(model, changed):
        outputs = Classification().loss(model, changed).outputs
    first = regularizer(made.q_BK, clamped_softmax(outputs.logits))
    mirror, averages = copy.deepcopy(second), copy.deepcopy(made.averages)
    loss = made.extra_loss(model, changed, outputs)
    rng = generator(0, "elr", 1, 1, 1, 5, 6, 8)
    pairs = draw_rows(4, 2, rng)[:, 1]
    rate = draw_shares(4, 2, 1.0, rng, largest_first=True)[0, 0]
    x, y = batch["pixel_values"], F.one_hot(batch["labels"], 3).float()
    h = 0.4 * averages[0](x).softmax(1).detach()
    q = rate * h + (1 - rate) * h[pairs]
    logits = mirror(rate * x + (1 - rate) * x[pairs])
    cross = -((rate * y + (1 - rate) * y[pairs]) * logits.log_softmax(1)).sum(1).mean()
    expected = 2 * first + cross + 2 * regularizer(q, clamped_softmax(logits))
    assert float(loss.total.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    assert float(loss.parts["second_network"].detach()) == pytest.approx(float(cross.detach()), abs=1e-5)
    assert torch.allclose(made.tables[1].table[[1, 5, 6, 8]], h, atol=1e-6)


def test_both_networks_are_trained_at_the_run_s_decay() -> None:
    made = session(ELR.plus(), net(), rows(), weight_decay=0.25)
    groups = made.param_groups()
    assert [group["weight_decay"] for group in groups] == [0.25, 0.0]
    assert sum(len(group["params"]) for group in groups) == len(list(net().parameters()))
    assert all(p.ndim > 1 for p in groups[0]["params"])
    ckpt, _ = trained(ELR.plus(), steps=4)
    start, second = second_network(net(), 0, "head").state_dict(), ckpt.attachments["elr"].tensors
    assert not torch.equal(second["network.first.weight"], start["first.weight"])
    assert not torch.equal(second["network.norm.running_mean"], start["norm.running_mean"])


def test_the_second_network_is_drawn_anew() -> None:
    first = net()
    for drawn, changed in [("head", {"last"}), ("all", {"first", "last"})]:
        other = second_network(first, 0, drawn)  # type: ignore[arg-type]
        assert {name for name in ("first", "last")
                if not torch.equal(getattr(other, name).weight, getattr(first, name).weight)} == changed  # fmt: skip
        assert same(other.state_dict(), second_network(first, 0, drawn).state_dict())  # type: ignore[arg-type]
        assert not same(other.state_dict(), second_network(first, 1, drawn).state_dict())  # type: ignore[arg-type]
    ckpt = checkpoint("bert", layers=1)
    training_rows(Classification(), ckpt, LABELLED, KeyedRNG(0))
    stock = ckpt.model
    other = second_network(stock, 0, "head")
    differing = {n for n, p in other.named_parameters() if not torch.equal(p, stock.get_parameter(n))}
    assert differing == {"classifier.weight"}
    whole = second_network(stock, 0, "all")
    assert not torch.equal(whole.get_input_embeddings().weight, stock.get_input_embeddings().weight)  # type: ignore


def test_texts_mix_at_their_embeddings() -> None:
    ckpt = checkpoint("bert", layers=1)
    data = training_rows(Classification(), ckpt, LABELLED[:4], KeyedRNG(0))
    goal, model = Classification(), ckpt.model.eval()
    made = session(ELR.plus(), model, data)
    collated = goal.collate(data, KeyedRNG(0))
    batch = {**{name: value for name, value in collated.items() if name != "weight"}, "id": torch.arange(4)}
    made.before_step(1, batch)
    changed = made.change_batch(model, batch)
    assert torch.equal(changed["input_ids"], batch["input_ids"])
    seen: list[Tensor] = []
    handle = model.bert.embeddings.word_embeddings.register_forward_hook(lambda m, a, out: seen.append(out))
    with made.forward_context(model, changed):
        mixed, _ = classifier_outputs(model, changed)
    handle.remove()
    plain, _ = classifier_outputs(model, changed)
    assert not torch.allclose(mixed, plain, atol=1e-4)
    assert len(seen) == 1


# --- Runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [ELR(), ELR.plus(warmup_steps=1)])
def test_killed_training_resumes_bit_for_bit(method: ELR, tmp_path: Path) -> None:
    whole, unbroken = trained(method, save_every=1)
    with pytest.raises(Killed):
        trained(method, save_every=1, directory=tmp_path, progress=killer(4))
    again, resumed = trained(method, save_every=1, directory=tmp_path)
    assert resumed.history == unbroken.history
    assert resumed.reports == unbroken.reports
    assert same(weights(again), weights(whole))
    assert same(again.attachments["elr"].tensors, whole.attachments["elr"].tensors)


def wrong_labels(count: int = 48) -> tuple[list[dict[str, Any]], set[str]]:
    """Separable images of three classes, a seventh of them with a wrong label."""
    draws = np.random.default_rng(0)
    data, wrong = [], set()
    for number in range(count):
        kind = number % 3
        image = draws.integers(0, 40, (6, 6), dtype=np.uint8)
        image[2 * kind : 2 * kind + 2] += 180
        label = kind
        if number % 7 == 0:
            label, _ = (kind + 1) % 3, wrong.add(f"i{number}")
        data.append({"image": image, "label": "abc"[label], "index": f"i{number}"})
    return data, wrong


def test_wrong_labels_are_named_with_thumbnails(tmp_path: Path) -> None:
    data, wrong = wrong_labels()
    ckpt = new_image_model("resnet", width=8, depth=1, image_size=6, num_channels=1)
    _, result = trained(ELR(), ckpt, data, steps=40, batch_size=12, learning_rate=2e-2)
    report = result.reports["elr"]
    flagged = {name for name, *_ in report["flagged"]}
    assert len(flagged & wrong) >= 5
    assert len(flagged - wrong) <= 2
    assert report["suspicious"] == len(flagged)
    name, label, proposed, score = report["flagged"][0]
    number = int(name[1:])
    assert label == data[number]["label"]
    assert proposed == "abc"[number % 3]
    assert 0 < score <= 1
    assert [row[3] for row in report["flagged"]] == sorted((row[3] for row in report["flagged"]), reverse=True)
    (pictures,) = report["thumbnails"]
    assert pictures["items"][0][1:] == [f"{label}: {proposed}? ({score:.3f})", name]
    ckpt.save(tmp_path / "out")
    back = load(tmp_path / "out")
    assert torch.equal(back.attachments["elr"].tensors["targets"], ckpt.attachments["elr"].tensors["targets"])
    assert back.record.steps[-1].chosen["modifiers"]["elr"]["suspicious"] == len(flagged)


def test_suspicious_labels_by_hand() -> None:
    targets = torch.tensor([[0.6, 0.3, 0.0], [0.2, 0.7, 0.0], [0.0, 0.0, 0.0], [0.1, 0.0, 0.8]])
    found = suspicious_labels(targets, torch.tensor([0, 0, 1, 1]))
    assert [(s.row, s.proposed, round(s.score, 4)) for s in found] == [(3, 2, 0.8), (1, 1, 0.5)]


def test_suspicious_texts_are_shown() -> None:
    ckpt = checkpoint("bert", layers=1)
    data = [{**row, "label": row["label"] if n else "sun"} for n, row in enumerate(LABELLED)]
    result = run(ckpt, data, objective=Classification(), modifiers=[ELR()], steps=20)
    (table,) = result.reports["elr"]["tables"]
    assert table["headings"] == ["Index", "Label", "Proposed", "Score", "Text"]
    index, *_, text = table["rows"][0]
    assert text.strip() == LABELLED[int(index)]["text"]


def test_both_networks_predict_together() -> None:
    data, _ = wrong_labels()
    ckpt = new_image_model("resnet", width=8, depth=1, image_size=6, num_channels=1)
    trained(ELR.plus(second_network="all"), ckpt, data, steps=6, batch_size=12)
    second = copy.deepcopy(ckpt.model)
    tensors = ckpt.attachments["elr"].tensors
    second.load_state_dict({n.removeprefix("network."): v for n, v in tensors.items() if n.startswith("network.")})
    pixels = torch.stack([row["pixel_values"] for row in training_rows(Classification(), ckpt, data, KeyedRNG(0))])
    with torch.no_grad():
        expected = (ckpt.model(pixels).logits + second.eval()(pixels).logits) / 2
    assert torch.allclose(predict(ckpt, data), expected.softmax(1), atol=1e-5)
    with pytest.raises(IntaglioError, match="has no second network"):
        predict(Checkpoint(ckpt.model), data)


def test_it_runs_in_a_stock_trainer(tmp_path: Path) -> None:
    data, wrong = wrong_labels()
    checkpoint_ = new_image_model("resnet", width=8, depth=1, image_size=6, num_channels=1)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=40, per_device_train_batch_size=12, learning_rate=2e-2, remove_unused_columns=False,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows_ = training_rows(Classification(), checkpoint_, data, KeyedRNG(0))
    module = ObjectiveModule(checkpoint_, Classification(), [ELR()], rows_)
    collate = EpochCollator(Classification(), KeyedRNG(0), ids=True)
    Trainer(module, arguments, collate, rows_, callbacks=[module.callback]).train()
    suspicious = module.detach()["elr"]["flagged"]
    assert len({name for name, *_ in suspicious} & wrong) >= 5


def test_it_trains_adapters() -> None:
    ckpt = checkpoint("bert", layers=1)
    result = run(ckpt, LABELLED, objective=Classification(), modifiers=[ELR()], lora={"r": 2})
    assert math.isfinite(result.history[-1].loss)


SCRIPT = """
import os, sys, torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from intaglio.methods.training.elr import ELR
from intaglio.trainer.classification import Classification
from tests.trainer.helpers import LABELLED, checkpoint, run, weights
ckpt = checkpoint("llama", layers=1)  # without dropout, which differs between processes
modifiers = [ELR(networks=int(sys.argv[2]), mixup_alpha=0.0)]
run(ckpt, LABELLED, objective=Classification(), modifiers=modifiers, batch_size=4, steps=12)
if os.environ["RANK"] == "0":
    save_file({**weights(ckpt), "targets": ckpt.attachments["elr"].tensors["targets"]}, sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("networks", [1, 2])
def test_two_processes_are_one(networks: int, tmp_path: Path) -> None:
    out, script = tmp_path / "out.safetensors", tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(out), str(networks)], check=True, env=environment, capture_output=True)
    alone, method = checkpoint("llama", layers=1), ELR(networks=networks, mixup_alpha=0.0)  # type: ignore[arg-type]
    run(alone, LABELLED, objective=Classification(), modifiers=[method], batch_size=4, steps=12)
    saved = load_file(out)
    assert torch.allclose(saved.pop("targets"), alone.attachments["elr"].tensors["targets"], atol=1e-5)
    assert far(saved, weights(alone)) < 1e-5


def test_bad_input() -> None:
    for method, message in [
        (lambda: trained(ELR(), data=iter(rows())), "give examples in memory, not a stream"),
        (lambda: run(checkpoint(layers=1), modifiers=[ELR()]), "needs an objective that classifies"),
        (
            lambda: run(
                checkpoint("bert", layers=1), LABELLED, objective=Classification(), modifiers=[ELR.plus()],
                lora={"r": 2},
            ),
            "leave lora out, or set networks: 1",
        ),
        (
            lambda: trained(ELR(), Checkpoint(nn.Conv2d(1, 3, (2, 3)))),
            "Conv2d has no linear layer",
        ),
        (
            lambda: train(
                Checkpoint(net()), rows(), objective=Classification(loss_type="binary_cross_entropy"),
                modifiers=[ELR()], **{**SETTINGS, "steps": 1},
            ),
            "loss_type is binary_cross_entropy; elr needs cross_entropy",
        ),
        (
            lambda: train(
                Checkpoint(net()), rows(), objective=Classification(unlabelled="?"), modifiers=[ELR()],
                **{**SETTINGS, "steps": 1},
            ),
            "elr takes no unlabelled examples; leave unlabelled out",
        ),
    ]:  # fmt: skip
        with pytest.raises(IntaglioError, match=message):
            method()
    with pytest.raises(ValidationError, match="beta is 1, at which the table stays empty"):
        ELR.plus(beta=1.0, refine_targets=True)
    step = {"texts": "wikipedia", "steps": 1, "modifiers": [{"elr": {}}]}
    with pytest.raises(IntaglioError, match="elr is for classifiers; it needs classes"):
        Recipe.from_dict({"model": "m", "steps": [{"train": step}]})


def test_presets() -> None:
    assert (ELR().beta, ELR().regularization_weight, ELR().networks) == (0.7, 3.0, 1)
    assert ELR.plus(beta=0.9) == ELR(networks=2, beta=0.9)
    assert ELR.paper().ema_ramp_steps == 40_000


def test_a_session_without_examples_reports_nothing() -> None:
    """Rows without their data, as in a stock trainer of another kind, fill the table and name no labels."""
    goal = Classification()
    run = TrainingRun(Checkpoint(net()), 8, 6, 0, lambda batch, other=None: goal.loss(other or net(), batch))
    made: Any = ELR().attach(run)
    assert made.report() == {}
    made.before_step(1, {})
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    made.extra_loss(net(), {"id": torch.tensor([0, 1, 2, 3])}, Classified(logits, None, torch.zeros_like(logits)))
    assert made.attachment()["targets"].numel() == 18
    assert made.report() == {}


def test_the_estimate_counts_the_second_network_and_the_averages() -> None:
    work = Workload((), 100, 150, 8, 0, 0, 4)
    assert ELR().training_cost(work, 10, 100, 3.0) == Cost()
    cost = ELR.plus().training_cost(work, 10, 100, 3.0)
    assert cost.flops == pytest.approx(50)
    assert cost.extra_bytes == 3000
