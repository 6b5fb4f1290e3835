"""The transplant's claim: its world and its runner at a tiny size, and what the arms share."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from pathlib import Path

import pytest
import torch

from intaglio.errors import IntaglioError
from intaglio.evidence import record
from intaglio.evidence.experiment import Unit
from intaglio.evidence.omp_transplant import AFTER, ARMS, CHOICES, EXPERIMENTS, LOSS, NEW, Transplant, experiment
from intaglio.evidence.run import experiment_of, prove
from intaglio.evidence.worlds.two_tokenizers import TwoTokenizers, nats_per_byte

SOURCE = '''def area_{n}(width, height):
    """Return the area of a rectangle, number {n}."""
    total = width * height + {n}
    return total


class Shape{n}:
    def __init__(self, name):
        self.name = name
'''


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TwoTokenizers:
    folder = tmp_path_factory.mktemp("source")
    for n in range(80):
        (folder / f"file{n}.py").write_text("\n".join(SOURCE.format(n=n * 7 + m) for m in range(3)), encoding="utf-8")
    return TwoTokenizers(
        folder=str(folder), vocab=300, donor_vocab=360, width=16, donor_width=40, depth=1, context=16, steps=3, batch=2,
        documents_run=3, documents_pilot=2, size=64,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path_factory.getbasetemp() / "transplant-home"
    monkeypatch.setenv("INTAGLIO_HOME", str(home))


def test_the_world_is_split_and_sealed(world: TwoTokenizers) -> None:
    base, donor = world.tokenizer("base"), world.tokenizer("donor")
    assert base.get_vocab() != donor.get_vocab()
    texts = {stage: set(world.documents(stage)) for stage in ("tuning", "pilot", "run")}  # type: ignore[arg-type]
    assert {len(names) for names in texts.values()} == {2, 3}
    assert not texts["tuning"] & texts["pilot"]
    assert not texts["run"] & (texts["pilot"] | texts["tuning"])
    train = {name[:12] for name in world.source.part("train").hashes}
    assert not train & set().union(*texts.values())
    windows, fewer = world.training("base", 5), world.training("base", 5, 1)
    assert torch.equal(windows.ids_NT[: fewer.n], fewer.ids_NT)
    assert windows.ids_NT.max() < len(base)
    assert world.documents("run") == world.documents("run") != world.documents("run", 1)
    assert not torch.equal(world.training("base", 6).ids_NT, windows.ids_NT)


def test_nats_are_told_by_the_byte(world: TwoTokenizers) -> None:
    checkpoint = world.new("base", 0)
    checkpoint.model.lm_head.weight.data.zero_()  # every token is as likely as any other
    text = "width é height"
    tokens = len(checkpoint.tokenizer(text, add_special_tokens=False)["input_ids"])
    (found,) = nats_per_byte(checkpoint, {"a": text}).values()
    expected = tokens * math.log(checkpoint.vocabulary) / len(text.encode())
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_tiny_run(world: TwoTokenizers) -> None:
    run = Transplant(world, steps=2)
    unit = Unit("pilot", 0)
    found = {arm: run(arm, unit, unit.seed) for arm in ("omp", "zero", "own")}
    documents = set(world.documents("pilot"))
    for outcome in found.values():
        assert {metric: set(values) for metric, values in outcome.values.items()} == dict.fromkeys(
            (LOSS, AFTER, NEW), documents
        )
        assert outcome.shared == found["omp"].shared
        assert outcome.cost.tokens == found["omp"].cost.tokens == 2 * world.batch * world.context
    assert sum(found["own"].values[NEW].values()) == 0  # type: ignore[arg-type]
    assert found["omp"].values[NEW] == found["zero"].values[NEW]
    assert found["omp"].values[LOSS] != found["zero"].values[LOSS]


def test_every_arm_and_choice_right_after_the_swap(world: TwoTokenizers) -> None:
    run, seed = Transplant(world), Unit("pilot", 0).seed
    losses = {}
    for arm in ARMS:
        for choice in CHOICES.get(arm, {"": ""}):
            outcome = run(arm, Unit("tuning", 0, choice=choice), seed)
            assert outcome.values.keys() == {LOSS, NEW}
            losses[arm, choice] = tuple(outcome.values[LOSS].values())
    assert losses["untaught", "mean"] == losses["mean", ""]
    assert losses["untaught", "zero"] == losses["zero", ""]
    assert losses["omp", "4"] == losses["omp-default", ""]  # a tenth of the width of this donor
    assert len(set(losses.values())) == len(losses) - 3
    assert len({len(choices) for choices in CHOICES.values()}) == 1


@pytest.mark.slow
def test_end_to_end(world: TwoTokenizers, tmp_path: Path) -> None:
    quick = dataclasses.replace(experiment(Transplant(world, steps=1)), pilot_runs=2, most_runs=2, secondary_runs=2)
    document = prove("omp_transplant", experiment=quick, directory=tmp_path)
    assert document["verdict"] in ("holds", "fails", "underpowered", "inconclusive")
    assert document["sizes"] == {"training seed": 2, "document": 3, "pairs": 6}
    assert len(document["secondaries"]) == len(quick.secondaries)


def test_it_is_the_committed_one() -> None:
    committed = record.preregistered("omp_transplant")
    assert committed is not None
    own = experiment_of("omp_transplant")
    assert committed["digest"] == own.digest
    assert json.loads(json.dumps(own.preregistration())) == {k: v for k, v in committed.items() if k != "digest"}
    assert (own.delta, own.metric, own.kind) == (0.1, LOSS, "better")
    assert pickle.loads(pickle.dumps(EXPERIMENTS["cpu"].run_unit)) == EXPERIMENTS["cpu"].run_unit


def test_too_little_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n", encoding="utf-8")
    with pytest.raises(IntaglioError):
        TwoTokenizers(folder=str(tmp_path), vocab=300, donor_vocab=300).documents("run")
