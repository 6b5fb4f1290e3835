"""Soups of classifiers, and the test bed of conflicting conventions."""

from __future__ import annotations

import pytest
import torch

from intaglio.errors import IntaglioError
from intaglio.evidence.designs.classify import ACCURACY, TEST_LOSS
from intaglio.evidence.designs.soups import ON_CHOICE, Soups, _candidates
from intaglio.evidence.engine.claim import Arm, RunKey
from intaglio.evidence.testbeds.label_conventions import SETS, TRANSFORMATIONS, Conventions

DESIGN = Soups().toy()
KEY = RunKey("look", 0)
BED = Conventions().toy()


def test_sets_are_disjoint_and_each_swaps_two_classes_of_its_own() -> None:
    base, choice = BED.base(3), BED.choice(3)
    added = [BED.added(3, number) for number in range(SETS)]
    names = [set(images.names) for images in (base, *added)] + [{name.partition("/")[0] for name in choice.names}]
    assert len(set.union(*names)) == sum(map(len, names)) == 40 + SETS * 20 + 20
    assert torch.equal(base.labels_N, base.true_N)
    assert torch.equal(choice.labels_N, choice.true_N)
    for number, images in enumerate(added):
        changed = images.labels_N != images.true_N
        assert torch.equal(changed, images.true_N // 2 == number)
        assert set(images.labels_N[changed].tolist()) <= {2 * number, 2 * number + 1}


def test_choice_and_test_show_every_transformation() -> None:
    images = BED.images("evaluation")
    assert len(images) == len(set(images.names)) == 40 * (1 + SETS)
    plain = images.pixels_NCHW[:40]
    for number, change in enumerate(TRANSFORMATIONS, start=1):
        part = images.pixels_NCHW[40 * number : 40 * (number + 1)]
        assert part.shape == plain.shape
        assert torch.equal(part, change(plain))
        assert not torch.equal(part, plain)


def test_arms_share_their_candidates_and_differ_in_the_soup() -> None:
    settings = {"learning_rate": 0.05}
    modes = {"best": {"mode": "maximum", "top": 1}, "greedy": {"mode": "greedy"}, "top": {"mode": "maximum", "top": 3}}
    modes |= {"all": {"mode": "uniform"}, "union": {"mode": "union"}}
    results = {name: DESIGN.run(Arm(name, given), KEY, settings) for name, given in modes.items()}
    assert _candidates.cache_info().misses <= 2
    assert results["greedy"].values[ON_CHOICE.name] >= results["best"].values[ON_CHOICE.name]  # type: ignore[operator]
    assert len({result.values[TEST_LOSS.name] for name, result in results.items() if name != "greedy"}) == 4  # type: ignore[misc]
    assert len({(result.cost.tokens, result.cost.flops) for result in results.values()}) == 1
    assert len({tuple(result.parity.items()) for result in results.values()}) == 1
    assert 0 <= results["all"].values[ACCURACY.name] <= 100  # type: ignore[operator]


def test_units_and_rates_differ_and_settings_that_reach_nothing_are_refused() -> None:
    assert BED.choice(0).digest != BED.choice(1).digest
    assert not torch.equal(DESIGN.start(0)[1].weight, DESIGN.start(1)[1].weight)  # type: ignore[index]
    arm = Arm("all", {"mode": "uniform"})
    losses = [DESIGN.run(arm, KEY, given).values[TEST_LOSS.name] for given in ({}, {"learning_rate": 0.2})]
    assert losses[0] != losses[1]
    with pytest.raises(IntaglioError, match="the settings tip of the arm"):
        DESIGN.run(Arm("wrong", {"mode": "uniform", "tip": 3}), KEY, {})
