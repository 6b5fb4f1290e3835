"""Convolutional classifiers: activations that keep lengths, the attack, and what is measured."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from intaglio.evidence.designs.classify import ACCURACY, TEST_LOSS, pass_flops
from intaglio.evidence.designs.convolutions import (
    BUDGETS,
    ROBUST,
    SPREAD,
    ClassifyConvolutions,
    MaxMin,
    attacked,
    network,
)
from intaglio.evidence.engine.claim import Arm, RunKey
from intaglio.methods.training.orth_conv import OrthConv

DESIGN = ClassifyConvolutions(measured_size=8).toy(width=8, steps=30)
KEY = RunKey("look", 0)


def test_maxmin_sorts_pairs_and_keeps_lengths() -> None:
    features = torch.tensor([1.0, 2.0, -3.0, -4.0]).reshape(1, 4, 1, 1)
    assert MaxMin()(features).flatten().tolist() == [2, 1, -3, -4]
    drawn = torch.randn(2, 6, 3, 3)
    torch.testing.assert_close(MaxMin()(drawn).norm(), drawn.norm())


def test_the_attack_stays_in_its_ball_and_raises_the_loss() -> None:
    net, images = network(8, 8), DESIGN.bed.images("evaluation")
    losses = [float(F.cross_entropy(net(images.pixels_NCHW), images.true_N))]
    for budget in BUDGETS:
        moved = attacked(net, images, budget)
        assert float((moved - images.pixels_NCHW).flatten(1).norm(dim=1).max()) <= budget + 1e-5
        assert 0 <= float(moved.min()) <= float(moved.max()) <= 1
        losses.append(float(F.cross_entropy(net(moved), images.true_N)))
    assert losses == sorted(losses)


def test_arms_start_equal_and_the_regulariser_narrows_the_spectrum() -> None:
    arms = [Arm("plain"), Arm("method", {"modifiers": (OrthConv(regularization_weight=1.0),)})]
    plain, method = (DESIGN.run(arm, KEY, {}) for arm in arms)
    assert method.values[SPREAD.name] < plain.values[SPREAD.name]  # type: ignore[operator]
    assert plain.values.keys() == {metric.name for metric in (ACCURACY, TEST_LOSS, SPREAD, *ROBUST)}
    assert (plain.cost.tokens, plain.cost.flops) == (method.cost.tokens, method.cost.flops)
    assert plain.parity == method.parity
    net = network(8, 8)
    operations = 64 * 9 * 4 + 64 * 9 * 4 * 8 + 16 * 9 * 8 * 8 + 8 * 16 * 10
    assert pass_flops(net, (1, 8, 8)) == 6 * operations
