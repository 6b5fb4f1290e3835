"""`train` as a step of a recipe: validated before anything loads, resumed where it was, zeros kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from intaglio import report
from intaglio.checkpoint import load
from intaglio.data.texts import document_hash, load_texts
from intaglio.errors import IntaglioError
from intaglio.recipe.plan import plan
from intaglio.recipe.run import carve
from intaglio.recipe.schema import Recipe, json_schema
from intaglio.trainer.instruction_data import train_eval_split
from tests.families import tiny_checkpoint_dir
from tests.recipe.test_run import Killed, corpus, files, leftovers, make_recipe  # noqa: F401
from tests.trainer.helpers import TEXTS

TRAIN: dict[str, Any] = {"steps": 6, "batch_size": 2, "length": 24, "save_every": 1, "log_every": 1}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_checkpoint_dir("llama", tmp_path / "model", layers=2)


def recipe(texts: Path, *steps: dict[str, Any]) -> Recipe:
    return make_recipe(texts, list(steps))


def kill_training(at: int) -> Any:
    def progress(done: int, total: int, what: str) -> None:
        if what.startswith("train") and done == at:
            raise Killed

    return progress


def test_a_pruned_model_is_trained_and_stays_pruned(corpus: Path, model: Path, tmp_path: Path) -> None:  # noqa: F811
    steps = (
        {"wanda": {"sparsity": 0.5}},
        {"train": {**TRAIN, "objective": {"meap": {"length": 24}}, "lora": {"r": 2}}},
    )
    del steps[1]["train"]["length"]
    document = carve(recipe(corpus, *steps), tmp_path / "out", model=str(model))
    assert set(document["after"]["zero_fraction"].values()) == {0.5}
    assert document["title"] == f"{model} carved by wanda; trained"
    curve = document["steps"][1]["curve"]
    assert curve["step"] == [1, 2, 3, 4, 5, 6]
    assert {len(column) for column in curve.values()} == {6}
    assert "curve" not in document["steps"][1]["chosen"]
    assert document["after"]["perplexity"] > 0
    assert document["after"]["kl_mean"] is None  # the vocabulary has grown
    assert "Training curves" in report.carve_page(document)
    back = load(tmp_path / "out")
    assert [step.slug for step in back.record.steps] == ["wanda", "train"]
    assert back.tokenizer.mask_token == "<|mask|>"
    assert leftovers(tmp_path / "out") == []


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("at", [1, 4])
def test_killed_while_training_it_resumes_to_the_same_bytes(
    corpus: Path,  # noqa: F811
    model: Path,
    tmp_path: Path,
    at: int,
    first: bool,
) -> None:
    steps = [{"train": TRAIN}] if first else [{"magnitude": {"sparsity": 0.5}}, {"train": TRAIN}]
    wanted, whole, broken = recipe(corpus, *steps), tmp_path / "whole", tmp_path / "broken"
    carve(wanted, whole, model=str(model))
    with pytest.raises(Killed):
        carve(wanted, broken, model=str(model), progress=kill_training(at))
    seen: list[int] = []
    carve(
        wanted,
        broken,
        model=str(model),
        resume=True,
        progress=lambda done, total, what: seen.append(done) if what.startswith("train") else None,
    )
    assert seen == list(range(max(1, at), 7)) if at == 1 else seen[0] == at
    assert files(broken) == files(whole)
    assert leftovers(broken) == []


def test_an_interrupted_training_is_not_resumed_unasked(corpus: Path, model: Path, tmp_path: Path) -> None:  # noqa: F811
    wanted, out = recipe(corpus, {"train": TRAIN}), tmp_path / "out"
    with pytest.raises(Killed):
        carve(wanted, out, model=str(model), progress=kill_training(4))
    with pytest.raises(IntaglioError, match="has finished 0 of 1 steps; resume it, or overwrite it"):
        carve(wanted, out, model=str(model))
    seen: list[int] = []
    carve(
        wanted,
        out,
        model=str(model),
        overwrite=True,
        progress=lambda done, total, what: seen.append(done) if what.startswith("train") else None,
    )
    assert seen == [1, 2, 3, 4, 5, 6]


def test_a_model_is_trained_on_instructions_without_an_objective(corpus: Path, model: Path, tmp_path: Path) -> None:  # noqa: F811
    pairs = tmp_path / "pairs.jsonl"
    lines = [{"prompt": f"name the river number {n}", "answer": "it is the river in the north"} for n in range(8)]
    pairs.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    fields = {"instructions": str(pairs), "length": 48, "chat": False, "evaluate": 0.2, "log_every": 1}
    step = {"epochs": 4, "batch_size": 1, "learning_rate": 3e-3, **fields}
    document = carve(recipe(corpus, {"train": step}), tmp_path / "out", model=str(model))
    curve = document["steps"][0]["curve"]
    assert curve["loss"][-1] < curve["loss"][0]
    assert document["after"]["kl_mean"] is not None  # the vocabulary is what it was


def test_training_that_fails_before_it_saved_leaves_nothing(corpus: Path, model: Path, tmp_path: Path) -> None:  # noqa: F811
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a"}\n', encoding="utf-8")
    step = {"steps": 2, "objective": {"meap": {"mode": "finetuning"}}, "instructions": str(pairs)}
    with pytest.raises(IntaglioError, match=r"line 1 of .* has no prompt and answer"):
        carve(recipe(corpus, {"train": step}), tmp_path / "out", model=str(model))
    assert leftovers(tmp_path / "out") == []


def test_what_is_measured_on_is_never_trained_on(
    corpus: Path,  # noqa: F811
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from intaglio.trainer import loop

    seen: list[Any] = []

    def train(checkpoint: Any, data: Any, **more: Any) -> None:
        seen.append(data)
        raise Killed

    monkeypatch.setattr(loop, "train", train)
    _, held_out = load_texts(corpus).split()
    named = {**TRAIN, "texts": str(corpus)}
    for step in (TRAIN, named, {**named, "stream": True}):
        with pytest.raises(Killed):
            carve(recipe(corpus, {"train": step}), tmp_path / "out", model=str(model), overwrite=True)
    for data in seen:
        hashes = {document_hash(text) for text in data}
        assert len(hashes) > 0
        assert not hashes & set(held_out.hashes)


def test_a_share_of_the_data_is_evaluated_on_and_not_trained_on(corpus: Path, model: Path, tmp_path: Path) -> None:  # noqa: F811
    step = {**TRAIN, "evaluate": 0.2, "evaluate_every": 2, "patience": 1, "learning_rate": 1e-12}
    document = carve(recipe(corpus, {"train": step}), tmp_path / "out", model=str(model))
    # The loss does not fall at that rate, or by rounding only.
    assert document["steps"][0]["chosen"]["steps"] in (2, 4, 6)
    assert document["steps"][0]["curve"]["evaluation/loss"][1] > 0
    trained, evaluated = train_eval_split(TEXTS, 0.2)
    assert sorted(trained + evaluated) == sorted(TEXTS)
    assert len(evaluated) == 6
    assert train_eval_split(TEXTS[::-1], 0.2) == (trained[::-1], evaluated[::-1])
    assert len(train_eval_split(TEXTS, 0.0001)[1]) == 1
    with pytest.raises(IntaglioError, match="of 1 examples that leaves"):
        train_eval_split(TEXTS[:1], 0.5)


def test_a_log_for_tensorboard_stays_when_the_step_is_done(
    corpus: Path,  # noqa: F811
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    step = {"train": {**TRAIN, "report_to": ["tensorboard"]}}
    carve(recipe(corpus.absolute(), step, {"train": {**TRAIN, "log_directory": "elsewhere"}}), "out", model=str(model))
    assert list((tmp_path / "runs").glob("events.*"))
    assert not (tmp_path / "elsewhere").exists()  # it was not asked for


def test_a_plan_and_the_schema_know_training(corpus: Path, model: Path) -> None:  # noqa: F811
    found = plan(recipe(corpus, {"train": TRAIN}), model=str(model))
    assert (found["steps"][0]["slug"], found["steps"][0]["verb"]) == ("train", "train")
    assert found["steps"][0]["seconds"] > 0
    schema = json.loads(json.dumps(json_schema()))
    (train,) = [
        c["properties"]["train"] for c in schema["properties"]["steps"]["items"]["oneOf"] if "train" in c["properties"]
    ]
    assert ["meap"] in [one.get("required") for one in train["properties"]["objective"]["oneOf"]]
    assert "meap" in schema["$defs"]
    assert "Lora" in schema["$defs"]


NEW: dict[str, Any] = {"width": 16, "depth": 1, "context": 32, "tokenizer": "texts", "vocab": 280}


def test_a_recipe_trains_from_scratch_and_resumes_to_the_same_bytes(corpus: Path, tmp_path: Path) -> None:  # noqa: F811
    wanted = Recipe.from_dict({**recipe(corpus, {"train": TRAIN}).dump(), "new": NEW})
    document = carve(wanted, tmp_path / "whole")
    assert document["model"] == "new llama"
    assert document["after"]["kl_mean"] is None  # there is nothing to agree with
    assert document["after"]["perplexity"] < document["before"]["perplexity"]
    assert report.carve_page(document)
    back = load(tmp_path / "whole")
    assert back.model.get_input_embeddings().weight.shape == (280, 16)
    with pytest.raises(Killed):
        carve(wanted, tmp_path / "broken", progress=kill_training(4))
    carve(wanted, tmp_path / "broken", resume=True)
    assert files(tmp_path / "broken") == files(tmp_path / "whole")
    found = plan(wanted)
    assert found["parameters"] == sum(p.numel() for p in back.model.parameters())


@pytest.mark.parametrize(
    ("new", "sentence"),
    [
        ({"width": 16}, "field required"),
        ({**NEW, "widht": 3}, "there is no such field here; did you mean width"),
        ({**NEW, "tokenizer": "bytes"}, "vocab is the size of a trained vocabulary"),
        ({**NEW, "family": "lama"}, "there is no family 'lama'; did you mean llama"),
        ({**NEW, "width": 15}, "width is 15"),
    ],
)
def test_bad_models_from_scratch_are_one_sentence(
    corpus: Path,  # noqa: F811
    tmp_path: Path,
    new: dict[str, Any],
    sentence: str,
) -> None:
    with pytest.raises(IntaglioError, match=sentence) as caught:
        carve(Recipe.from_dict({**recipe(corpus, {"train": TRAIN}).dump(), "new": new}), tmp_path / "out")
    assert "\n" not in str(caught.value)
    with pytest.raises(IntaglioError, match="model and new are given"):
        Recipe.from_dict({**recipe(corpus, {"train": TRAIN}).dump(), "new": NEW, "model": "smollm2"})


def test_a_recipe_with_training_round_trips(corpus: Path) -> None:  # noqa: F811
    wanted = recipe(corpus, {"train": {**TRAIN, "lora": {"r": 2}, "betas": [0.9, 0.95]}})
    assert Recipe.from_dict(wanted.dump()) == wanted
    assert Recipe.from_dict(json.loads(json.dumps(wanted.dump()))) == wanted


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        ({}, "exactly one of steps, tokens and epochs"),
        (3, "train takes a mapping, such as train: {steps: 500}"),
        ({"steps": 0}, "0 is not accepted"),
        ({"steps": 1, "stepz": 1}, "there is no such field here; did you mean steps"),
        ({"steps": 1, "objective": {"mep": {}}}, "there is no objective named 'mep'; did you mean meap"),
        ({"steps": 1, "objective": {"wanda": {}}}, "there is no objective named 'wanda'"),
        (
            {"steps": 1, "objective": {"meap": {"ratio": 2.0}}},
            "meap.ratio: 2.0 is not accepted, it should be less than 1",
        ),
        ({"steps": 1, "modifiers": {"a": {}}}, "a list of modifiers is needed"),
        ({"steps": 1, "select": {"x": {}}}, "there is no selector named 'x'"),
        ({"steps": 1, "lora": {"rank": 1}}, "there is no such field here"),
        ({"steps": 1, "texts": "a", "instructions": "b"}, "give one source of training data"),
        ({"steps": 1, "chat": False}, "chat belongs to instructions without an objective"),
        ({"steps": 1, "length": 8, "objective": "meap"}, "length belongs to next-token prediction"),
        ({"steps": 1, "early_stopping_patience": 2}, "early_stopping_patience needs evaluate, a share"),
        ({"steps": 1, "stream": True}, "stream needs texts to read"),
        ({"steps": 1, "stream": True, "texts": "a", "evaluate": 0.1}, "evaluate needs the texts in memory"),
        ({"epochs": 1, "stream": True, "texts": "a"}, "epochs needs the texts in memory"),
    ],
)
def test_bad_steps_are_one_sentence(corpus: Path, step: Any, sentence: str) -> None:  # noqa: F811
    with pytest.raises(IntaglioError, match=sentence) as caught:
        recipe(corpus, {"train": step})
    assert "\n" not in str(caught.value)
    assert "steps[0]" in str(caught.value)


def test_lora_targets_and_encoders_are_refused_before_any_work(corpus: Path, model: Path, tmp_path: Path) -> None:  # noqa: F811
    step = {"train": {**TRAIN, "lora": {"targets": ["q_pro"]}}}
    with pytest.raises(IntaglioError, match="no linear layer is named 'q_pro'; did you mean q_proj"):
        carve(recipe(corpus, step), tmp_path / "out", model=str(model))
    encoder = tiny_checkpoint_dir("bert", tmp_path / "encoder", layers=1)
    with pytest.raises(IntaglioError, match="train needs a model that generates"):
        carve(recipe(corpus, {"train": TRAIN}), tmp_path / "out", model=str(encoder))
    assert torch.get_num_threads() == 1
