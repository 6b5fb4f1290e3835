"""DecoupledMixup: what its paper and its code promise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

import intaglio
from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.methods.training.decoupled_mixup import DecoupledMixup, decoupled_terms, rescaled
from intaglio.modeling.token_classifier import label_names
from intaglio.recipe.run import carve
from intaglio.recipe.schema import Recipe
from intaglio.trainer import KeyedRNG, train
from intaglio.trainer.classification import Classification
from intaglio.trainer.mixing import Mix, mixed_targets, soft_cross_entropy
from intaglio.trainer.protocols import TrainingRun
from tests.alive import alive
from tests.trainer.classes import IMAGES, image_folder, image_network, trained, trained_in_stock_trainer
from tests.trainer.helpers import LABELLED, checkpoint, run

EXAMPLES = ({}, {"mix": "manifold", "layers": [0, 1]}, {"folds": 3, "rescale": "none", "per_example": True})
"""Fields of the instances that the conformance suite applies."""
ALIVE: dict[str, object] = {
    "mix": "cutmix",
    "alpha": 0.2,
    "folds": 3,
    "mixing_rate": 0.3,
    "per_example": True,
    "layers": alive([1], mix="manifold"),
    "eta": 1.0,
    "terms": "more",
    "terms_threshold": alive(0.99, terms="more"),
    "rescale": "none",
    "rescale_threshold": 0.5,
    "rescale_exponent": 0.5,
    "two_hot_scale": "test_targets_of_binary_cross_entropy_follow_the_rule",
    "negative_weight": "test_absent_classes_weigh_less",
    "decoupled": "test_only_the_labelled_class_has_a_term",
    "larger_share": "test_the_larger_share_goes_where_the_field_says",
    "confidence": "test_uncertain_rows_have_no_loss",
    "mix_confidence": "test_a_mix_needs_its_own_confidence",
    "labelled_mix_weight": "test_parts_have_their_weights",
    "unlabelled_mix_weight": "test_parts_have_their_weights",
    "unlabelled_weight": "test_parts_have_their_weights",
}
"""For each field a value that changes the first example's result; see `tests/alive.py`."""

Z = torch.tensor([[1.0, 2.0, 0.5, -1.0]])
PAIR = torch.tensor([0, 1])


def observe(method: DecoupledMixup) -> Any:
    return trained(method)


def pair(share: float, a: int = 0, b: int = 1) -> tuple[Mix, Tensor]:
    """One row of class a mixed with a row of class b, and their labels."""
    return Mix(torch.tensor([[0, 1]]), torch.tensor([[share, 1 - share]])), torch.tensor([a, b])


def total(logits: Tensor, share: float, a: int = 0, b: int = 1, **fields: Any) -> float:
    return float(DecoupledMixup(**fields).mixed_losses(logits, *pair(share, a, b)))


def test_the_worked_example() -> None:
    """z = (1, 2, .5, -1), a = 0, b = 1, lam = .3."""
    terms = decoupled_terms(Z, PAIR[None])
    torch.testing.assert_close(terms, torch.tensor([[0.554957, 0.241311]]), atol=1e-6, rtol=0)
    assert total(Z, 0.3, eta=0.0) == pytest.approx(0.795182, abs=1e-6)
    assert float(DecoupledMixup.paper().mixed_losses(Z, *pair(0.3))) == pytest.approx(0.874809, abs=1e-6)
    assert total(Z, 0.3) == pytest.approx(0.828722, abs=1e-6)
    shares = rescaled(torch.tensor([0.3, 0.7]), "power", 1.0, 0.5)
    torch.testing.assert_close(shares, torch.tensor([0.547723, 0.836660]), atol=1e-6, rtol=0)


@given(st.floats(0, 1), st.integers(0, 10**6))
def test_without_eta_it_is_soft_target_cross_entropy(share: float, seed: int) -> None:
    """eta = 0: equals mixup CE, i.e. soft-target cross-entropy, exactly."""
    logits = torch.randn(1, 5, generator=torch.Generator().manual_seed(seed))
    mix, labels = pair(share, 2, 4)
    wanted = soft_cross_entropy(logits, mixed_targets(mix, labels, 5))
    assert torch.equal(DecoupledMixup(eta=0.0).mixed_losses(logits, mix, labels), wanted)


@given(st.floats(0, 1), st.integers(0, 10**6))
def test_two_classes_have_no_term(share: float, seed: int) -> None:
    """C = 2: phi_ab = phi_ba = 1 so the term is 0 and DM = MCE."""
    logits = torch.randn(1, 2, generator=torch.Generator().manual_seed(seed))
    assert total(logits, share, eta=5.0) == pytest.approx(total(logits, share, eta=0.0), abs=1e-5)


@given(st.integers(0, 10**6))
def test_phi_is_the_share_of_the_rest(seed: int) -> None:
    """Identity: phi_ab = p_a / (1 - p_b)."""
    logits = torch.randn(1, 6, generator=torch.Generator().manual_seed(seed)).double()
    probs = logits.softmax(1)[0]
    phi = (-decoupled_terms(logits, torch.tensor([[3, 5]]))).exp()[0]
    torch.testing.assert_close(phi, torch.stack([probs[3] / (1 - probs[5]), probs[5] / (1 - probs[3])]))


def test_its_gradient_leaves_the_partner_alone() -> None:
    """d(-log phi_ab)/dz_b = 0; d/dz_a = phi_ab - 1; d/dz_c = exp(z_c) / sum_{j != b} exp(z_j)."""
    logits = Z.double().clone().requires_grad_()
    term = decoupled_terms(logits, PAIR[None])[0, 0]
    (gradient,) = torch.autograd.grad(term, logits)
    rest = logits.detach()[0, [0, 2, 3]].softmax(0)
    torch.testing.assert_close(gradient[0], torch.stack([rest[0] - 1, rest.new_zeros(()), rest[1], rest[2]]))
    shifted = Z.clone()
    shifted[0, 1] += 3
    assert decoupled_terms(shifted, PAIR[None])[0, 0] == decoupled_terms(Z, PAIR[None])[0, 0]


@given(st.floats(0, 1), st.sampled_from(["none", "power", "exponential"]))
def test_swapping_the_examples_changes_nothing(share: float, rescale: Any) -> None:
    """(a, b, lam) -> (b, a, 1 - lam) leaves the loss unchanged in the mode `both`."""
    fields: dict[str, Any] = {"rescale": rescale, "rescale_exponent": 2.0}
    assert total(Z, share, 0, 1, **fields) == pytest.approx(total(Z, 1 - share, 1, 0, **fields), abs=1e-5)


def test_rows_of_one_class_are_plain_cross_entropy() -> None:
    """a == b rows contribute exactly plain CE; never NaN, also with logits of -inf."""
    mix, labels = pair(0.3, 2, 2)
    plain = F.cross_entropy(Z, torch.tensor([2]), reduction="none")
    torch.testing.assert_close(DecoupledMixup(eta=7.0).mixed_losses(Z, mix, labels), plain)
    logits = torch.tensor([[1.0, 2.0, -math.inf, 0.0]], requires_grad=True)
    terms = decoupled_terms(logits, torch.tensor([[0, 1]]))
    terms.sum().backward()
    assert bool(torch.isfinite(terms).all())
    assert bool(torch.isfinite(logits.grad).all())  # type: ignore[arg-type]


def test_of_several_examples_each_term_leaves_out_all_partners() -> None:
    """k-way: for class i delete the other k-1 mixed classes; examples of one class are one class."""
    logits = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    terms = decoupled_terms(logits, torch.tensor([[0, 2, 5], [4, 1, 4]]))
    for place, kept in enumerate(([0, 1, 3, 4], [2, 1, 3, 4], [5, 1, 3, 4])):
        torch.testing.assert_close(terms[0, place], -logits[0, kept].log_softmax(0)[0])
    torch.testing.assert_close(terms[1, 0], -logits[1, [4, 0, 2, 3, 5]].log_softmax(0)[0])
    torch.testing.assert_close(terms[1, 1], -logits[1, [1, 0, 2, 3, 5]].log_softmax(0)[0])
    assert terms[1, 2] == 0
    mix = Mix(torch.tensor([[0, 1, 2]]), torch.tensor([[0.2, 0.5, 0.3]]))
    loss = DecoupledMixup(folds=3, eta=1.0).terms_loss(logits[1:], mix, torch.tensor([4, 1, 4]))
    torch.testing.assert_close(loss, (0.5 * terms[1, 0] + 0.5 * terms[1, 1])[None])


@pytest.mark.parametrize(
    ("terms", "share", "kept"),
    [("more", 0.6, 0), ("more", 0.4, 1), ("less", 0.6, 1), ("less", 0.4, 0), ("more", 0.5, 0), ("less", 0.5, 1)],
)
def test_one_term_alone(terms: Any, share: float, kept: int) -> None:
    """'more': term a if lam >= thr, else term b; 'less' opposite."""
    method = DecoupledMixup(terms=terms, rescale="none", eta=1.0)
    torch.testing.assert_close(method.terms_loss(Z, *pair(share))[0], decoupled_terms(Z, PAIR[None])[0, kept])
    other = DecoupledMixup(terms=terms, rescale="none", eta=1.0, terms_threshold=1.0)
    wanted = decoupled_terms(Z, PAIR[None])[0, 1 if terms == "more" else 0]
    torch.testing.assert_close(other.terms_loss(Z, *pair(share))[0], wanted)


def test_rescaling_is_the_codes() -> None:
    """l >= thr -> 1, else (l / thr)^idx; the exponential rises from 0 to 1 at the threshold."""
    shares = torch.tensor([0.0, 0.2, 0.4, 0.8, 1.0])
    assert rescaled(shares, "none", 0.8, 2.0).tolist() == [1.0] * 5
    torch.testing.assert_close(rescaled(shares, "power", 0.8, 2.0), torch.tensor([0.0, 0.0625, 0.25, 1.0, 1.0]))
    b, k = 3.0 ** (-1.6), 1 / (1 - 3.0 ** (-1.6))
    code = [((3.0 ** (x - 1.6)) * 3.0**x - b) * k for x in (0.0, 0.2, 0.4)]
    torch.testing.assert_close(rescaled(shares, "exponential", 0.8, 3.0), torch.tensor([*code, 1.0, 1.0]))


def test_the_best_logits_keep_the_ratio_and_leave_other_classes_less() -> None:
    """MCE alone gives p = (lam, 1 - lam) on the pair; DM keeps the ratio and empties other classes faster."""
    probs = {}
    for eta in (0.0, 1.0):
        logits = torch.zeros(1, 4, requires_grad=True)
        optimizer = torch.optim.SGD([logits], lr=1.0)
        for _ in range(150):
            optimizer.zero_grad()
            DecoupledMixup.paper(eta=eta).mixed_losses(logits, *pair(0.3)).sum().backward()
            optimizer.step()
        probs[eta] = logits.detach().softmax(1)[0]
    assert float(probs[0.0][0] / probs[0.0][1]) == pytest.approx(3 / 7, rel=0.02)
    assert float(probs[1.0][0] / probs[1.0][1]) == pytest.approx(3 / 7, rel=0.1)
    assert probs[1.0][2:].sum() < 0.6 * probs[0.0][2:].sum()


def test_targets_of_binary_cross_entropy_follow_the_rule() -> None:
    """y = scale * [r(lam) y_a + r(1 - lam) y_b]; shares from the threshold on are full targets."""
    mix, labels = pair(0.2, 3, 1)
    targets = DecoupledMixup().two_hot_targets(mix, labels, 4)
    torch.testing.assert_close(targets, torch.tensor([[0.0, 1.0, 0.0, 0.25]]))
    half = DecoupledMixup(two_hot_scale=0.5, rescale_threshold=1.0).two_hot_targets(mix, labels, 4)
    torch.testing.assert_close(half, torch.tensor([[0.0, 0.4, 0.0, 0.1]]))
    both = DecoupledMixup(rescale="none").two_hot_targets(mix, labels, 4)
    torch.testing.assert_close(both, torch.tensor([[0.0, 1.0, 0.0, 1.0]]))
    same, same_labels = pair(0.2, 2, 2)
    torch.testing.assert_close(
        DecoupledMixup(rescale="none").two_hot_targets(same, same_labels, 4), torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    )


def session(method: DecoupledMixup, objective: Any = None, steps: int = 10) -> tuple[Any, nn.Module, dict[str, Any]]:
    """A session, its network and a batch of eight images with ids."""
    goal = objective or Classification()
    net = image_network()
    rows = [{**row, "id": n} for n, row in enumerate(IMAGES)]
    run = TrainingRun(Checkpoint(net), steps, len(rows), 0, lambda batch: goal.loss(net, batch), objective=goal)
    batch = {**goal.collate(rows[:8], KeyedRNG(0)), "id": torch.arange(8)}
    batch.pop("weight")
    return method.attach(run), net, batch


def whole_loss(made: Any, net: nn.Module, batch: dict[str, Any], objective: Any = None) -> Any:
    """The loss of the loop: objective on the changed batch, plus the session's."""
    changed = made.change_batch(net, batch)
    with made.forward_context(net, changed):
        loss = (objective or Classification()).loss(net, changed)
    extra = made.extra_loss(net, changed, loss.outputs)
    return changed, loss, extra


@pytest.mark.parametrize("fields", [{}, {"mix": "cutmix"}, {"mix": "manifold", "layers": [2]}, {"folds": 3}])
def test_training_has_the_loss_of_the_equation(fields: dict[str, Any]) -> None:
    made, net, batch = session(DecoupledMixup(eta=0.7, **fields))
    _, loss, extra = whole_loss(made, net, batch)
    mix = made.mix
    with torch.no_grad():
        if fields.get("mix") == "manifold":
            logits = net[2:](mix.average(net[:2](batch["pixel_values"])))  # type: ignore[index]
        else:
            logits = net(mix.combine(batch["pixel_values"]))
        wanted = made.method.mixed_losses(logits, mix, batch["labels"]).mean()
    torch.testing.assert_close(loss.total + extra.total, wanted)
    assert torch.equal(extra.parts["decoupled"], extra.total)


def test_a_batch_that_is_not_mixed_is_plain_training() -> None:
    made, net, batch = session(DecoupledMixup(mixing_rate=0.0))
    changed, loss, extra = whole_loss(made, net, batch)
    assert changed is batch
    assert extra is None
    torch.testing.assert_close(loss.total, F.cross_entropy(net(batch["pixel_values"]), batch["labels"]))


def test_binary_cross_entropy_gets_two_hot_targets() -> None:
    goal = Classification(loss_type="binary_cross_entropy")
    made, net, batch = session(DecoupledMixup(), goal)
    changed, loss, extra = whole_loss(made, net, batch, goal)
    assert extra is None
    targets = made.method.two_hot_targets(made.mix, batch["labels"], 3)
    assert torch.equal(changed["targets"], targets)
    logits = net(changed["pixel_values"])
    wanted = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1).mean()
    torch.testing.assert_close(loss.total, wanted)


def test_absent_classes_weigh_less() -> None:
    goal = Classification(loss_type="binary_cross_entropy")
    made, net, batch = session(DecoupledMixup(negative_weight=0.25), goal)
    changed, loss, extra = whole_loss(made, net, batch, goal)
    logits, targets = net(changed["pixel_values"]), changed["targets"]
    each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    wanted = (each * torch.where(targets > 0, 1.0, 0.25)).sum(1).mean()
    torch.testing.assert_close(loss.total + extra.total, wanted)


def unlabelled(batch: dict[str, Any], count: int = 4) -> dict[str, Any]:
    labels = batch["labels"].clone()
    labels[count:] = -1
    return {**batch, "labels": labels}


def parts_of(method: DecoupledMixup, step: int = 10) -> tuple[dict[str, float], float, Any]:
    """Parts of the loss of four labelled and four unlabelled rows, and the whole of the session's share."""
    made, net, batch = session(method)
    made.before_step(step, batch)
    changed, loss, extra = whole_loss(made, net, unlabelled(batch))
    assert len(changed["labels"]) == 4
    torch.testing.assert_close(loss.total, F.cross_entropy(net(batch["pixel_values"][:4]), batch["labels"][:4]))
    return {name: value.item() for name, value in extra.parts.items()}, extra.total.item(), made


SURE: dict[str, Any] = {"confidence": 0.01, "mix_confidence": 0.01}


def test_parts_have_their_weights() -> None:
    weights = {"labelled_mix_weight": 0.3, "unlabelled_mix_weight": 0.7, "unlabelled_weight": 0.11}
    for step, rising in ((10, 1.0), (5, 0.5)):
        parts, whole, _ = parts_of(DecoupledMixup(**SURE, **weights), step)
        assert parts["confident"] == 1
        wanted = 0.3 * parts["mixed"] + 0.7 * rising * parts["mixed with unlabelled"] + 0.11 * parts["unlabelled"]
        assert whole == pytest.approx(wanted, rel=1e-5)
        assert min(parts.values()) > 0
    default = parts_of(DecoupledMixup(**SURE))
    ones = {name: value for name, value in default[0].items() if name != "confident"}
    assert default[1] == pytest.approx(sum(ones.values()), rel=1e-5)


def test_uncertain_rows_have_no_loss() -> None:
    parts = parts_of(DecoupledMixup())[0]  # a new network is sure of nothing
    assert parts["confident"] == parts["unlabelled"] == parts["mixed with unlabelled"] == 0
    assert parts["mixed"] > 0


def test_a_mix_needs_its_own_confidence() -> None:
    """The threshold is min(confidence, max(mix_confidence, 1 - lam)), with 1 - lam the unlabelled share."""
    low: dict[str, Any] = {"confidence": 0.99, "mix_confidence": 0.01, "larger_share": "labelled", "alpha": 0.001}
    assert parts_of(DecoupledMixup(**low))[0]["mixed with unlabelled"] > 0  # the unlabelled share is nearly 0
    assert parts_of(DecoupledMixup(**low))[0]["unlabelled"] == 0  # which `confidence` decides
    most = {**low, "confidence": 0.01, "larger_share": "unlabelled"}
    assert parts_of(DecoupledMixup(**most))[0]["mixed with unlabelled"] > 0
    high = {**low, "mix_confidence": 0.98}
    assert parts_of(DecoupledMixup(**high))[0]["mixed with unlabelled"] == 0
    assert parts_of(DecoupledMixup(**{**low, "larger_share": "unlabelled"}))[0]["mixed with unlabelled"] == 0


@pytest.mark.parametrize("where", ["labelled", "unlabelled", "random"])
def test_the_larger_share_goes_where_the_field_says(where: Any) -> None:
    method = DecoupledMixup(larger_share=where, per_example=True)
    made, _, batch = session(method)
    made._rng = torch.Generator().manual_seed(0)
    shares = made._draw_pairs({"pixel_values": batch["pixel_values"]}, 64).shares_BK
    larger = (shares[:, 0] >= shares[:, 1]).float().mean()
    assert {"labelled": larger == 1, "unlabelled": larger == 0, "random": 0.2 < larger < 0.8}[where]


def test_only_the_labelled_class_has_a_term() -> None:
    """Semi-supervised: the decoupled term applies to the labelled class alone, by default."""
    values = {
        kept: parts_of(DecoupledMixup(decoupled=kept, eta=2.0, **SURE))[0]["mixed with unlabelled"]
        for kept in ("labelled", "unlabelled", "both", "none")
    }
    assert DecoupledMixup().decoupled == "labelled"
    assert values["none"] < min(values["labelled"], values["unlabelled"])
    assert values["both"] - values["none"] == pytest.approx(
        values["labelled"] + values["unlabelled"] - 2 * values["none"], rel=1e-4
    )
    whole = {  # the labelled row has nearly the whole share, in proportion to which its class has a term
        kept: parts_of(DecoupledMixup(decoupled=kept, eta=2.0, alpha=0.001, **SURE))[0]["mixed with unlabelled"]
        for kept in ("labelled", "unlabelled", "none")
    }
    assert whole["labelled"] > whole["none"] + 0.5
    assert whole["unlabelled"] == pytest.approx(whole["none"], abs=0.1)
    terms = DecoupledMixup(eta=1.0, rescale="none").terms_loss(Z, *pair(0.3), torch.tensor([True, False]))
    torch.testing.assert_close(terms[0], decoupled_terms(Z, PAIR[None])[0, 0])


def test_a_batch_without_labels_still_trains() -> None:
    made, net, batch = session(DecoupledMixup(**SURE))
    _, loss, extra = whole_loss(made, net, unlabelled(batch, 0))
    assert loss.total == 0
    assert set(extra.parts) == {"unlabelled", "confident"}
    assert extra.total > 0


def test_hidden_states_of_labelled_and_unlabelled_rows_are_mixed() -> None:
    parts, inputs = (parts_of(DecoupledMixup(mix="manifold", layers=[n], **SURE))[0] for n in (2, 0))
    assert 0 < parts["mixed with unlabelled"] != inputs["mixed with unlabelled"] > 0


def test_every_unlabelled_row_is_predicted_in_evaluation_mode_and_mixed() -> None:
    made, net, batch = session(DecoupledMixup(**SURE))
    modes: list[bool] = []
    partners: list[int] = []
    draw = made._draw_pairs
    made._draw_pairs = lambda pairs, count: (partners.extend(pairs["id"][count:].tolist()), draw(pairs, count))[1]
    net.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    whole_loss(made, net.train(), unlabelled(batch, 5))
    assert sorted(partners[:3]) == [5, 6, 7]
    assert partners[3:] == partners[:2]
    assert modes.count(False) == 1
    assert net.training


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"mixing_rate": 1.1}, "less than or equal to 1"),
        ({"terms": "more", "folds": 3}, "terms is 'more', which compares two classes; folds is 3"),
        ({"rescale": "exponential"}, "rescale_exponent is 1, at which the exponential is flat"),
        ({"confidence": 0.5}, "mix_confidence is 0.95; at most confidence, 0.5, fits"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        DecoupledMixup(**fields)


def test_it_needs_a_classifier() -> None:
    with pytest.raises(IntaglioError, match="decoupled_mixup mixes examples with classes; give the objective classif"):
        run(checkpoint(layers=1), modifiers=[DecoupledMixup()])


@pytest.mark.parametrize(
    ("goal", "sentence"),
    [
        (Classification(label_smoothing=0.1), "label_smoothing is 0.1; unlabelled rows need cross_entropy"),
        (Classification(loss_type="binary_cross_entropy"), "loss_type is binary_cross_entropy; unlabelled rows need"),
    ],
)
def test_unlabelled_rows_need_plain_cross_entropy(goal: Any, sentence: str) -> None:
    made, net, batch = session(DecoupledMixup(), goal)
    with pytest.raises(IntaglioError, match=sentence):
        made.change_batch(net, unlabelled(batch))


def test_the_report_shows_mixed_samples() -> None:
    ckpt = Checkpoint(image_network())
    result = train(ckpt, IMAGES, objective=Classification(), modifiers=[DecoupledMixup()], steps=2, batch_size=4)
    (shown,) = result.reports["decoupled_mixup"]["thumbnails"]
    assert shown["title"] == "Mixed samples"
    assert len(shown["items"]) == 4
    assert all(png.startswith("iVBOR") for png, _ in shown["items"])  # a PNG in base64
    assert all(" + " in caption for _, caption in shown["items"])


@pytest.mark.parametrize("method", [DecoupledMixup(), DecoupledMixup(mix="manifold", layers=[1])])
def test_it_trains_texts_in_a_stock_trainer(method: DecoupledMixup, tmp_path: Path) -> None:
    """The lines of the docstring."""
    trained_in_stock_trainer(method, tmp_path)


def test_unlabelled_texts_train_and_are_no_class() -> None:
    ckpt = checkpoint("bert", layers=1)
    data = [row | ({"label": "?"} if n % 3 == 0 else {}) for n, row in enumerate(LABELLED)]
    goal = Classification(unlabelled="?")
    settings: dict[str, Any] = {"steps": 4, "batch_size": 6, "log_every": 1}
    result = train(ckpt, data, objective=goal, modifiers=[DecoupledMixup(**SURE)], **settings)
    assert label_names(ckpt.model) == ("fox", "sun")
    assert all(entry.parts["mixed with unlabelled"] > 0 for entry in result.history)
    (table,) = result.reports["decoupled_mixup"]["tables"]
    assert table["rows"][0][0].count(" + ") == 1
    assert "quick brown" in table["rows"][0][2]
    with pytest.raises(IntaglioError, match="a batch has unlabelled examples; add the modifier decoupled_mixup"):
        train(checkpoint("bert", layers=1), data, objective=goal, **settings)


def recipe(folder: Path, **fields: Any) -> Recipe:
    new = {"family": "resnet", "width": 8, "depth": 1, "image_size": 8, "num_channels": 1}
    step = {"classes": str(folder), "modifiers": [{"decoupled_mixup": fields}], "steps": 2, "batch_size": 4}
    return Recipe.from_dict({"new": new, "steps": [{"train": step}]})


def test_a_recipe_trains_images_and_shows_the_mixed_ones(tmp_path: Path) -> None:
    carve(recipe(image_folder(tmp_path / "images", ("cat", "dog")), mix="cutmix"), tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Mixed samples" in page
    assert "data:image/png;base64," in page
    assert " cat + " in page or " dog + " in page


def test_a_recipe_holds_out_examples_with_a_class_alone(tmp_path: Path) -> None:
    plan = recipe(image_folder(tmp_path / "images", ("cat", "dog", "unknown")), **SURE).dump()
    step = plan["steps"][0]["train"]
    step |= {"objective": {"classification": {"unlabelled": "unknown"}}, "evaluate": 0.25}
    document = carve(Recipe.from_dict(plan), tmp_path / "out")
    assert document["classes"] == ["cat", "dog"]
    assert (document["data"]["training"], document["data"]["validation"]) == (10, 2)


def test_bad_recipes_are_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(IntaglioError, match=r"mixing_rate.*1\.5.*less than or equal to 1") as caught:
        recipe(tmp_path, mixing_rate=1.5)
    assert "\n" not in str(caught.value)
    single = image_folder(tmp_path / "single", ("cat",))
    with pytest.raises(IntaglioError, match="has the label 'cat'; at least two classes are needed"):
        carve(recipe(single), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(IntaglioError, match="mix is cutmix, which needs images; texts take mixup or manifold"):
        train(checkpoint("bert", layers=1), LABELLED, objective=Classification(), steps=1,
              modifiers=[DecoupledMixup(mix="cutmix")])  # fmt: skip


def test_it_is_public() -> None:
    assert intaglio.DecoupledMixup is DecoupledMixup
