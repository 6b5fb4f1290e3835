"""The claim of bitnet, its plumbing, at a tiny scale."""

from __future__ import annotations

import dataclasses
import json
import pickle
import random
from pathlib import Path

import pytest
import torch

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.from_scratch import new
from intaglio.evidence import record
from intaglio.evidence.bitnet import (
    ARMS,
    BASELINE,
    BITS,
    BYTES,
    EXPERIMENTS,
    LINEAR_BYTES,
    METHOD,
    RATES,
    InnerNorms,
    Pretrain,
    experiment,
    projection_bytes,
)
from intaglio.evidence.experiment import Tuning, Unit
from intaglio.evidence.run import experiment_of, prove
from intaglio.evidence.worlds.source_code import SourceCode
from intaglio.methods.weights.bitnet import BitNet
from intaglio.modeling.anatomy import anatomy
from intaglio.trainer import CausalLM, train
from tests.trainer.conftest import _garbage_put_aside  # noqa: F401


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SourceCode:
    root = tmp_path_factory.mktemp("source") / "made_up"
    root.mkdir()
    draw = random.Random(0)
    for number in range(80):
        lines = "\n".join(f"name_{n} = {draw.randint(0, 99)} + other_{number}" for n in range(12))
        (root / f"m{number}.py").write_text(f"other_{number} = {number}\n{lines}\n", encoding="utf-8")
    return SourceCode(
        folder=str(root), width=16, depth=1, context=64, steps=2, batch=2, documents_run=3, documents_pilot=3, tokens=64
    )


def test_end_to_end(world: SourceCode, tmp_path: Path) -> None:
    tuning = Tuning({arm: {"5e-3": "one choice"} for arm in ARMS})
    quick = dataclasses.replace(experiment(world), pilot_runs=2, most_runs=2, secondary_runs=2, tuning=tuning)
    document = prove("bitnet", experiment=quick, units=2, directory=tmp_path)
    assert document["verdict"] in ("holds", "fails", "underpowered", "inconclusive")
    assert set(document["arms"]) == set(ARMS)
    runs = {run["arm"]: run["outcome"] for run in document["runs"] if run["stage"] == "run" and run["index"] == 0}
    assert {outcome["cost"]["tokens"] for outcome in runs.values()} == {2 * 2 * 64}
    assert runs[METHOD]["cost"]["parameters"] > 2 * runs[BASELINE]["cost"]["parameters"]
    assert runs[METHOD]["values"][LINEAR_BYTES]["seed"] < runs["full-2h"]["values"][LINEAR_BYTES]["seed"] / 2
    assert runs[METHOD]["values"][BYTES]["seed"] < runs["full-2h"]["values"][BYTES]["seed"]
    assert runs["mean-2h"]["values"][LINEAR_BYTES] == runs[METHOD]["values"][LINEAR_BYTES]
    assert all(0 < outcome["values"][BITS]["seed"] < 10 for outcome in runs.values())
    assert len({outcome["values"][BITS]["seed"] for outcome in runs.values()}) == len(ARMS)


def test_the_baseline_has_the_norms_of_the_ternary_arm_and_its_weights() -> None:
    def made() -> Checkpoint:
        return new("llama", width=16, depth=1, context=32, heads=2)

    ids, settings = torch.arange(64).view(2, 32), {"steps": 1, "learning_rate": 1e-12, "note": False}
    normed, ternary, plain = made(), made(), made()
    before = [linear.read().clone() for _, linear in anatomy(normed.model).all_linears()]
    train(normed, ids, objective=CausalLM(32), modifiers=[InnerNorms()], **settings)
    assert projection_bytes(normed) == projection_bytes(plain)
    with torch.no_grad():
        expected = plain.model(ids).logits
        assert not torch.allclose(normed.model(ids).logits, expected, atol=1e-2)
    # Eight bits of everything, with the norm: nearly the same function.
    train(ternary, ids, objective=CausalLM(32), modifiers=[BitNet(bits=8.0, norm="layernorm")], **settings)
    with torch.no_grad():
        a, b = normed.model(ids).logits, ternary.model(ids).logits
    assert float((a - b).abs().mean() / a.abs().mean()) < 0.05
    kept = [m.dense() for m in normed.model.modules() if type(m).__name__ == "Normed"]
    assert all(torch.allclose(one, other) for one, other in zip(before, kept, strict=True))


def test_arms_see_the_same_and_choose_from_the_same(world: SourceCode) -> None:
    run = Pretrain(world)
    outcomes = [run(arm, Unit("tuning", 0, 0, "2e-3"), 5) for arm in (BASELINE, METHOD)]
    assert outcomes[0].shared == outcomes[1].shared
    tuning = experiment(world).tuning
    assert tuning is not None
    assert {tuple(choices) for choices in tuning.choices.values()} == {tuple(RATES)}
    assert set(tuning.choices) == set(ARMS)
    assert all(set(arm.ternary) == {"scale"} for arm in ARMS.values() if arm.ternary is not None)


def test_what_is_committed_is_the_claim() -> None:
    found = experiment_of("bitnet")
    assert (found.kind, found.delta, found.tier) == ("as good as", 0.02, "cpu")
    assert record.preregistered("bitnet")["digest"] == found.digest  # type: ignore[index]
    assert json.loads(json.dumps(found.preregistration()))["settings"]["learning rates"] == list(RATES.values())
    assert pickle.loads(pickle.dumps(EXPERIMENTS["cpu"].run_unit)) == EXPERIMENTS["cpu"].run_unit
