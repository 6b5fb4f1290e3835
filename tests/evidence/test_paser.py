"""PASER's claim: its world and its runner at a tiny size, and what the arms share."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import replace

import pytest

from intaglio.data.python_source import SourceFile
from intaglio.errors import IntaglioError
from intaglio.evidence import paser, record
from intaglio.evidence.experiment import Unit
from intaglio.evidence.paser import ARMS, EXPERIMENTS, LOSS, RATES, Recover
from intaglio.evidence.run import experiment_of
from intaglio.evidence.worlds import instructions, prompts
from intaglio.evidence.worlds.instructions import KINDS, Instructions, answer_losses, as_row
from intaglio.evidence.worlds.prompts import Prompts
from intaglio.evidence.worlds.smollm2 import SmolLM2Wikipedia
from tests.families import tiny_checkpoint_dir


def module(number: int) -> SourceFile:
    text = "".join(
        f'def f{k}(x):\n    """Return the sum of x and {number} plus {k}.\n\n    The sum is taken twice for'
        f' number {number} and {k}, and what comes out is given back to whoever asked."""\n'
        f"    total = x\n    total += {number}\n    total += {k}\n    return total\n\n\n"
        for k in range(3)
    )
    return SourceFile("one", f"one.m{number}", text, f"{number}")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recover]:
    folder = tmp_path_factory.mktemp("world")
    model = tiny_checkpoint_dir("llama", folder / "tiny", layers=1)
    for n in range(60):
        text = (
            f"article {n} says that the quick brown fox {n} jumps over the lazy dog, and that the other one is there. "
        )
        (folder / f"{n}.txt").write_text(text * 5, encoding="utf-8")
    patch = pytest.MonkeyPatch()
    patch.setenv("INTAGLIO_HOME", str(folder / "home"))
    patch.setattr(prompts, "source_files", lambda packages: [module(number) for number in range(80)])
    caches = (prompts._modules, prompts._functions, instructions._texts, instructions._documented)
    for cache in (*caches, paser._pruned, paser.look):
        cache.cache_clear()
    articles = SmolLM2Wikipedia(model=str(model), texts=str(folder), samples=4, length=24)
    world = Instructions(Prompts(articles, packages=("one",)), each_pool=8, each_run=2, each_pilot=1, asked=40, said=20)
    yield Recover(world, tokens=192, row=48, batch=2, rank=2, embedding="tfidf")
    patch.undo()
    for cache in (*caches, paser._pruned, paser.look):
        cache.cache_clear()


def test_the_world_is_split_and_seeded(run: Recover) -> None:
    world = run.world
    pool = world.pool(0)
    assert pool == world.pool(0) != world.pool(1)
    assert [one.kind for one in pool] == [kind for kind in KINDS for _ in range(8)]
    assert len({one.name for one in pool}) == len(pool)
    held = {stage: world.measured(stage) for stage in ("tuning", "pilot", "run")}  # type: ignore[arg-type]
    assert [len(found) for found in held.values()] == [4, 4, 8]
    # Of an article its hash, without the paragraph.
    made_of = [{one.name.partition(":")[0] for one in found} for found in (pool, *held.values())]
    assert not any(a & b for n, a in enumerate(made_of) for b in made_of[:n])
    assert world.measured("run", 1) != held["run"]
    tokenizer = world.load().tokenizer
    assert all(len(as_row(tokenizer, one)["input_ids"]) <= 40 + 20 + 48 for one in pool)
    with pytest.raises(IntaglioError, match="9000 code pairs were asked for; the train set has texts for"):
        replace(world, each_pool=9000).pool(0)


def test_losses_are_those_of_answers_alone(run: Recover) -> None:
    checkpoint, pairs = run.world.load(), run.world.measured("run")
    found = answer_losses(checkpoint, pairs)
    one = pairs[3]
    row = as_row(checkpoint.tokenizer, one)
    asked = int((row["labels"] == -100).sum())
    logits = checkpoint.model(input_ids=row["input_ids"][None]).logits[0].log_softmax(-1)
    wanted = -logits.detach()[asked - 1 : -1].gather(1, row["input_ids"][asked:, None]).mean()
    assert found[one.name] == pytest.approx(float(wanted), rel=1e-4)
    assert set(found) == {pair.name for pair in pairs}


def test_every_arm_trains_on_as_many_tokens(run: Recover) -> None:
    unit = Unit("pilot", 0)
    outcomes = {arm: run(arm, unit, unit.seed) for arm in ("random", "paser", "none")}
    names = {pair.name for pair in run.world.measured("pilot")}
    losses = {}
    for arm, outcome in outcomes.items():
        assert set(outcome.values[LOSS]) == names
        assert outcome.shared == outcomes["random"].shared
        assert outcome.cost.tokens == (0 if arm == "none" else 384)
        losses[arm] = tuple(outcome.values[LOSS].values())
    assert len(set(losses.values())) == 3
    assert outcomes["paser"].cost.flops > outcomes["random"].cost.flops
    taken = {arm: run.taken(arm, unit.seed) for arm in ARMS if arm != "none"}
    sums = {arm: sum(len(pair["input_ids"]) for pair in found) for arm, (found, _) in taken.items()}
    assert sums == {arm: 384 if arm == "full" else 192 for arm in taken}
    assert taken["paser"][1] > taken["uniform"][1] > taken["random"][1] == 0
    assert len({str(found) for found, _ in taken.values()}) >= len(taken) - 1  # the graph may leave nothing out
    assert run.taken("paser", unit.seed)[0][0]["input_ids"].equal(taken["paser"][0][0]["input_ids"])
    other = run("paser", replace(unit, choice="0.0003"), unit.seed)
    assert other.values != outcomes["paser"].values


def test_a_pool_is_looked_at_once(run: Recover, monkeypatch: pytest.MonkeyPatch) -> None:
    first = paser.look(run, 5)
    paser.look.cache_clear()
    monkeypatch.setattr("intaglio.methods.training.paser.PASER.look", None)
    second = paser.look(run, 5)
    assert (second.labels, second.degradation, second.seconds) == (first.labels, first.degradation, first.seconds)


def test_it_is_the_committed_one() -> None:
    committed = record.preregistered("paser")
    assert committed is not None
    own = experiment_of("paser")
    assert committed["digest"] == own.digest
    assert json.loads(json.dumps(own.preregistration())) == {k: v for k, v in committed.items() if k != "digest"}
    assert (own.delta, own.metric, own.kind) == (0.02, LOSS, "better")
    assert own.tuning is not None
    assert set(own.tuning.choices) == set(ARMS) - {"none"}
    assert set(RATES) == set(own.tuning.choices["paser"])
    assert pickle.loads(pickle.dumps(EXPERIMENTS["cpu"].run_unit)) == EXPERIMENTS["cpu"].run_unit
