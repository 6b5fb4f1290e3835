"""Live carvings in recipes: with pruning and training in either order, killed and resumed, refused in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, LlamaForTokenClassification
from typer.testing import CliRunner

from intaglio import report
from intaglio.checkpoint import RECORD, load
from intaglio.cli.app import app
from intaglio.errors import IntaglioError
from intaglio.masks import Bidirectional, get_visibility
from intaglio.recipe.plan import plan
from intaglio.recipe.run import carve, compare
from intaglio.recipe.schema import Measure, Recipe, json_schema
from intaglio.trainer.token_classification import predict
from tests.families import tiny_checkpoint_dir
from tests.recipe.test_run import Killed, corpus, files, leftovers, make_recipe  # noqa: F401

IDS = torch.arange(8, 28)[None]
UNMASK = {"layerwise_unmasking": {"configuration": "01"}}
PRUNE = {"magnitude": {"sparsity": 0.5}}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_checkpoint_dir("llama", tmp_path / "model", layers=2)


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    path = tmp_path / "labels.jsonl"
    words = ["the", "quick", "brown", "fox", "jumps", "over"]
    rows = [{"words": words[n % 3 :] + words[: n % 4], "labels": None} for n in range(12)]
    for row in rows:
        row["labels"] = ["O" if word < "k" else "B-X" for word in row["words"]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def label_step(labels: Path, **more: Any) -> dict[str, Any]:
    fields = {"steps": 3, "batch_size": 4, "objective": {"token_classification": {}}, "labels": str(labels)}
    return {"train": {**fields, "validation": str(labels), "save_every": 1, **more}}


def test_pruned_unmasked_and_trained_in_either_order(corpus: Path, model: Path, labels: Path, tmp_path: Path) -> None:  # noqa: F811
    wanda = {"wanda": {"sparsity": 0.5}}
    for number, steps in enumerate(([wanda, UNMASK, label_step(labels)], [UNMASK, label_step(labels), wanda])):
        out = tmp_path / f"out{number}"
        document = carve(make_recipe(corpus, steps), out, model=str(model))
        assert document["kind"] == "runtime"
        assert set(document["after"]["zero_fraction"].values()) == {0.5}
        assert document["after"]["perplexity"] is None
        assert document["after"]["decode_tokens_per_s"] is None
        assert -1 <= document["after"]["cosine"] <= 1
        assert "needs intaglio.load" in report.summary(document)
        assert report.carve_page(document)
        back = load(out)
        assert get_visibility(back.model) == {1: Bidirectional()}
        assert isinstance(back.model, LlamaForTokenClassification)
        assert [step.slug for step in back.record.steps] == [next(iter(step)) for step in steps]
        assert predict(back, [{"words": ["the", "fox"]}])[0][0] in ("O", "B-X")
        for loader in (AutoModelForTokenClassification, AutoModelForCausalLM, LlamaForTokenClassification):
            with pytest.raises((ValueError, OSError)):
                loader.from_pretrained(out)
        # What was carved can be carved again.
        again = carve(make_recipe(corpus, [PRUNE]), tmp_path / f"again{number}", model=str(out))
        assert again["kind"] == "runtime"
        assert get_visibility(load(tmp_path / f"again{number}").model) == {1: Bidirectional()}


def test_zeros_stay_and_the_head_is_trained_under_lora(corpus: Path, model: Path, labels: Path, tmp_path: Path) -> None:  # noqa: F811
    steps = [PRUNE, UNMASK, label_step(labels, lora={"r": 2, "targets": ["q_proj", "v_proj"]}, learning_rate=1e-2)]
    document = carve(make_recipe(corpus, steps), tmp_path / "out", model=str(model))
    assert set(document["after"]["zero_fraction"].values()) == {0.5}
    assert load(tmp_path / "out").model.score.bias.abs().min() > 0  # it began at zero
    stock, ours = load(model).model.model, load(tmp_path / "out").model.model
    assert torch.equal(stock.layers[0].mlp.up_proj.weight != 0, ours.layers[0].mlp.up_proj.weight != 0) is False
    assert torch.equal(stock.embed_tokens.weight, ours.embed_tokens.weight)


def test_a_classifier_that_sees_what_it_always_saw_is_a_stock_checkpoint(
    corpus: Path,  # noqa: F811
    model: Path,
    labels: Path,
    tmp_path: Path,
) -> None:
    document = carve(make_recipe(corpus, [label_step(labels)]), tmp_path / "out", model=str(model))
    assert document["kind"] == "standalone"
    stock = AutoModelForTokenClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(stock(IDS).logits, load(tmp_path / "out").model(IDS).logits)
    assert stock.config.id2label == {0: "B-X", 1: "O"}
    # Inference-only unmasking of what was trained as a causal model.
    carve(make_recipe(corpus, [UNMASK]), tmp_path / "late", model=str(tmp_path / "out"))
    assert get_visibility(load(tmp_path / "late").model) == {1: Bidirectional()}


def test_task_adaptation_by_a_train_step_before(corpus: Path, model: Path, labels: Path, tmp_path: Path) -> None:  # noqa: F811
    adapt = {"train": {"steps": 2, "batch_size": 2, "labels": str(labels), "length": 24}}
    document = carve(make_recipe(corpus, [adapt, UNMASK, label_step(labels)]), tmp_path / "out", model=str(model))
    assert [step["slug"] for step in document["steps"]] == ["train", "layerwise_unmasking", "train"]
    with pytest.raises(IntaglioError, match="train cannot follow layerwise_unmasking: it needs causal"):
        make_recipe(corpus, [UNMASK, adapt])


def search_step(labels: Path) -> dict[str, Any]:
    wanted = {"labels": str(labels), "validation": str(labels), "steps": 2, "batch_size": 4, "save_every": 1}
    return {"layerwise_unmasking": {"groups": 1, "search": wanted}}


@pytest.mark.parametrize("at", [1, 3])
def test_a_killed_search_resumes_to_the_same_bytes(
    corpus: Path,  # noqa: F811
    model: Path,
    labels: Path,
    tmp_path: Path,
    at: int,
) -> None:
    wanted = make_recipe(corpus, [search_step(labels)])
    carve(wanted, tmp_path / "whole", model=str(model))

    def kill(done: int, total: int, what: str) -> None:
        if what.startswith("trying") and done == at:
            raise Killed

    with pytest.raises(Killed):
        carve(wanted, tmp_path / "broken", model=str(model), progress=kill)
    seen: list[int] = []
    carve(
        wanted,
        tmp_path / "broken",
        model=str(model),
        resume=True,
        progress=lambda done, total, what: seen.append(done) if what.startswith("trying") else None,
    )
    assert seen[0] >= at
    whole, broken = files(tmp_path / "whole"), files(tmp_path / "broken")
    # The record says how long each trial took.
    records = [json.loads(one.pop(RECORD)) for one in (whole, broken)]
    for record in records:
        for trial in record["steps"][0]["chosen"]["trials"]:
            assert trial.pop("seconds") > 0
    assert records[0] == records[1]
    assert broken == whole
    assert leftovers(tmp_path / "broken") == []


def test_the_plan_knows_what_a_search_takes(corpus: Path, model: Path, labels: Path) -> None:  # noqa: F811
    found = plan(
        make_recipe(corpus, [search_step(labels), {"visibility": {"rule": "bidirectional"}}]), model=str(model)
    )
    assert found["steps"][0]["seconds"] > 0
    assert found["steps"][1]["seconds"] == 0


def test_rules_that_do_not_fit_are_refused_before_any_work(corpus: Path, tmp_path: Path) -> None:  # noqa: F811
    windowed = tiny_checkpoint_dir("mistral_window", tmp_path / "windowed", layers=2)
    encoder = tiny_checkpoint_dir("bert", tmp_path / "encoder", layers=2)
    for model, step, words in (
        (windowed, {"visibility": {"rule": {"sliding": {"window": 9}}}}, "has a sliding window of 8"),
        (windowed, {"visibility": {"layers": [2], "rule": "causal"}}, "layers names the layer 2"),
        (windowed, {"layerwise_unmasking": {"groups": 4}}, "4 groups do not divide the 2 layers"),
        (encoder, UNMASK, "unmasking an encoder changes nothing"),
    ):
        with pytest.raises(IntaglioError, match=words) as caught:
            carve(make_recipe(corpus, [step]), tmp_path / "out", model=str(model), progress=_never)
        assert "\n" not in str(caught.value)
        with pytest.raises(IntaglioError, match=words):
            plan(make_recipe(corpus, [step]), model=str(model))
    assert not (tmp_path / "out").exists()


def _never(done: int, total: int, what: str) -> None:
    raise AssertionError(f"work was done: {what}")


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"layerwise_unmasking": {"configuration": 11}}, "11 is no configuration; bits in quotes are accepted"),
        ({"layerwise_unmasking": {"configuration": "01", "groups": 3}}, "has 2 bits for 3 groups"),
        ({"layerwise_unmasking": {"search": {"labels": "a", "steps": 1}}}, "search.validation: field required"),
        (
            {"layerwise_unmasking": {"search": {"labels": "a", "validation": "b"}}},
            "exactly one of steps, tokens and epochs",
        ),
        (
            {"layerwise_unmasking": {"configuration": "01", "search": {"labels": "a", "validation": "b", "steps": 1}}},
            "configuration and search are given",
        ),
        ({"visibility": {"rule": "casual"}}, "there is no visibility rule 'casual'; did you mean causal?"),
        ({"visibility": {"rule": {"arbitrary": {"visible": [[1, 0]]}}}}, r"has the shape \(1, 2\)"),
        ({"visibility": {"rule": {"sliding": {}}}}, "the rule 'sliding' cannot be made of nothing"),
        ({"visibility": {"layers": "x", "rule": "causal"}}, "accepted: all, numbers, or a slice"),
        ({"visibility": {}}, "rule: field required"),
        ({"train": {"steps": 1, "objective": "token_classification"}}, "needs labels, a file of labelled words"),
        ({"train": {"steps": 1, "labels": "a", "texts": "b"}}, "texts and labels are given"),
        ({"train": {"steps": 1, "labels": "a", "objective": {"meap": {}}}}, "labels need the objective"),
        ({"train": {"steps": 1, "validation": "a"}}, "validation is a file of labels; it needs the objective"),
        (
            {"train": {"steps": 1, "labels": "a", "objective": "token_classification", "evaluate": 0.1}},
            "is scored on a file of labels: name one as validation",
        ),
        (
            {
                "train": {
                    "steps": 1, "labels": "a", "validation": "b", "objective": "token_classification", "patience": 1,
                }
            },
            "set metric_for_best_model: error",
        ),
        ({"train": {"steps": 1, "labels": "a", "objective": {"token_classification": {"place": "middle"}}}}, "place"),
    ],
)  # fmt: skip
def test_steps_that_cannot_be_are_refused_as_they_are_read(step: dict[str, Any], words: str) -> None:
    with pytest.raises(IntaglioError, match=words) as caught:
        Recipe.from_dict({"steps": [step]})
    assert "\n" not in str(caught.value)


def test_orders_that_cannot_be() -> None:
    for steps, words in (
        ([{"visibility": {"rule": "causal"}}, {"fit": {"aded": {}}}], "aded cannot follow visibility: it needs cache"),
        ([UNMASK, {"train": {"steps": 1}}], "it needs causal, which layerwise_unmasking does away with"),
        (
            [label_step(Path("x")), {"train": {"steps": 1, "objective": {"meap": {}}}}],
            "train cannot follow train: it needs causal",
        ),
    ):
        with pytest.raises(IntaglioError, match=words):
            Recipe.from_dict({"steps": steps})
    for steps in (
        [{"visibility": {"rule": {"sliding": {"window": 4}}}}, {"train": {"steps": 1}}],
        [{"visibility": {"rule": "stock"}}, {"fit": {"aded": {}}}],
        [label_step(Path("x")), UNMASK],
    ):
        recipe = Recipe.from_dict({"steps": steps})
        assert Recipe.from_dict(recipe.dump()) == recipe
    assert "visibility" in json_schema()["$defs"]


def test_comparing_with_what_sees_to_the_right(corpus: Path, model: Path, tmp_path: Path) -> None:  # noqa: F811
    carve(make_recipe(corpus, [UNMASK]), tmp_path / "out", model=str(model))
    found = compare(str(model), str(tmp_path / "out"), wanted=Measure(texts=str(corpus), samples=2, length=32))
    assert found["a"]["perplexity"] > 1
    assert found["b"]["perplexity"] is None
    assert report.compare_table(found)


def test_what_predicts_no_next_token_is_not_fitted_or_trained_so(
    corpus: Path,  # noqa: F811
    model: Path,
    labels: Path,
    tmp_path: Path,
) -> None:
    carve(make_recipe(corpus, [UNMASK]), tmp_path / "runtime", model=str(model))
    carve(make_recipe(corpus, [label_step(labels)]), tmp_path / "labels", model=str(model))
    train = {"train": {"steps": 1, "length": 24}}
    shutil.copytree(tmp_path / "labels", tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / RECORD).unlink()  # labels too, but nobody says since when
    for made, words in (
        ("runtime", r"cannot follow layerwise_unmasking, which the checkpoint's record names: it needs ca"),
        ("labels", r"cannot follow train, which the checkpoint's record names: it needs causal"),
        ("elsewhere", r"needs a model that generates; .* labels tokens or sees"),
    ):
        for step in (train, {"fit": {"aded": {}}}):
            with pytest.raises(IntaglioError, match=words):
                carve(make_recipe(corpus, [step]), tmp_path / "out", model=str(tmp_path / made), progress=_never)
    carve(
        make_recipe(corpus, [{"visibility": {"rule": "stock"}}, train]),
        tmp_path / "out",
        model=str(tmp_path / "runtime"),
    )
    assert load(tmp_path / "out").kind == "standalone"
    found = CliRunner().invoke(app, ["generate", str(tmp_path / "labels"), "the fox"])
    assert found.exit_code == 2
    assert found.stderr.strip().endswith("labels has no language-model head; it does not generate")


def _changed(path: Path, change: Any) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_half_of_a_live_checkpoint_is_refused(corpus: Path, model: Path, tmp_path: Path) -> None:  # noqa: F811
    carve(make_recipe(corpus, [UNMASK]), tmp_path / "out", model=str(model))
    cases: list[tuple[str, Any, str]] = [
        (RECORD, lambda v: v.update(live=[]), "is marked as live and its intaglio.json names no live part"),
        ("config.json", lambda v: v.update(model_type="intaglio_unheard"), "model type 'unheard' is not known"),
        (RECORD, lambda v: v["live"][0].update(slug="unheard"), "there is no method named 'unheard'"),
        (RECORD, lambda v: v["live"][0].update(slug="wanda"), "live part of 'wanda', which is no live method"),
        (RECORD, lambda v: v["live"][0].pop("slug"), "live part of None"),
        (RECORD, lambda v: v["live"][0].pop("layers"), "live part of visibility in .* cannot be put back"),
        (RECORD, lambda v: v["live"][0]["layers"][0].update(layers=[7]), "names the layer 7"),
        (RECORD, lambda v: v["live"][0]["layers"][0].update(rule={"kind": "casual"}), "'casual'; did you mean causal"),
    ]
    for number, (file, change, words) in enumerate(cases):
        shutil.copytree(tmp_path / "out", tmp_path / str(number))
        _changed(tmp_path / str(number) / file, change)
        with pytest.raises(IntaglioError, match=words) as caught:
            load(tmp_path / str(number))
        assert "\n" not in str(caught.value)
    shutil.copytree(tmp_path / "out", tmp_path / "bare")
    (tmp_path / "bare" / RECORD).unlink()
    with pytest.raises(IntaglioError, match="is marked as live"):
        load(tmp_path / "bare")
    _changed(model / "config.json", lambda v: None)
    shutil.copy(tmp_path / "out" / RECORD, model / RECORD)
    with pytest.raises(IntaglioError, match=r"names live parts and its config.json is not marked as live"):
        load(model)
