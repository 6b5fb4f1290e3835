"""AdaMixUp: what its paper and its code promise."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

import intaglio
from intaglio.checkpoint import Checkpoint, load
from intaglio.errors import IntaglioError
from intaglio.methods.base import Workload
from intaglio.methods.training.adamixup import AdaMixUp, region_shares
from intaglio.trainer import KeyedRNG, training_rows
from intaglio.trainer.classification import Classification
from intaglio.trainer.mixing import draw_shares
from intaglio.trainer.protocols import TrainingRun
from intaglio.trainer.rng import generator
from tests.trainer.classes import IMAGES, image_network, trained, trained_in_stock_trainer
from tests.trainer.helpers import LABELLED, checkpoint

SMALL = {"hidden_size": 8}
EXAMPLES = (SMALL, {"folds": 3, **SMALL}, {"policy": "copy"})
"""Fields of the instances that the conformance suite applies."""
ALIVE: dict[str, object] = {
    "folds": 3,
    "intrusion_weight": 0.5,
    "policy": "copy",
    "region": [0.2, 0.6, 0.2],
    "hidden_size": 4,
    "dropout": 0.0,
}
"""For each field a value that changes the first example's result; see `tests/alive.py`."""


def observe(method: AdaMixUp) -> Any:
    return trained(method)


def session(
    method: AdaMixUp, net: nn.Module | None = None, rows: int = 8, goal: Any = None, data: Any = IMAGES
) -> tuple[Any, nn.Module, dict[str, Any]]:
    """A session, its network and a batch with ids."""
    goal, net = goal or Classification(), image_network() if net is None else net
    run = TrainingRun(
        Checkpoint(net), 10, len(data), 0, lambda batch: goal.loss(net, batch), examples=data, objective=goal
    )
    batch = {**goal.collate(IMAGES[:rows], KeyedRNG(0)), "id": torch.arange(rows)}
    batch.pop("weight")
    return method.attach(run), net, batch


def losses(made: Any, net: nn.Module, batch: dict[str, Any]) -> tuple[dict[str, Any], Any, Any]:
    """The changed batch, the classifier's loss and the intrusion loss."""
    changed = made.change_batch(net, batch)
    with made.forward_context(net, changed):
        loss = Classification().loss(net, changed)
    return changed, loss, made.extra_loss(net, changed, loss.outputs)


def test_the_policy_begins_with_thirds() -> None:
    """Softmax zero logits: a = delta = c = 1/3; lam in [1/3, 2/3]; E lam = .5, sd = delta / sqrt(12) = .09623."""
    made, net, batch = session(AdaMixUp())
    made.change_batch(net, batch)
    torch.testing.assert_close(made._region, torch.full((4, 3), 1 / 3), atol=1e-3, rtol=0)
    uniform = draw_shares(20_000, 2, 1.0, generator(0), per_example=True)
    lam = region_shares(torch.full((1, 3), 1 / 3), uniform)[:, 0]
    assert 1 / 3 - 1e-6 <= float(lam.min()) < 0.334
    assert 0.666 < float(lam.max()) <= 2 / 3 + 1e-6
    assert 0.497 < float(lam.mean()) < 0.503
    assert 0.0945 < float(lam.std()) < 0.098


@given(st.integers(2, 3), st.integers(0, 10**6))
def test_shares_lie_in_the_region(folds: int, seed: int) -> None:
    """lam always in (0, 1), lam >= a and lam <= 1 - c; the shares of each row have the sum 1."""
    region = torch.randn(5, folds + 1, generator=generator(seed)).softmax(1)
    shares = region_shares(region, draw_shares(5, folds, 1.0, generator(seed, "u"), per_example=True))
    torch.testing.assert_close(shares.sum(1), torch.ones(5))
    least = torch.cat([region[:, :1], region[:, 2:]], 1)
    assert bool((shares >= least - 1e-6).all())
    assert bool((shares <= least + region[:, 1:2] + 1e-6).all())
    assert bool(((shares > 0) & (shares < 1)).all())


def test_the_gradient_of_a_share() -> None:
    """dlam/da = 1, dlam/ddelta = u."""
    region = torch.tensor([[0.2, 0.5, 0.3]], requires_grad=True)
    region_shares(region, torch.tensor([[0.7, 0.3]]))[0, 0].backward()
    assert region.grad is not None
    torch.testing.assert_close(region.grad, torch.tensor([[1.0, 0.7, 0.0]]))


def test_a_whole_region_without_discriminator_is_mixup_with_as_many_clean_rows() -> None:
    """Forced (0, 1, 0) and L_intr weight 0: MixUp with alpha = 1 plus an equal share of clean samples."""
    made, net, batch = session(AdaMixUp(region=[0.0, 1.0, 0.0], intrusion_weight=0.0))
    changed, loss, extra = losses(made, net, batch)
    uniform = made.mix.shares_BK[:4]
    partner = made.mix.rows_BK[:4, 1] - 4
    x, y = batch["pixel_values"], F.one_hot(batch["labels"], 3).float()
    share = uniform[:, :1]
    mixed = share[..., None, None] * x[:4] + (1 - share[..., None, None]) * x[partner]
    torch.testing.assert_close(changed["pixel_values"][:4], mixed)
    assert torch.equal(changed["pixel_values"][4:], x)
    inputs = torch.cat([mixed, x[:4]])
    goal = torch.cat([share * y[:4] + (1 - share) * y[partner], y[:4]])
    torch.testing.assert_close(loss.total, -(goal * net(inputs).log_softmax(1)).sum(1).mean())
    assert extra.total == 0
    right = (net(inputs).argmax(1) == goal.argmax(1)).float().mean()
    torch.testing.assert_close(extra.parts["accuracy"], right)


def test_a_region_at_the_first_example_is_plain_training() -> None:
    """Forced (1, 0, 0): plain training on duplicated clean samples."""
    made, net, batch = session(AdaMixUp(region=[1.0, 0.0, 0.0], intrusion_weight=0.0))
    _, loss, _ = losses(made, net, batch)
    torch.testing.assert_close(loss.total, F.cross_entropy(net(batch["pixel_values"][:4]), batch["labels"][:4]))


def test_without_discriminator_the_loss_is_mixup_on_the_given_shares() -> None:
    """Loss with psi removed and pi detached = standard mixup CE on given lam."""
    made, net, batch = session(AdaMixUp(folds=3, intrusion_weight=0.0))
    _, loss, _ = losses(made, net, batch)
    with torch.no_grad():
        shares, rows = made.mix.shares_BK[:4], made.mix.rows_BK[:4].clone()
        rows[:, 1:] -= 4
        x, labels = batch["pixel_values"], batch["labels"]
        mixed = (shares[..., None, None, None] * x[rows]).sum(1)
        each = torch.stack([F.cross_entropy(net(mixed), labels[rows[:, k]], reduction="none") for k in range(3)], 1)
        clean = F.cross_entropy(net(x[:4]), labels[:4])
        torch.testing.assert_close(loss.total.detach(), ((shares * each).sum(1).mean() + clean) / 2)


def gradients(loss: torch.Tensor, module: nn.Module) -> list[float]:
    found = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, allow_unused=True)
    return [0.0 if gradient is None else float(gradient.abs().max()) for gradient in found]


@pytest.mark.parametrize("policy", ["small", "copy"])
def test_both_losses_train_the_policy_and_the_intrusion_the_backbone(policy: Any) -> None:
    """Gradient of L_cls reaches pi's last layer; gradient of L_intr reaches pi, psi AND the shared backbone."""
    made, net, batch = session(AdaMixUp(policy=policy, **SMALL))
    _, loss, extra = losses(made, net, batch)
    assert min(gradients(loss.total, made.policy)[-2:]) > 0
    assert max(gradients(loss.total, made.discriminator)) == 0
    assert min(gradients(extra.total, made.policy)[-2:]) > 0
    assert min(gradients(extra.total, made.discriminator)[-2:]) > 0
    assert gradients(extra.total, net)[0] > 0
    assert gradients(extra.total, net)[-1] == 0  # the classifier's own head


def test_the_discriminator_begins_undecided_and_sees_all_rows() -> None:
    """psi at init: L_intr = log 2; positives are two of three rows, so a constant answer scores .6365."""
    made, net, batch = session(AdaMixUp(intrusion_weight=3.0))
    _, loss, extra = losses(made, net, batch)
    assert extra.parts["intrusion"].item() == pytest.approx(math.log(2), abs=1e-3)
    assert extra.total.item() == pytest.approx(3 * extra.parts["intrusion"].item())
    assert loss.outputs.features.shape[0] == 12
    with torch.no_grad():
        made.discriminator[1].weight.zero_()
        made.discriminator[1].bias.copy_(torch.tensor([1 / 3, 2 / 3]).log())
    extra = made.extra_loss(net, {"targets": loss.outputs.targets}, loss.outputs)
    assert extra.parts["intrusion"].item() == pytest.approx(0.6365, abs=1e-4)
    real = F.cross_entropy(made.discriminator(loss.outputs.features), torch.tensor([0] * 4 + [1] * 8))
    torch.testing.assert_close(extra.parts["intrusion"], real)


def test_rows_that_only_the_discriminator_sees_have_no_label() -> None:
    made, net, batch = session(AdaMixUp())
    changed, _, _ = losses(made, net, batch)
    torch.testing.assert_close(changed["targets"].sum(1), torch.tensor([1.5] * 8 + [0.0] * 4))
    assert torch.equal(changed["labels"][4:], batch["labels"])


def test_every_pair_has_a_share_of_its_own_and_new_gates_each_step() -> None:
    made, net, batch = session(AdaMixUp())
    made.change_batch(net, batch)
    first = made.mix.shares_BK[:4, 0].tolist()
    assert len(set(first)) == 4
    made.before_step(2, batch)
    made.change_batch(net, batch)
    assert made.mix.shares_BK[:4, 0].tolist() != first


def test_the_policy_sees_gated_examples() -> None:
    """The pair enters as (m1 x1 + m2 x2) / 2 with truncated standard normal masks of its shape."""
    made, _, _ = session(AdaMixUp())
    ones, rows = torch.ones(2, 1, 60, 60), torch.tensor([[0, 1]])
    gated = made._gated(ones, rows, generator(0))
    assert gated.shape == (1, 1, 60, 60)
    assert float(gated.abs().max()) <= 2
    assert 0.55 < float(gated.std()) < 0.69  # .88 / sqrt(2), of a normal cut at two deviations
    assert not torch.equal(gated, made._gated(ones, rows, generator(1)))
    three = made._gated(torch.ones(3, 1, 60, 60), torch.tensor([[0, 1, 2]]), generator(0))
    assert 0.46 < float(three.std()) < 0.56  # .88 / sqrt(3)


def test_seed_and_decay_of_the_run_reach_the_networks() -> None:
    made, _, _ = session(AdaMixUp(**SMALL))
    again, other = (AdaMixUp(**SMALL).attach(dataclasses.replace(made.run, seed=n, weight_decay=0.25)) for n in (0, 1))
    first, same, drawn = (each.discriminator[0].weight for each in (made, again, other))
    assert torch.equal(first, same)
    assert not torch.equal(first, drawn)
    assert [group["weight_decay"] for group in again.param_groups()] == [0.25]


def test_the_policy_reads_the_mean_of_the_seen_embeddings() -> None:
    ckpt, goal, rng = checkpoint("bert", layers=1), Classification(), KeyedRNG(0)
    data = [{"text": " ".join(["the fox"] * (n + 1)), "label": "ab"[n % 2]} for n in range(4)]
    rows = training_rows(goal, ckpt, data, rng)
    run = TrainingRun(ckpt, 1, 4, 0, lambda b: goal.loss(ckpt.model, b), examples=rows, objective=goal)
    made: Any = AdaMixUp(**SMALL).attach(run)
    views: list[torch.Tensor] = []
    made._gated = lambda x, rows_PK, rng: x[rows_PK].mean(1)
    made.policy = lambda view: (views.append(view), torch.zeros(2, 3))[1]
    batch, partners = goal.collate(rows, rng), torch.tensor([[0, 2], [1, 3]])
    made._regions(ckpt.model, batch, partners, generator(0))
    embedded = ckpt.model.get_input_embeddings()(batch["input_ids"]) * batch["attention_mask"][..., None]
    longest = batch["attention_mask"].sum(1)[partners].max(1, keepdim=True).values
    torch.testing.assert_close(views[0], embedded[partners].mean(1).sum(1) / longest)


@pytest.mark.parametrize("shape", [(3, 9, 5), (7,)])
def test_the_small_policy_reads_any_shape(shape: tuple[int, ...]) -> None:
    rows = [{"pixel_values": torch.ones(shape), "label": n % 2} for n in range(4)]
    net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 2))
    made, _, _ = session(AdaMixUp(**SMALL), net, data=rows)
    changed = made.change_batch(net, {**Classification().collate(rows, KeyedRNG(0)), "id": torch.arange(4)})
    assert changed["pixel_values"].shape == (6, *shape)
    assert len(made.report()["thumbnails" if len(shape) == 3 else "tables"]) == 1


def test_a_copy_has_weights_of_its_own_and_keeps_its_buffers() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    made, net, batch = session(AdaMixUp(policy="copy"), net)
    own = {id(p) for p in net.parameters()}
    assert not own & {id(p) for group in made.param_groups() for p in group["params"]}
    made.change_batch(net, batch)
    state = made.state_dict()
    other, _, _ = session(AdaMixUp(policy="copy"), nn.Sequential(*net))
    assert not torch.equal(other.state_dict()["buffers"]["1.1.running_mean"], state["buffers"]["1.1.running_mean"])
    other.load_state_dict(state)
    assert torch.equal(other.state_dict()["buffers"]["1.1.running_mean"], state["buffers"]["1.1.running_mean"])
    assert other.samples == made.samples


def test_a_batch_of_one_row_is_left_alone() -> None:
    made, net, batch = session(AdaMixUp(), rows=1)
    changed, _, extra = losses(made, net, batch)
    assert changed is batch
    assert extra is None


def test_each_pair_has_a_share_of_its_own_from_the_seed() -> None:
    """u is drawn for each pair, and the policy's view depends on the batch alone, not on the global generator."""
    shares = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        made, net, batch = session(AdaMixUp(dropout=0.0, region=[0.2, 0.6, 0.2]))
        made.before_step(1, batch)
        made.change_batch(net, batch)
        shares.append(made.mix.shares_BK[:4, 0])
        rows_PK, rng = torch.tensor([[0, 1], [2, 3]]), torch.Generator().manual_seed(5)
        shares.append(made._gated(batch["pixel_values"], rows_PK, rng))
    assert len(set(shares[0].tolist())) == 4
    assert torch.equal(shares[0], shares[2])
    assert torch.equal(shares[1], shares[3])


def test_of_an_odd_batch_the_larger_half_is_only_seen() -> None:
    made, net, batch = session(AdaMixUp(), rows=5)
    changed, _, _ = losses(made, net, batch)
    assert len(changed["labels"]) == 7
    assert int((changed["targets"].sum(1) > 0).sum()) == 4


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"folds": 4}, "less than or equal to 3"),
        ({"region": [0.5, 0.5]}, r"region is \[0.5, 0.5\]; 3 numbers with the sum 1 are accepted"),
        ({"region": [0.5, 0.5, 0.5]}, "numbers with the sum 1"),
        ({"dropout": 1.0}, "less than 1"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        AdaMixUp(**fields)


def test_other_losses_missing_labels_and_streams_are_refused() -> None:
    with pytest.raises(IntaglioError, match=r"label_smoothing is 0.1; the unmixed rows of adamixup need cross_entropy"):
        session(AdaMixUp(), goal=Classification(label_smoothing=0.1))
    made, net, batch = session(AdaMixUp())
    with pytest.raises(IntaglioError, match="rows without a label, which adamixup does not take"):
        made.change_batch(net, {**batch, "labels": batch["labels"] - 1})
    with pytest.raises(IntaglioError, match="adamixup needs its training data in memory"):
        session(AdaMixUp(), data=())


@pytest.mark.parametrize("policy", ["small", "copy"])
def test_it_trains_texts_in_a_stock_trainer_and_leaves_the_classifier(policy: Any, tmp_path: Path) -> None:
    """The lines of the docstring; eval-mode network is bit-identical to the classifier alone."""
    ckpt = trained_in_stock_trainer(AdaMixUp(policy=policy, **SMALL), tmp_path)
    ckpt.save(tmp_path / "saved")
    back, ids = load(tmp_path / "saved").model.eval(), torch.randint(8, 90, (2, 5), generator=generator(0))
    assert sorted(back.state_dict()) == sorted(ckpt.model.state_dict())
    assert torch.equal(back(input_ids=ids).logits, ckpt.model.eval()(input_ids=ids).logits)


def test_texts_of_a_pair_are_mixed_at_their_embeddings() -> None:
    ckpt = checkpoint("bert", layers=1)
    goal, rng = Classification(), KeyedRNG(0)
    rows = training_rows(goal, ckpt, LABELLED[:6], rng)
    batch = {name: value for name, value in goal.collate(rows, rng).items() if name != "weight"}
    batch["id"] = torch.arange(6)
    run = TrainingRun(ckpt, 1, 6, 0, lambda b: goal.loss(ckpt.model, b), examples=rows, objective=goal)
    made, model = AdaMixUp(**SMALL).attach(run), ckpt.model.eval()
    changed, loss, _ = losses(made, model, batch)
    assert changed["input_ids"].shape[0] == 9
    embedded = model.get_input_embeddings()(batch["input_ids"]) * batch["attention_mask"][..., None]
    shares, partner = made.mix.shares_BK[:3], made.mix.rows_BK[:3, 1] - 3
    mixed = shares[:, :1, None] * embedded[:3] + shares[:, 1:, None] * embedded[partner]
    seen = torch.maximum(batch["attention_mask"][:3], batch["attention_mask"][partner])
    logits = model(inputs_embeds=mixed, attention_mask=seen).logits
    torch.testing.assert_close(loss.outputs.logits[:3], logits)


def test_it_is_public() -> None:
    assert intaglio.AdaMixUp is AdaMixUp


def test_the_estimate_counts_mixed_rows_and_a_copied_policy() -> None:
    work = Workload((), 100, 150, 8, 0, 0, 4)
    small, copied = (AdaMixUp(policy=kind).training_cost(work, 10, 100, 4.0) for kind in ("small", "copy"))
    assert (small.flops, small.extra_bytes) == (20, 0)
    assert (copied.flops, copied.extra_bytes) == (40, 2400)
    assert AdaMixUp(policy="copy", region=[0.2, 0.6, 0.2]).training_cost(work, 10, 100, 4.0) == small
