"""The claim of MEAP, its plumbing, on a toy in the place of a GPU."""

from __future__ import annotations

import dataclasses
import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from intaglio.errors import IntaglioError
from intaglio.evidence import meap, record
from intaglio.evidence.experiment import Experiment, Unit
from intaglio.evidence.meap import (
    ARMS,
    BITS,
    EXPERIMENTS,
    GRID,
    NEEDLES,
    TUNED_LOSS,
    TUNED_NEEDLES,
    Asking,
    Needles,
    Noise,
    Pretrain,
    experiment,
    plant,
)  # fmt: skip
from intaglio.evidence.run import experiment_of, prove
from intaglio.evidence.worlds.source_code import SourceCode
from intaglio.methods.objectives.meap import MEAP
from intaglio.trainer import KeyedRNG
from tests.trainer.conftest import _garbage_put_aside  # noqa: F401

ASKING = Asking(lengths=(200, 240), depths=(0.0, 1.0), facts=2, documents=3)
TEXT = "".join(f"name_{n} = {n} + {n}\n" for n in range(60)).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up source with documented functions."""
    root = tmp_path_factory.mktemp("source") / "made_up"
    root.mkdir()
    draw = random.Random(0)
    for number in range(40):
        body = "\n".join(f"    value = value + {draw.randint(0, 99)}" for _ in range(draw.randint(4, 12)))
        text = f'def add_{number}(value):\n    """Return the value with {number} more than before."""\n{body}\n'
        (root / f"m{number}.py").write_text(f"{text}    return value\n" * 2, encoding="utf-8")
    return root


@pytest.fixture
def toy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Pretrain:
    monkeypatch.setattr(meap, "_kept", [])
    world = SourceCode(
        folder=str(folder), width=16, depth=1, context=256, steps=2, batch=2, documents_run=3, documents_pilot=3,
        tokens=240,
    )  # fmt: skip
    return Pretrain(world, ASKING, tuning_steps=1, tuning_length=256, device="cpu")


def quick(run: Pretrain) -> Experiment:
    return dataclasses.replace(experiment(run), pilot_runs=2, most_runs=2, secondary_runs=2)


def test_end_to_end(toy: Pretrain, tmp_path: Path) -> None:
    document = prove("meap", experiment=quick(toy), units=2, directory=tmp_path)
    assert document["verdict"] in ("holds", "fails", "underpowered", "inconclusive")
    assert set(document["arms"]) == set(ARMS)
    assert len(document["secondaries"]) == 6
    run = [run["outcome"] for run in document["runs"] if run["stage"] == "run" and run["index"] == 0]
    for outcome in run:
        assert outcome["cost"]["tokens"] == 2 * 2 * 256
        assert set(outcome["values"][GRID]) == {"200@0.00", "200@1.00", "240@0.00", "240@1.00"}
        assert 0 < outcome["values"][BITS]["seed"] < 10
    assert len({outcome["values"][BITS]["seed"] for outcome in run}) == len(ARMS)
    assert [TUNED_NEEDLES in outcome["values"] for outcome in run] == [True, True, False]


def test_a_run_is_decided_by_its_seed_and_the_plain_model_is_trained_once(
    toy: Pretrain,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []
    new = SourceCode.new

    def counted(self: SourceCode, seed: int, **more: Any) -> Any:
        made.append(seed)
        return new(self, seed, **more)

    monkeypatch.setattr(SourceCode, "new", counted)
    unit = Unit("run", 0)
    plain, method = toy("ntp", unit, 4), toy("meap", unit, 4)
    assert made == [4, 4]  # the plain one stood ready for fine-tuning
    meap._kept.clear()
    again = toy("meap", unit, 4)
    assert again.values == method.values
    assert again.shared == method.shared == plain.shared
    assert plain.values[BITS] != method.values[BITS]
    assert plain.values[TUNED_LOSS] != method.values[TUNED_LOSS]


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_needle_stands_where_it_should_and_is_the_same_everywhere(depth: float) -> None:
    short, long = (plant(TEXT, "a", length, depth, 3) for length in (300, 600))
    for document, length in ((short, 300), (long, 600)):
        assert len(document) == length
        body, _, question = document.decode().rpartition("# The number of ")
        key, value = question.split(" is ")
        fact = f"# The number of {key} is {value}.\n"
        assert body.count(fact) == 1
        assert body.count("# The number of ") == 3
        # Facts stand between lines: without them the text is what it was.
        lines = [line for line in body.splitlines(keepends=True) if not line.startswith("#")]
        assert TEXT.decode().startswith("".join(lines)[:-1])
        before = body[: body.index(fact)]
        text = "".join(line for line in before.splitlines(keepends=True) if not line.startswith("#"))
        assert abs(len(text) / sum(map(len, lines)) - depth) < 0.1
    assert short[-20:] == long[-20:]
    assert short[-20:] != plant(TEXT, "b", 300, depth, 3)[-20:]
    with pytest.raises(IntaglioError, match="facts and question alone take"):
        plant(TEXT, "a", 90, depth, 3)


def test_an_answer_is_right_if_every_byte_of_it_is() -> None:
    needles = Needles(torch.arange(20).repeat(3, 1))
    said = torch.roll(needles.ids_NT, -1, 1)
    assert needles.right_N(said).tolist() == [True] * 3
    said[0, -2], said[1, -6], said[2, -5] = 0, 0, 0
    assert needles.right_N(said).tolist() == [False, True, False]


def test_the_control_hides_the_same_places_with_other_bytes() -> None:
    row = {"input_ids": torch.arange(5, 105), "id": 3, "epoch": 0, "step": 0}
    methods = [kind(length=128) for kind in (MEAP, Noise)]
    hidden, noise = (method._hide(row, KeyedRNG(0)) for method in methods)
    where = hidden["input_ids"] == -1  # the mask token of a method that has seen no checkpoint
    assert torch.equal(where.nonzero().flatten(), methods[1].positions(row, KeyedRNG(0)))
    assert torch.equal(hidden["input_ids"][~where], noise["input_ids"][~where])
    assert not (noise["input_ids"] < 0).any()
    assert torch.equal(hidden["labels"], noise["labels"])


def test_the_committed_claim_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = EXPERIMENTS["gpu"]
    committed: Any = record.preregistered("meap")
    assert committed == {"digest": chosen.digest, **json.loads(json.dumps(chosen.preregistration()))}, (
        "the experiment changed: before the first run, write its registration anew"
    )
    assert (chosen.metric, chosen.delta, chosen.tier, chosen.design) == (NEEDLES, 3.0, "gpu", "independent")
    assert chosen.equal == ("tokens", "parameters")
    assert pickle.loads(pickle.dumps(chosen)).digest == chosen.digest
    assert experiment_of("meap", "gpu") is chosen
    with pytest.raises(IntaglioError, match="not made for the tier cpu; accepted: gpu"):
        prove("meap", tier="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(IntaglioError, match="the tier gpu needs a CUDA device, and this machine has none"):
        prove("meap", tier="gpu")
