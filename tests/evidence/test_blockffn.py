"""The claim of BlockFFN, its plumbing, on a toy."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from intaglio.evidence import blockffn, record
from intaglio.evidence.blockffn import (
    ACTIVE,
    ARMS,
    BITS,
    CHUNK,
    CHUNK_BESIDE,
    EXPERIMENTS,
    EXPERTS,
    RATES,
    TOKEN,
    TOKEN_BESIDE,
    K,
    Pretrain,
    experiment,
)
from intaglio.evidence.experiment import Experiment, Unit
from intaglio.evidence.run import experiment_of, prove
from intaglio.evidence.worlds.source_code import SourceCode
from tests.trainer.conftest import _garbage_put_aside  # noqa: F401


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SourceCode:
    root = tmp_path_factory.mktemp("source") / "made_up"
    root.mkdir()
    for number in range(40):
        (root / f"m{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n" * 4, encoding="utf-8")
    return SourceCode(
        folder=str(root), width=32, depth=1, context=32, steps=2, batch=2, documents_run=3, documents_pilot=3, tokens=24
    )


def quick(world: SourceCode) -> Experiment:
    chosen = experiment(world)
    assert chosen.tuning is not None
    tried = {arm: dict(list(chosen.tuning.choices[arm].items())[:2]) for arm in ("topk", "blockffn")}
    tuning = dataclasses.replace(chosen.tuning, choices=tried)
    return dataclasses.replace(chosen, pilot_runs=2, most_runs=2, secondary_runs=2, tuning=tuning)


def test_end_to_end(world: SourceCode, tmp_path: Path) -> None:
    document = prove("blockffn", experiment=quick(world), units=2, directory=tmp_path)
    assert document["verdict"] in ("holds", "fails", "underpowered", "inconclusive")
    assert set(document["arms"]) == set(ARMS)
    assert len(document["secondaries"]) == 9
    first = {r["arm"]: r["outcome"] for r in document["runs"] if r["stage"] == "run" and r["index"] == 0}
    assert {outcome["cost"]["tokens"] for outcome in first.values()} == {2 * 2 * 32}
    values = {arm: {name: v["seed"] for name, v in outcome["values"].items()} for arm, outcome in first.items()}
    assert values["topk"][ACTIVE] == pytest.approx(K)
    assert values["dense"][ACTIVE] == EXPERTS
    assert (values["dense"][TOKEN], values["dense"][CHUNK]) == (0, 0)
    assert (values["dense"][TOKEN_BESIDE], values["dense"][CHUNK_BESIDE]) == (0.8, 0.7)
    assert all(one[CHUNK] <= one[TOKEN] for one in values.values())
    # An expert has two matrices of 32 rows; the plain MLP uses every one, and has no router.
    idle = first["dense"]["cost"]["parameters"] - first["topk"]["cost"]["parameters"]
    assert idle == 2 * 32 * 32 * (EXPERTS - K) - 32 * EXPERTS


def test_a_training_that_takes_too_many_experts_counts_as_diverged(
    world: SourceCode, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, unit = Pretrain(world), Unit("run", 0)
    values = run("blockffn", unit, 4).values  # after two steps about half of them fire
    assert values[ACTIVE]["seed"] is not None
    assert values[ACTIVE]["seed"] > K
    assert values[BITS]["seed"] is None
    assert run("without-losses", unit, 4).values[BITS]["seed"] is not None
    monkeypatch.setattr(blockffn, "SPARE", 10.0)
    assert run("blockffn", unit, 4).values[BITS]["seed"] is not None


def test_arms_differ_in_the_router_and_its_losses_alone() -> None:
    methods = {name: arm.method(next(iter(arm.choices)))[0].model_dump() for name, arm in ARMS.items()}
    own: dict[str, set[str]] = {
        name: {key for key in fields if fields[key] != methods["without-losses"][key]}
        for name, fields in methods.items()
    }
    assert own == {
        "topk": {"router", "k", "locality", "chunk_weight"},
        "blockffn": {"locality", "chunk_weight", "chunk"},
        "without-losses": set(),
        "without-norm": {"norm"},
        "remoe": {"router", "k", "locality", "chunk_weight"},
        "dense": {"router", "locality", "chunk_weight"},
    }
    tuning = EXPERIMENTS["cpu"].tuning
    assert tuning is not None
    assert {len(choices) for choices in tuning.choices.values()} == {len(RATES)}


def test_what_is_committed_is_the_claim() -> None:
    found = experiment_of("blockffn")
    assert (found.kind, found.delta, found.tier, found.direction) == ("better", 0.01, "cpu", "lower")
    assert (found.baseline, found.method) == ("topk", "blockffn")
    committed: Any = record.preregistered("blockffn")
    assert committed["digest"] == found.digest
    assert json.loads(json.dumps(found.preregistration()))["settings"]["experts that TopK takes"] == K
    assert pickle.loads(pickle.dumps(EXPERIMENTS["cpu"].run_unit)) == EXPERIMENTS["cpu"].run_unit
