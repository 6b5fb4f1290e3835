"""The claim of R-Sparse, its plumbing, on a tiny model in the place of SmolLM2."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from intaglio.checkpoint import Checkpoint
from intaglio.evidence import r_sparse, record
from intaglio.evidence.experiment import Unit
from intaglio.evidence.r_sparse import BATCH, EXPERIMENTS, LOSS, METHODS, READ, Sparse, experiment, measured
from intaglio.evidence.run import experiment_of, prove
from intaglio.evidence.worlds.smollm2 import SmolLM2Wikipedia
from intaglio.measures.language_modeling import quality
from intaglio.methods.activations.r_sparse import RSparse, Search
from tests.families import tiny_checkpoint_dir


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> SmolLM2Wikipedia:
    model = tiny_checkpoint_dir("llama", tmp_path_factory.mktemp("world") / "tiny", layers=1)
    return SmolLM2Wikipedia(
        model=str(model), texts=str(corpus_file), samples=4, length=24, documents_run=3, documents_pilot=3, tokens=20
    )


@pytest.fixture(autouse=True)
def _small_search(monkeypatch: pytest.MonkeyPatch) -> None:
    small = RSparse(search=Search(population=2, generations=1, segments=1))
    monkeypatch.setitem(METHODS, "r_sparse", (small, "a small search"))


def test_end_to_end(world: SmolLM2Wikipedia, tmp_path: Path) -> None:
    quick = dataclasses.replace(experiment(world), pilot_runs=2, most_runs=2, secondary_runs=2)
    document = prove("r_sparse", experiment=quick, units=2, directory=tmp_path)
    assert document["verdict"] in ("holds", "fails", "underpowered", "inconclusive")
    assert document["sizes"]["document"] == 3
    assert set(document["arms"]) == set(METHODS)
    assert len(document["secondaries"]) == len(EXPERIMENTS["cpu"].secondaries) == 12
    for run in document["runs"]:
        values = run["outcome"]["values"]
        assert values[LOSS].keys() == values[READ].keys() == set(world.documents(run["stage"]).names)


def test_an_arm_is_what_it_says_and_every_token_is_sparse(world: SmolLM2Wikipedia) -> None:
    unit, dense = Unit("run", 0), world.load()
    before = copy.deepcopy(dense.model.state_dict())
    found = {arm: Sparse(world)(arm, unit, unit.seed) for arm in ("plain", "r_sparse", "wanda", "dense", "cats-30")}
    assert all(torch.equal(value, before[name]) for name, value in dense.model.state_dict().items())
    assert len({json.dumps(outcome.shared) for outcome in found.values()}) == 1
    shares = {arm: list(outcome.values[READ].values()) for arm, outcome in found.items()}
    assert shares["dense"] == [1.0] * 3
    assert shares["wanda"] == pytest.approx([0.5] * 3)
    assert all(0.3 < share < 0.7 for share in (*shares["plain"], *shares["r_sparse"]))
    assert all(0.5 < share < 0.9 for share in shares["cats-30"])
    carved = Checkpoint(copy.deepcopy(dense.model), dense.tokenizer)
    RSparse.teal(sparsity=0.5).apply(carved, world.calibration(unit.seed).segments, batch_size=BATCH)
    losses = quality(carved, world.documents("run").segments, batch_size=1).losses
    assert list(found["plain"].values[LOSS].values()) == list(losses)
    assert measured(carved, world.documents("run").segments.ids_NT[0])[0] == losses[0]
    assert {method.mode for method, _ in METHODS.values() if isinstance(method, RSparse)} == {"all"}


def test_arms_differ_in_what_they_say_alone() -> None:
    ours = {arm: method for arm, (method, _) in METHODS.items() if isinstance(method, RSparse)}
    half = [arm for arm in ours if not arm.endswith("-30")]
    assert {ours[arm].sparsity for arm in half} == {0.5}
    assert {ours[arm].sparsity for arm in ours if arm not in half} == {0.3}
    assert {(method.tokens, method.threshold) for method in ours.values()} == {(4096, "static")}
    assert METHODS["scaled"][0] == RSparse(low_rank=False)


def test_the_experiment_is_the_one_of_the_issue_and_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = experiment_of("r_sparse")
    assert chosen is EXPERIMENTS["cpu"]
    assert (chosen.baseline, chosen.method, chosen.delta, chosen.tier) == ("plain", "r_sparse", 0.02, "cpu")
    assert (chosen.metric, chosen.direction, chosen.kind, chosen.design) == (LOSS, "lower", "better", "crossed")
    assert chosen.settings["methods"]["r_sparse"]["search"]["generations"] == 6
    committed: Any = record.preregistered("r_sparse")
    assert committed == {"digest": chosen.digest, **json.loads(json.dumps(chosen.preregistration()))}
    there = pickle.loads(pickle.dumps(chosen))
    assert there.run_unit == chosen.run_unit
    assert r_sparse.EXPERIMENTS["cpu"].units == SmolLM2Wikipedia().documents_run
