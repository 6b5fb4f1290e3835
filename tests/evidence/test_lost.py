"""The claim of LOST, its plumbing, on a toy."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from intaglio.errors import IntaglioError
from intaglio.evidence import lost, record
from intaglio.evidence.experiment import Experiment, Unit
from intaglio.evidence.lost import ARMS, BITS, EXPERIMENTS, FAMILY, NORM, Arm, Pretrain, experiment, flops
from intaglio.evidence.run import experiment_of, prove
from intaglio.evidence.worlds.source_code import SourceCode
from intaglio.methods.weights.lost import LOST, ElementsLinear, LostLinear
from intaglio.modeling.anatomy import anatomy
from tests.trainer.conftest import _garbage_put_aside  # noqa: F401


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SourceCode:
    root = tmp_path_factory.mktemp("source") / "made_up"
    root.mkdir()
    for number in range(40):
        (root / f"m{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n" * 4, encoding="utf-8")
    return SourceCode(
        folder=str(root),
        width=128,
        depth=1,
        context=32,
        steps=1,
        batch=2,
        documents_run=3,
        documents_pilot=3,
        tokens=24,
    )


def quick(world: SourceCode) -> Experiment:
    chosen = experiment(world)
    assert chosen.tuning is not None
    # The two of the claim alone choose here, between two rates.
    tried = {arm: chosen.tuning.choices[arm] for arm in ("low-rank", "lost")}
    choices = {arm: dict(list(rates.items())[:2]) for arm, rates in tried.items()}
    tuning = dataclasses.replace(chosen.tuning, choices=choices)
    return dataclasses.replace(chosen, pilot_runs=2, most_runs=2, secondary_runs=2, tuning=tuning)


def test_end_to_end(world: SourceCode, tmp_path: Path) -> None:
    document = prove("lost", experiment=quick(world), units=2, directory=tmp_path)
    assert document["verdict"] in ("holds", "fails", "underpowered", "inconclusive")
    assert set(document["arms"]) == set(ARMS)
    assert len(document["secondaries"]) == 9
    first = {r["arm"]: r["outcome"] for r in document["runs"] if r["stage"] == "run" and r["index"] == 0}
    assert {outcome["cost"]["tokens"] for outcome in first.values()} == {2 * 32}
    assert len({outcome["values"][BITS]["seed"] for outcome in first.values()}) == len(ARMS)
    assert len({first[arm]["cost"]["parameters"] for arm in FAMILY}) == 1
    assert first["full"]["values"][NORM]["seed"] == 1.0
    # The best approximation of a random matrix is a large part of it, and a drawn pair has a scale of its own.
    assert 0.5 < first["low-rank-svd"]["values"][NORM]["seed"] < 1.0
    assert first["sltrain"]["values"][NORM]["seed"] == 0.0


def test_low_rank_arms_have_equal_parameters_in_every_projection_of_the_real_world() -> None:
    run, counts = EXPERIMENTS["cpu"].run_unit, {}
    assert isinstance(run, Pretrain)
    for arm in FAMILY:
        modules = run.begin(arm, 3).model.modules()
        counts[arm] = [m.trained_parameters for m in modules if isinstance(m, (LostLinear, ElementsLinear))]
    assert len(counts["lost"]) == 4 * 7
    assert all(count == counts["low-rank"] for count in counts.values())

    def blocks(arm: str) -> int:
        parts = anatomy(run.begin(arm, 3).model)
        return sum(p.numel() for block in parts.blocks for p in block.parameters())

    assert 1.0 < blocks("narrow") / blocks("lost") < 1.02
    assert blocks("full") / blocks("lost") > 2.5


def test_an_arm_with_more_parameters_is_refused(world: SourceCode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lost.ARMS, "lost", Arm("unpaid", LOST(rank=32, columns=lost.SHARE)))
    with pytest.raises(IntaglioError, match=r"the arm lost has .* numbers, and a pair of rank 32 has"):
        Pretrain(world).begin("lost", 0)


def test_arms_begin_with_the_same_weights_and_differ_in_the_method_alone(world: SourceCode) -> None:
    run = Pretrain(world)
    embeddings = [run.begin(arm, 5).model.get_input_embeddings().weight for arm in ARMS if arm != "narrow"]
    assert all(torch.equal(embeddings[0], other) for other in embeddings)
    chosen, random = (
        run.begin(arm, 5).model.get_submodule("model.layers.0.mlp.up_proj") for arm in ("lost", "lost-random")
    )
    assert torch.equal(chosen.A, random.A)
    assert not torch.equal(chosen.columns, random.columns)
    lone = {name: arm.method.model_dump() for name, arm in ARMS.items() if arm.method is not None}
    differ = {key for key in lone["lost"] if lone["lost"][key] != lone["lost-random"][key]}
    assert differ == {"columns_by"}
    assert {key for key in lone["lost"] if lone["lost"][key] != lone["lost-identity"][key]} == {"activation"}
    assert {key for key in lone["low-rank"] if lone["low-rank"][key] != lone["low-rank-svd"][key]} == {"init"}


def test_a_run_is_decided_by_its_seed_and_the_rate_by_its_choice(world: SourceCode) -> None:
    run = Pretrain(world)
    units = [Unit("run", 0, choice=choice) for choice in ("0.005", "0.005", "0.012")]
    first, again, other = (run("lost", unit, 4) for unit in units)
    assert first.values == again.values != other.values
    assert first.shared == other.shared == run("low-rank", units[0], 4).shared


def test_operations_by_hand(world: SourceCode) -> None:
    run = Pretrain(world)
    model = run.begin("lost", 0).model
    assert flops(model, 10, 3) == 60 * sum(p.numel() for p in model.parameters())
    sltrain, full = run.begin("sltrain", 0).model, run.begin("full", 0).model
    made = sum(8 * m.rank * m.in_features * m.out_features for m in sltrain.modules() if isinstance(m, ElementsLinear))
    assert flops(sltrain, 10, 3) == flops(full, 10, 3) + 3 * made


def test_the_committed_claim_is_the_one_that_runs() -> None:
    chosen = experiment_of("lost")
    assert chosen is EXPERIMENTS["cpu"]
    assert (chosen.metric, chosen.delta, chosen.tier, chosen.design) == (BITS, 0.02, "cpu", "independent")
    assert (chosen.baseline, chosen.method, chosen.kind) == ("low-rank", "lost", "better")
    assert chosen.factors == ("training seed",)
    committed: Any = record.preregistered("lost")
    assert committed == {"digest": chosen.digest, **json.loads(json.dumps(chosen.preregistration()))}, (
        "the experiment changed: before the first run, write its registration anew"
    )
    assert pickle.loads(pickle.dumps(chosen)).digest == chosen.digest
