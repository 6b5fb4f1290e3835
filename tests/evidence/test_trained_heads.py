"""The plumbing of the claims about trained heads, end to end on a tiny model in the place of SmolLM2."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from intaglio.errors import IntaglioError
from intaglio.evidence import chimera, hidden_transfer, trained_heads
from intaglio.evidence.experiment import Experiment, Unit
from intaglio.evidence.run import experiment_of, prove
from intaglio.evidence.trained_heads import NODES, SECONDS, TOKENS, Arm, Training, accepted, matched, medusa_heads, size
from intaglio.evidence.worlds.smollm2 import SmolLM2Wikipedia
from intaglio.methods.decoding.chimera import Chimera
from intaglio.methods.decoding.hidden_transfer import HiddenTransfer
from intaglio.speculative.drafters.medusa import MedusaHeads
from intaglio.speculative.heads.self_generated_data import extract_prompts
from intaglio.speculative.static_tree import default_acceptance
from tests.families import tiny_checkpoint_dir, tiny_model

QUICK = Training(texts=4, prompt=4, length=16, epochs=1, batch_size=2, rates=(1e-3,), trial=1, threads=1)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> SmolLM2Wikipedia:
    model = tiny_checkpoint_dir("llama", tmp_path_factory.mktemp("world") / "tiny", layers=1)
    return SmolLM2Wikipedia(model=str(model), texts=str(corpus_file), documents_run=3, documents_pilot=2, tokens=20)


@pytest.fixture(autouse=True)
def _home(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("slow"):
        return  # those see the bundled texts
    monkeypatch.setenv("INTAGLIO_HOME", str(tmp_path / "home"))
    trained_heads._ready.clear()


def quick(slug: str, world: SmolLM2Wikipedia, training: Training = QUICK) -> Experiment:
    made = chimera.experiment(world, training, 4) if slug == "chimera" else (
        hidden_transfer.experiment(world, training, blocks=1, new=4)
    )  # fmt: skip
    return dataclasses.replace(made, pilot_runs=2, most_runs=2, threads=1)


@pytest.mark.parametrize("slug", ["chimera", "hidden_transfer"])
def test_end_to_end(slug: str, small: SmolLM2Wikipedia, tmp_path: Path) -> None:
    chosen = quick(slug, small)
    document = prove(slug, experiment=chosen, directory=tmp_path)
    assert document["verdict"] in ("holds", "fails", "underpowered", "inconclusive")
    assert set(document["arms"]) == set(chosen.arms)
    tokens = set()
    for run in document["runs"]:
        values = run["outcome"]["values"]
        assert all(value["prompt"] >= 1 for name, value in values.items() if name != SECONDS)
        tokens.add(run["outcome"]["cost"]["tokens"])
    assert len(tokens) == 1


def test_all_arms_say_the_same_and_heads_are_trained_once(
    small: SmolLM2Wikipedia, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = small.load()
    prompt = small.documents("run").segments.ids_NT[1].tolist()
    model: Any = target.model
    stock = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0
    )[0, len(prompt) :].tolist()  # fmt: skip
    arms = {**chimera.ARMS, **hidden_transfer.arms(1)}
    two = {name: arms[name] for name in ("chimera", "medusa")}
    training = dataclasses.replace(QUICK, rates=(1e-3, 1e-4))
    trainer = trained_heads.Trainer(small, training, "test", two)
    for arm in two:
        drafter, own = trainer.drafter(arm)
        found = trained_heads.go_on(target, drafter, prompt, 8)
        assert list(found.ids) == stock
        assert found.rows <= len(prompt) + (len(found.steps) - 1) * (NODES + 1)
        assert own > 0
    trained_heads._ready.clear()
    monkeypatch.setattr(trained_heads.Trainer, "_train", None)  # found again, not trained again
    assert trainer.drafter("chimera")[1] > 0
    with pytest.raises(Exception, match="prompt 3 was asked for; the world has 3"):
        trained_heads.Continue(small, training, "test", tuple(two.items()), 4)("chimera", Unit("run", 3), 0)


def test_as_many_texts_are_written_as_the_claim_says(small: SmolLM2Wikipedia) -> None:
    assert len(dataclasses.replace(QUICK, texts=5).examples(small)) == 5
    with pytest.raises(IntaglioError, match=r"gives \d+ prompts; 9999 texts are to be written"):
        dataclasses.replace(QUICK, texts=9999).examples(small)


@pytest.mark.slow
def test_the_articles_give_as_many_prompts_as_the_claims_ask_for() -> None:
    training, texts = Training(), trained_heads.WORLD.part("calibration")
    assert len(texts) < training.texts
    prompts = extract_prompts(trained_heads.WORLD.load(), texts, training.prompt, training.texts)
    assert [len(ids) for ids in prompts] == [training.prompt] * training.texts
    assert len(set(map(tuple, prompts))) == training.texts
    for stage, most in (("pilot", 10), ("run", trained_heads.WORLD.documents_run)):
        assert trained_heads.WORLD.documents(stage).segments.n == most


@pytest.mark.parametrize("vocabulary", [160, 4000])
def test_medusa_gets_as_many_parameters(vocabulary: int) -> None:
    model = tiny_model("llama", layers=3, vocab_size=vocabulary, hidden_size=64)
    for heads, like in ((3, HiddenTransfer()), (4, Chimera())):
        budget = size(like.make(model, 0))
        found = MedusaHeads(model, heads=heads, **matched(model, heads, budget))
        assert size(found) <= budget + heads * 64  # one layer is always there, with its bias
        assert size(found) > 0.95 * budget
    arm = Arm("", medusa={"heads": 3}, like=HiddenTransfer())
    assert medusa_heads(_checkpoint(model), arm, []).vocabulary.rank == 0


def _checkpoint(model: Any) -> Any:
    from intaglio.checkpoint import Checkpoint

    return Checkpoint(model)


def test_what_a_tree_is_expected_to_accept() -> None:
    assert accepted([[1.0], [1.0]]) == 2
    assert accepted([[0.5, 0.25], [0.5, 0.0]]) == pytest.approx(0.5 + 0.25 + 0.25 + 0.125)
    assert accepted(default_acceptance(3)) > accepted(default_acceptance(2))


@pytest.mark.parametrize("slug", ["chimera", "hidden_transfer"])
def test_the_claim(slug: str) -> None:
    chosen = experiment_of(slug)
    assert (chosen.baseline, chosen.method, chosen.delta, chosen.tier) == ("medusa", slug, 0.1, "cpu")
    assert (chosen.metric, chosen.direction, chosen.design) == (TOKENS, "higher", "independent")
    assert chosen.equal == ("tokens",)
    there = pickle.loads(pickle.dumps(chosen))
    assert (there.digest, there.run_unit.name) == (chosen.digest, slug)
