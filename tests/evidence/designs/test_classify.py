"""Classify on few digits: pairs of arms, a shared dense start, baselines with a loop of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from intaglio.data.images import Images
from intaglio.errors import IntaglioError
from intaglio.evidence.designs.classify import ACCURACY, TEST_LOSS, Classify, batches, evaluate, mlp, pass_flops
from intaglio.evidence.engine.claim import Arm, RunKey
from intaglio.evidence.testbeds.digits import Digits

DESIGN = Classify().toy()
KEY = RunKey("look", 0)
PLAIN = Arm("as it is")


def test_units_are_seeded_and_arms_share_their_images() -> None:
    results = [DESIGN.run(arm, KEY, {}) for arm in (PLAIN, PLAIN, Arm("slow", {"learning_rate": 1e-3}))]
    assert results[0].values == results[1].values != results[2].values
    assert results[0].parity == results[2].parity
    assert results[0].values != DESIGN.run(PLAIN, RunKey("look", 1), {}).values
    assert results[0].cost.tokens == 20 * 32


def test_training_helps() -> None:
    before, after = (Classify(steps=steps).toy(steps=steps).run(PLAIN, KEY, {}).values for steps in (1, 100))
    assert after[ACCURACY.name] > before[ACCURACY.name] + 20  # type: ignore[operator]
    assert after[TEST_LOSS.name] < before[TEST_LOSS.name]  # type: ignore[operator]


def test_arms_of_a_unit_start_from_one_dense_network() -> None:
    design = Classify(dense_steps=20).toy()
    starts: list[Any] = []

    def keep(net: nn.Module, images: Images, seed: int, design: Classify, scale: float) -> int:
        starts.append([p.detach().clone() for p in net.parameters()])
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(scale)
        return 7

    arms = [Arm(f"times {scale}", {"train": keep, "scale": scale}) for scale in (1.0, 0.0)]
    results = [design.run(arm, KEY, {}) for arm in arms]
    assert all(torch.equal(a, b) for a, b in zip(*starts, strict=True))
    assert results[0].cost.tokens == 7 * 32
    assert results[0].values[TEST_LOSS.name] < results[1].values[TEST_LOSS.name]  # type: ignore[operator]
    assert results[1].cost.parameters == 0


def test_a_share_of_the_steps_and_passes_that_a_step_counts_as() -> None:
    def loop(net: nn.Module, images: Images, seed: int, design: Classify) -> int:
        return design.steps

    arms = [
        Arm("half", {"share": 0.5}),
        Arm("two passes", {"share": 0.5, "passes": 2}),
        Arm("loop", {"train": loop, "share": 0.5}),
    ]
    assert [DESIGN.run(arm, KEY, {"tuned elsewhere": 1}).cost.tokens for arm in arms] == [320, 320, 320]
    assert DESIGN.run(Arm("three", {"passes": 3}), KEY, {}).cost.tokens == 7 * 3 * 32


def test_settings_that_reach_nothing_are_refused() -> None:
    with pytest.raises(IntaglioError, match="the settings width_of_it of the arm"):
        DESIGN.run(Arm("wrong", {"width_of_it": 3}), KEY, {})


def test_the_network_and_its_operations() -> None:
    net = mlp((1, 8, 8), 16)
    loss, accuracy = evaluate(net, Digits().toy().images("pilot"))
    assert 0 <= accuracy <= 100
    assert loss > 0
    assert pass_flops(net, (1, 8, 8)) == 6 * (64 * 16 + 16 * 16 + 16 * 10)


def test_batches_cover_each_epoch_in_a_keyed_order() -> None:
    images = Digits().toy().training(0)
    first, again, other = ([next(it) for _ in range(5)] for it in map(iter, (
        batches(images, 32, "a"), batches(images, 32, "a"), batches(images, 32, "b"))))  # fmt: skip
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(first, other, strict=True))
    assert sum(int(labels.sum()) for _, labels in first) == int(images.labels_N.sum())
