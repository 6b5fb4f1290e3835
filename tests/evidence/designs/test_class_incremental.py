"""Classes task by task: the same data for all arms, baselines by hand, and forgetting where it must be."""

from __future__ import annotations

import pytest
import torch

from intaglio.errors import IntaglioError
from intaglio.evidence.baselines.incremental import LinearProbe, NearestMean
from intaglio.evidence.designs.class_incremental import FIRST_TASK, INCREMENTAL, LOSS, MEMORY, ClassIncremental
from intaglio.evidence.engine.claim import Arm, Result, RunKey
from intaglio.evidence.testbeds.newsgroups import Newsgroups
from intaglio.methods.activations.dkvb import DKVB

DESIGN = ClassIncremental().toy()
METHOD = DKVB(num_codebooks=16, num_pairs=32, key_dim=4, learning_rate=2.0)


def result(index: int = 0, **settings: object) -> Result:
    return DESIGN.run(Arm("an arm", settings), RunKey("toy", index), {})


def test_a_bed_draws_the_same_number_of_each_class_and_tasks_cover_all() -> None:
    bed = Newsgroups().toy()
    data = bed.training(0)
    assert sorted({data.labels.count(name) for name in set(data.labels)}) == [12]
    assert data.names == bed.training(0).names
    assert data.names != bed.training(1).names
    tasks = bed.tasks(0, 3)
    assert sorted(name for task in tasks for name in task) == sorted(set(data.labels))
    assert [len(task) for task in tasks] == [2, 2, 2]
    assert tasks != bed.tasks(1, 3)
    parts = [set(bed.texts(part).names) for part in ("validation", "pilot", "evaluation")]
    assert not parts[0] & parts[1] | parts[1] & parts[2] | parts[0] & parts[2]
    assert not set(data.names) & parts[2]


def test_arms_share_data_and_are_measured_over_all_classes() -> None:
    probe = {"baseline": "linear probe", "learning_rate": 1.0}
    arms = {
        "means": result(baseline="nearest mean"),
        "dkvb": result(method=METHOD),
        "probe": result(**probe),
        "probe at once": result(**probe, at_once=True),
    }
    assert len({tuple(sorted(found.parity.items())) for found in arms.values()}) == 1
    accuracy = {name: found.values[INCREMENTAL.name] for name, found in arms.items()}
    assert min(accuracy.values()) > 70
    assert all(0 <= found.values[FIRST_TASK.name] <= 100 for found in arms.values())  # type: ignore[operator]
    assert accuracy["probe"] < accuracy["probe at once"]
    assert arms["means"].values[MEMORY.name] == 6 * 17 / 1000
    assert arms["probe"].values[MEMORY.name] == 6 * 17 / 1000
    assert arms["dkvb"].values[LOSS.name] < 1.7
    assert result(method=METHOD, keys="own").values != arms["dkvb"].values
    assert result(1, baseline="nearest mean").parity != arms["means"].parity
    with pytest.raises(IntaglioError, match="the settings pairs of the arm"):
        result(method=METHOD, pairs=3)


def test_running_means_do_not_depend_on_the_order_of_tasks() -> None:
    draws = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    labels = ["a", "b", "c"] * 20
    for metric, shrinkage in (("euclidean", 0.0), ("euclidean", 0.3), ("cosine", 0.1)):
        one, two = NearestMean(metric, shrinkage), NearestMean(metric, shrinkage)
        one.learn(draws, labels)
        for name in "cab":
            rows = [i for i, label in enumerate(labels) if label == name]
            two.learn(draws[rows], [name] * 20)
        order = [two.classes.index(name) for name in one.classes]
        assert torch.allclose(one.scores(draws), two.scores(draws)[:, order], atol=1e-5)
    near = NearestMean()
    near.learn(draws, labels)
    means = torch.stack([draws[i::3].mean(0) for i in range(3)])
    assert torch.allclose(near.scores(draws), -torch.cdist(draws, means), atol=1e-5)


def test_slda_is_the_discriminant_of_a_shared_covariance() -> None:
    draws = torch.randn(400, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2.0, 0.5, 1.0])
    labels = ["a", "b"] * 200
    draws[::2] += 1
    model = NearestMean("slda", 0.0)
    model.learn(draws, labels)
    centred = torch.cat([draws[::2] - draws[::2].mean(0), draws[1::2] - draws[1::2].mean(0)])
    precision = torch.linalg.inv(centred.T @ centred / 400)
    means = torch.stack([draws[::2].mean(0), draws[1::2].mean(0)])
    expected = draws @ precision @ means.T - 0.5 * (means @ precision * means).sum(1)
    assert torch.allclose(model.scores(draws), expected, atol=1e-3)
    assert model.numbers == 2 * 5 + 16


def test_a_linear_probe_is_softmax_regression() -> None:
    z, labels = torch.eye(3).repeat(10, 1), ["a", "b", "c"] * 10
    probe = LinearProbe(3, ["a", "b", "c"], learning_rate=1.0)
    assert not probe.scores(z).any()
    probe.learn(z, labels)
    assert probe.scores(torch.eye(3)).argmax(1).tolist() == [0, 1, 2]
    assert probe.numbers == 12
