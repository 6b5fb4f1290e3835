"""The plumbing of layer-wise unmasking's claim, end to end in a tiny world."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest

from intaglio.evidence import layerwise_unmasking as evidence
from intaglio.evidence import record
from intaglio.evidence.experiment import Unit
from intaglio.evidence.layerwise_unmasking import (
    ACCURACY,
    ARMS,
    EXPERIMENTS,
    F1,
    GROUPS,
    RATE,
    RATES,
    TRIED,
    Budget,
    Label,
    trials_of,
)
from intaglio.evidence.run import experiment_of, prove
from intaglio.evidence.worlds.roles import Roles
from tests.evidence.worlds.test_roles import small_world

BUDGET = Budget(training=8, validation=4, test=6, steps=1, batch=4)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Roles:
    return small_world(tmp_path, monkeypatch)


def test_the_arms_that_are_compared_have_equally_many_trials() -> None:
    for seed in (0, 7):
        trials = {arm: trials_of(arm, seed) for arm in ARMS}
        assert {len(trials[arm]) for arm in ("causal", "chosen", "all")} == {len(TRIED)}
        assert {len(trials[arm]) for arm in ("causal-first", "inference")} == {len(RATES)}
        assert trials["causal-first"] == trials["inference"]
        assert {trial.bits for trial in trials["causal"]} == {"0" * GROUPS}
        assert {trial.bits for trial in trials["all"]} == {"1" * GROUPS}
        assert [trial.bits for trial in trials["chosen"]] == list(TRIED)
        assert len(set(TRIED)) == len(TRIED)
        # The arm that tries subsets tunes nothing else, and its one rate is among those that the others try.
        assert {trial.settings["learning_rate"] for trial in trials["chosen"]} == {RATE} <= set(RATES)
    seeds = [{trial.settings["seed"] for trial in trials_of("causal", seed)} for seed in range(5)]
    assert len(set.union(*seeds)) == sum(map(len, seeds))  # no two runs share a seed of fine-tuning


def test_labels_stand_where_the_claim_says() -> None:
    assert {arm: place for arm, (place, _) in ARMS.items()} == {
        "causal": "last", "chosen": "first", "all": "first", "causal-first": "first", "inference": "first",
    }  # fmt: skip


@pytest.mark.slow
def test_end_to_end(small: Roles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "TRIED", ("0000", "0001"))
    quick = dataclasses.replace(
        evidence.experiment(small, BUDGET), pilot_runs=2, most_runs=2, secondary_runs=2, threads=1
    )
    document = prove("layerwise_unmasking", experiment=quick, directory=tmp_path / "p")
    assert document["verdict"] in ("holds", "fails", "underpowered", "inconclusive")
    assert set(document["arms"]) == set(ARMS)
    assert len(document["secondaries"]) == 4
    for run in document["runs"]:
        values = run["outcome"]["values"]
        assert set(values) == {F1, ACCURACY}
        assert all(0 <= value["seed"] <= 100 for value in values.values())


def test_arms_share_passages_and_inference_only_trains_as_the_causal_arm_does(
    small: Roles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "RATES", (1e-3,))
    runner, unit = Label(small, BUDGET), Unit("run", 0)
    outcomes: dict[str, Any] = {arm: runner(arm, unit, unit.seed) for arm in ("causal-first", "inference")}
    first, second = outcomes["causal-first"], outcomes["inference"]
    assert first.shared == second.shared
    assert set(first.shared) == {"training", "validation", "test"}
    assert len(set(first.shared.values())) == 3
    assert first.cost.parameters == second.cost.parameters
    assert first.cost.tokens == second.cost.tokens > 0
    other = runner("causal-first", Unit("run", 1), Unit("run", 1).seed)
    assert other.shared["test"] == first.shared["test"]  # a stage is measured on the same passages
    assert other.shared["training"] != first.shared["training"]
    assert runner("causal-first", unit, unit.seed).values == first.values


def test_the_claim_is_the_one_that_was_registered() -> None:
    chosen = experiment_of("layerwise_unmasking")
    assert chosen is EXPERIMENTS["cpu"]
    assert (chosen.baseline, chosen.method, chosen.delta) == ("causal", "chosen", 2.0)
    assert (chosen.metric, chosen.direction, chosen.design) == (F1, "higher", "independent")
    there = pickle.loads(pickle.dumps(chosen))
    assert (there.digest, there.run_unit) == (chosen.digest, chosen.run_unit)
    committed: Any = record.preregistered("layerwise_unmasking")
    assert committed["digest"] == chosen.digest, "after the first run the experiment may not change"
