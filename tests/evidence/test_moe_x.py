"""The claim of MoE-X, its plumbing, on a toy."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from intaglio.evidence import moe_x, record
from intaglio.evidence.experiment import Tuning, Unit
from intaglio.evidence.moe_x import (
    ACTIVE,
    ARMS,
    BASELINE,
    COVERAGE,
    EQUAL,
    EXPERIMENTS,
    EXPERTS,
    L0,
    LOAD,
    LOSS,
    METHOD,
    RECONSTRUCTION,
    Continue,
    activations,
    experiment,
)
from intaglio.evidence.run import experiment_of, prove
from intaglio.evidence.worlds.board_game import BoardGame
from intaglio.methods.activations.moe_x import moe_layers
from intaglio.modeling.anatomy import anatomy
from tests.trainer.conftest import _garbage_put_aside  # noqa: F401

WORLD = BoardGame(
    width=16, depth=1, heads=2, inner=8, base_steps=2, steps=2, batch=4, games_read=20, games_run=20, games_pilot=12
)


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INTAGLIO_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def test_end_to_end(tmp_path: Path) -> None:
    tuning = Tuning({arm: {"0.003": "one choice"} for arm in ARMS})
    quick = dataclasses.replace(experiment(WORLD), pilot_runs=2, most_runs=2, secondary_runs=2, tuning=tuning)
    document = prove("moe_x", experiment=quick, units=2, directory=tmp_path)
    assert document["verdict"] in ("holds", "fails", "underpowered", "inconclusive")
    assert set(document["arms"]) == set(ARMS)
    assert len(document["secondaries"]) == len(quick.secondaries)
    runs = {run["arm"]: run["outcome"] for run in document["runs"] if run["stage"] == "run" and run["index"] == 0}
    assert len({outcome["cost"]["tokens"] for outcome in runs.values()}) == 1
    for arm, outcome in runs.items():
        values = {name: value["seed"] for name, value in outcome["values"].items()}
        assert set(values) == {COVERAGE, EQUAL, RECONSTRUCTION, LOSS, L0, LOAD}
        assert 0 < values[EQUAL] <= values[COVERAGE] < 1
        assert (values[EQUAL] == values[COVERAGE]) == arm.startswith("dense")
        assert (values[LOAD] == 1.0) or not arm.startswith("dense")
        assert 0 < values[L0] <= ACTIVE * WORLD.inner


def test_a_token_passes_through_equally_many_units_in_all_arms() -> None:
    run = Continue(WORLD)
    for arm in ARMS:
        model = run.begin(arm, 3).model
        layers = list(moe_layers(model).values())
        if not layers:
            assert anatomy(model).mlp(0).into.shape == (ACTIVE * WORLD.inner, WORLD.width)
            continue
        config = layers[0].config
        assert (config.experts, config.active * config.units) == (EXPERTS, ACTIVE * WORLD.inner)
        assert config.activation == ARMS[arm].activation


def test_arms_of_an_activation_begin_as_the_model_that_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_x, "NOISE", 0.0)
    run, ids = Continue(WORLD), WORLD.games("train", "x", 4).ids_NT
    for arm, one in ARMS.items():
        with torch.no_grad():
            found, base = (m.model(ids).logits for m in (run.begin(arm, 3), WORLD.base(3, one.activation)))
        torch.testing.assert_close(found, base, atol=1e-5, rtol=1e-4)


def test_units_have_their_gates_and_padding_has_no_units() -> None:
    checkpoint = Continue(WORLD).begin(METHOD, 3)
    boards = WORLD.boards("validation", 0)
    z_PN, nats, load = activations(checkpoint, boards)
    assert z_PN.shape == (len(boards.true_PK), EXPERTS * WORLD.inner)
    assert 0 < load <= 1
    (layer,) = moe_layers(checkpoint.model).values()
    assert not layer.watched
    used = (z_PN.unflatten(1, (EXPERTS, WORLD.inner)) != 0).any(-1).sum(1)
    assert int(used.max()) == ACTIVE
    examples = boards.games.examples()
    with torch.no_grad():
        lost = [float(checkpoint.model(e["input_ids"][None], labels=e["input_ids"][None]).loss) for e in examples]
    sizes = [len(e["input_ids"]) - 1 for e in examples]
    assert nats == pytest.approx(sum(a * b for a, b in zip(lost, sizes, strict=True)) / sum(sizes), rel=1e-4)


def test_arms_see_the_same_and_differ_in_router_and_activation() -> None:
    run = Continue(WORLD)
    unit = Unit("tuning", 0, 0, "0.003")
    outcomes = [run(arm, unit, 5) for arm in (BASELINE, METHOD, METHOD)]
    assert outcomes[0].shared == outcomes[1].shared
    assert outcomes[1].values == outcomes[2].values
    assert outcomes[0].cost.tokens == outcomes[1].cost.tokens
    fields = {name: arm.method().model_dump() for name, arm in ARMS.items() if arm.router is not None}
    differ = {key for key in fields[METHOD] for other in fields.values() if other[key] != fields[METHOD][key]}
    assert differ == {"router", "activation"}


def test_what_is_committed_is_the_claim() -> None:
    found = experiment_of("moe_x")
    assert (found.metric, found.delta, found.direction, found.tier) == (COVERAGE, 0.03, "higher", "cpu")
    assert (found.baseline, found.method, found.kind, found.factors) == (BASELINE, METHOD, "better", ("training seed",))
    committed: Any = record.preregistered("moe_x")
    assert committed == {"digest": found.digest, **json.loads(json.dumps(found.preregistration()))}
    assert pickle.loads(pickle.dumps(EXPERIMENTS["cpu"].run_unit)) == EXPERIMENTS["cpu"].run_unit
