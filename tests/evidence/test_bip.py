"""The claim of BiP at a tiny scale: equal passes, equal batches, one dense network, equal effort."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from intaglio.evidence import bip, record
from intaglio.evidence.baselines.bip import rounds
from intaglio.evidence.bip import ACCURACY, ARMS, EXPERIMENTS, NETS, OVERLAP, SETTINGS, Prune, batches, experiment
from intaglio.evidence.experiment import Unit
from intaglio.evidence.run import experiment_of, prove
from intaglio.evidence.worlds.digits import Digits

SMALL = Prune(Digits(training_images=64, validation_images=20, run_images=20, pilot_images=20), 34, 1, 16)


def unit(arm: str, stage: Any = "run", index: int = 0) -> Unit:
    return Unit(stage, index, choice=next(iter(SETTINGS[ARMS[arm].how])))


@pytest.fixture(autouse=True)
def _forget() -> Any:
    bip._kept.clear()
    yield
    bip._kept.clear()


def test_every_arm_prunes_the_same_network_with_the_same_batches_and_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    nets: dict[str, set[float]] = {name: set() for name in NETS}
    looked: dict[str, list[float]] = {}
    plain = bip.prune

    def spied(net: nn.Module, keep: float, source: Any, loss_fn: Any, **more: Any) -> Any:
        nets[ARMS[arm].net].add(sum(float(p.detach().double().abs().sum()) for p in net.parameters()))

        def noted(net: nn.Module, batch: Any) -> Any:
            looked.setdefault(arm, []).append(float(batch[0].sum()))
            return loss_fn(net, batch)

        return plain(net, keep, source, noted, **more)

    monkeypatch.setattr(bip, "prune", spied)
    outcomes = {}
    for arm in ARMS:
        outcomes[arm] = SMALL(arm, unit(arm), 4)
    assert [len(found) for found in nets.values()] == [1, 1]
    whole = looked["imp-full"]
    assert len(whole) == 34 * 14
    for arm, outcome in outcomes.items():
        passes = 34 * (14 if ARMS[arm].full else 1)
        both = ARMS[arm].how in ("bip", "alternate")
        if both:  # the upper level has the next lower one's batch
            assert (looked[arm][::2], looked[arm][1::2]) == (whole[: passes // 2], whole[1 : passes // 2])
        else:
            assert looked[arm] == whole[:passes]
        assert outcome.cost.tokens == (passes - both) * 16
        assert outcome.shared == outcomes["imp"].shared
        assert 0 <= outcome.values[ACCURACY]["seed"] <= 100
    assert outcomes["omp"].values[OVERLAP] == {"seed": 1.0}
    sizes = {arm: outcomes[arm].cost.parameters for arm in ("imp", "bip", "alternate", "omp", "hydra", "imp-full")}
    total = sum(p.numel() for p in NETS["mlp"][0](48).parameters())
    assert max(sizes.values()) < 0.08 * total  # 5 % of the weights, and the biases
    assert outcomes["imp-10"].cost.parameters > sizes["imp"] > outcomes["imp-2"].cost.parameters


def test_a_run_follows_from_its_seed_alone() -> None:
    first = SMALL("bip", unit("bip"), 6)
    bip._kept.clear()
    torch.manual_seed(99)
    assert SMALL("bip", unit("bip"), 6).values == first.values
    assert SMALL("bip", unit("bip"), 8).shared["training"] != first.shared["training"]
    dense = SMALL.dense("mlp", 6)
    before = [p.clone() for p in dense.parameters()]
    SMALL("imp", unit("imp"), 6)
    assert SMALL.dense("mlp", 6) is dense
    assert all(torch.equal(a, b) for a, b in zip(before, dense.parameters(), strict=True))


def test_batches_are_epochs_of_whole_batches() -> None:
    images = SMALL.world.training(0)
    source = batches(images, 24, "key")
    first = [next(source)[0] for _ in range(2)]
    seen = torch.cat(first).flatten(1)
    assert len(seen) == 48  # 16 of 64 are left over
    assert len(seen.unique(dim=0)) == 48
    again = batches(images, 24, "key")
    assert torch.equal(next(again)[0], first[0])
    assert not torch.equal(next(source)[0], first[0])


def test_the_operations_of_a_pass() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3, 1, 1), nn.Conv2d(4, 8, 3, 2, 1), nn.Flatten(), nn.Linear(128, 10))
    assert bip._pass_flops(net) == 6 * (36 * 64 + 288 * 16 + 1280)
    with torch.no_grad():
        for make, width in NETS.values():
            assert make(width).eval()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_all_arms_have_as_many_choices_and_the_budget_fits_the_rounds() -> None:
    chosen = EXPERIMENTS["cpu"]
    assert chosen.tuning is not None
    assert chosen.tuning.choices.keys() == chosen.arms.keys()
    assert {len(choices) for choices in SETTINGS.values()} == {6}
    run = chosen.run_unit
    assert isinstance(run, Prune)
    assert len(rounds(0.05)) == 14
    assert run.passes == 14 * 54
    steps = run.dense_epochs * (run.world.training_images // run.batch)
    assert steps <= run.passes < steps + 14


def test_end_to_end(tmp_path: Path) -> None:
    quick = dataclasses.replace(experiment(SMALL), pilot_runs=2, most_runs=3, secondary_runs=2, threads=1, tuning=None)
    quick = dataclasses.replace(quick, run_unit=First(SMALL))
    document = prove("bip", experiment=quick, directory=tmp_path)
    assert document["verdict"] in ("holds", "fails", "underpowered", "inconclusive")
    assert len(document["secondaries"]) == 8


@dataclasses.dataclass(frozen=True)
class First:
    """The runner with the first choice of each arm."""

    run: Prune

    def __call__(self, arm: str, of: Unit, seed: int) -> Any:
        return self.run(arm, dataclasses.replace(of, choice=unit(arm).choice), seed)


def test_the_committed_claim_is_the_one_that_runs() -> None:
    chosen = experiment_of("bip")
    assert chosen is EXPERIMENTS["cpu"]
    assert (chosen.metric, chosen.delta, chosen.direction, chosen.design) == (ACCURACY, 0.5, "higher", "independent")
    assert (chosen.baseline, chosen.method, chosen.factors) == ("imp", "bip", ("training seed",))
    assert ARMS["bip"].keep == ARMS["imp"].keep == 0.05
    committed: Any = record.preregistered("bip")
    assert committed == {"digest": chosen.digest, **json.loads(json.dumps(chosen.preregistration()))}, (
        "the experiment is not the one that was registered; after the first run it may not change"
    )
    assert pickle.loads(pickle.dumps(chosen)).digest == chosen.digest
