"""The claim of progressive N:M: budgets, arms, and a toy run from end to end."""

from __future__ import annotations

import dataclasses
import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest

from intaglio.errors import IntaglioError
from intaglio.evidence import progressive_nm, record
from intaglio.evidence.experiment import Unit
from intaglio.evidence.progressive_nm import (
    ARMS,
    BITS,
    EXPERIMENTS,
    INNER,
    NOISE,
    SPENT,
    SPENT_NEEDED,
    STEPS,
    Sizes,
    Sparse,
    experiment,
    method_of,
    sizes,
    spent,
    steps_within,
)  # fmt: skip
from intaglio.evidence.run import experiment_of, prove
from intaglio.evidence.worlds.source_code import SourceCode
from tests.trainer.conftest import _garbage_put_aside  # noqa: F401

FOUND = Sizes(dense=200, pruned=400, attention=50.0)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Sparse:
    root = tmp_path_factory.mktemp("source")
    draw = random.Random(0)
    for number in range(40):
        lines = "".join(f"value_{draw.randint(0, 99)} = {draw.randint(0, 99)}\n" for _ in range(30))
        (root / f"m{number}.py").write_text(f"# {number}\n{lines}", encoding="utf-8")
    world = SourceCode(
        folder=str(root),
        width=32,
        depth=1,
        context=32,
        steps=20,
        batch=2,
        documents_run=4,
        documents_pilot=3,
        tokens=32,
    )
    return Sparse(world, 6)


def test_end_to_end(toy: Sparse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: ARMS[name] for name in ("sr-ste", "mdgf-exp", "dense", "mdgf-exp-steps")}
    monkeypatch.setattr(progressive_nm, "INNER", 64)
    whole = experiment(toy)
    seconds = tuple(s for s in whole.secondaries if s.baseline in few and s.method in few)
    tuning = dataclasses.replace(whole.tuning, choices={a: whole.tuning.choices[a] for a in ("sr-ste", "mdgf-exp")})  # type: ignore[union-attr, type-var]
    quick = dataclasses.replace(
        whole, arms={n: a.what for n, a in few.items()}, secondaries=seconds, tuning=tuning, pilot_runs=2, most_runs=2,
        secondary_runs=2,
    )  # fmt: skip
    document = prove("progressive_nm", experiment=quick, units=2, directory=tmp_path)
    assert document["verdict"] in ("holds", "fails", "underpowered", "inconclusive")
    runs = {run["arm"]: run["outcome"] for run in document["runs"] if run["stage"] == "run" and run["index"] == 0}
    assert set(runs) == set(few)
    for arm, outcome in runs.items():
        values = outcome["values"]
        assert 0 < values[BITS]["seed"] < 12
        assert values[SPENT]["seed"] <= 1 or arm == "mdgf-exp-steps"
        assert values[SPENT_NEEDED]["seed"] <= values[SPENT]["seed"] or arm == "dense"
        assert (NOISE in values) == (arm != "dense")
        assert outcome["cost"]["tokens"] == 2 * 32 * values[STEPS]["seed"]
    assert runs["sr-ste"]["values"][SPENT]["seed"] == 1
    assert runs["dense"]["cost"]["parameters"] > runs["sr-ste"]["cost"]["parameters"]
    assert runs["mdgf-exp"]["cost"]["parameters"] == runs["sr-ste"]["cost"]["parameters"]
    assert runs["mdgf-exp-steps"]["values"][STEPS] == runs["sr-ste"]["values"][STEPS]


def test_a_run_is_decided_by_its_seed(toy: Sparse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progressive_nm, "INNER", 64)
    unit = Unit("run", 0)
    once, again = (toy("mdgf-exp", unit, 4) for _ in range(2))
    assert once.values == again.values
    assert once.shared == toy("ste", unit, 4).shared
    assert once.values[BITS] != toy("mdgf-exp", unit, 6).values[BITS]


def test_operations_are_six_a_weight_and_what_attention_takes() -> None:
    assert spent(FOUND, None, 10) == 10 * (6 * 600 + 3 * 50)
    method = method_of("ste", {})
    assert spent(FOUND, method, 10) == pytest.approx(10 * (6 * 200 + 400 * (4 / 16 + 2) + 150))
    chain, straight = (method_of(arm, {"finetune": 0.95}) for arm in ("mdgf-exp", "mdgf-exp-ste"))
    dense, sparse = 6 * 600 + 150, 6 * 200 + 150
    needed = spent(FOUND, chain, 100, all_gradients=False)
    assert needed == pytest.approx(5 * dense + 95 * (sparse + 400 * 6 / 16))
    assert spent(FOUND, straight, 100) == pytest.approx(5 * dense + 95 * (sparse + 400 * (4 / 16 + 2)))
    assert spent(FOUND, chain, 100) == spent(FOUND, straight, 100)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_tries_four_settings_and_keeps_within_the_budget(arm: str) -> None:
    run: Any = EXPERIMENTS["cpu"].run_unit
    assert len(ARMS[arm].choices) == 4
    found = sizes(run.world.new(0, intermediate_size=INNER), run.world.context)
    for choice in ARMS[arm].choices.values():
        method = method_of(arm, choice)
        steps, budget = run.plan(arm, method, found)
        assert steps < run.world.steps
        if ARMS[arm].budget == "operations":
            assert 0.98 < spent(found, method, steps) / budget <= 1
        else:
            assert steps == run.steps
        shape = ARMS[arm].shape
        assert (method is None) == (shape is None)


def test_the_weights_of_the_world_are_counted() -> None:
    world = SourceCode(width=32, depth=2, context=64)
    found = sizes(world.new(0, intermediate_size=96), 64)
    assert found == Sizes(dense=2 * 4 * 32 * 32 + 260 * 32, pruned=2 * 3 * 32 * 96, attention=2 * 4 * 32 * 32)


def test_a_budget_that_nothing_fits_is_refused() -> None:
    assert steps_within(10.0, lambda steps: 2.0 * steps, 100) == 5
    for budget in (1.0, 1000.0):
        with pytest.raises(IntaglioError, match="steps fit the budget"):
            steps_within(budget, lambda steps: 2.0 * steps, 100)


def test_the_committed_claim_is_the_one_that_runs() -> None:
    chosen = EXPERIMENTS["cpu"]
    committed: Any = record.preregistered("progressive_nm")
    assert committed["digest"] == chosen.digest
    assert experiment_of("progressive_nm") is chosen
    assert {k: v for k, v in committed.items() if k != "digest"} == json.loads(json.dumps(chosen.preregistration()))
    assert pickle.loads(pickle.dumps(chosen.run_unit)) == chosen.run_unit
