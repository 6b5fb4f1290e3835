"""Points on rings: a class each, drawn from keys, with classes between points of another."""

from __future__ import annotations

import torch

from intaglio.evidence.testbeds.rings import Rings

BED = Rings(training_points=200)


def test_each_class_lies_on_its_ring() -> None:
    points = BED.training(0)
    assert torch.bincount(points.labels_N).tolist() == [200, 200, 200]
    radius = points.pixels_NCHW.norm(dim=1)
    for ring in (1, 2):
        own = radius[points.labels_N == ring]
        assert ring - 0.1 < float(own.mean()) < ring + 0.1
        assert 0.2 < float(own.std()) < 0.3
    angles = torch.atan2(points.pixels_NCHW[:, 1], points.pixels_NCHW[:, 0])
    assert -0.3 < float(angles.mean()) < 0.3


def test_points_between_points_of_the_outer_ring_look_like_other_classes() -> None:
    points = BED.training(0)
    outer = points.pixels_NCHW[points.labels_N == 2]
    middle = (outer + outer.roll(1, 0)) / 2
    nearest = torch.cdist(middle, points.pixels_NCHW).argmin(1)
    intruding = (points.labels_N[nearest] != 2).float().mean()
    assert intruding > 0.4


def test_sets_follow_from_keys_and_share_none() -> None:
    sets = [
        BED.training(0),
        BED.training(1),
        BED.images("evaluation"),
        BED.images("validation"),
        BED.images("pilot", 3),
    ]
    assert len({part.digest for part in sets}) == 5
    assert len({tuple(point.tolist()) for part in sets for point in part.pixels_NCHW}) == sum(map(len, sets))
    assert BED.training(1).digest == sets[1].digest
    assert len(Rings(classes=4).toy().images("pilot")) == 400
