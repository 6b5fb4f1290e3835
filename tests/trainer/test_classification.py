"""Classification of texts and images: data, head, hooks of modifiers, LoRA, resuming, stock checkpoints, reports."""

from __future__ import annotations

import io
import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BeitConfig,
    BeitModel,
    Trainer,
    TrainingArguments,
)
from typer.testing import CliRunner

from intaglio.checkpoint import Checkpoint, load
from intaglio.checkpoint.from_scratch import new_image_model
from intaglio.cli.app import app
from intaglio.data.labelled_examples import load_labelled_examples
from intaglio.data.labelled_images import load_labelled_images, read_image
from intaglio.errors import IntaglioError
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.token_classifier import label_names
from intaglio.recipe.plan import plan as dry_run
from intaglio.recipe.run import carve
from intaglio.recipe.schema import Recipe
from intaglio.trainer import (
    EpochCollator,
    KeyedRNG,
    Loss,
    ModifierSession,
    Objective,
    ObjectiveModule,
    Prepares,
    train,
    training_rows,
)
from intaglio.trainer.classification import Classification, Classified, classifier_outputs, make_evaluator, predict
from intaglio.trainer.recipe_step import Train
from tests.trainer.helpers import checkpoint, same, weights
from tests.trainer.test_resume import Killed, killer

SIZES = {"resnet": {"width": 8, "depth": 2}, "convnext": {"width": 8, "depth": 2}, "vit": {"width": 16, "depth": 1}}
TEXTS = [{"text": f"{word} {word} number {n}", "label": word} for n in range(4) for word in ("fox", "dog", "sun")]
SETTINGS: dict[str, Any] = {"steps": 4, "batch_size": 4, "learning_rate": 1e-2, "warmup": 0, "log_every": 1}


def squares(count: int = 12, side: int = 8) -> list[dict[str, Any]]:
    """Grey images, bright in the upper half ("up") or in the lower half ("down")."""
    draws = np.random.default_rng(0)
    rows = []
    for number in range(count):
        image = draws.integers(0, 60, (side, side), dtype=np.uint8)
        half = slice(0, side // 2) if number % 2 else slice(side // 2, side)
        image[half] += 150
        rows.append({"image": image, "label": "up" if number % 2 else "down"})
    return rows


def image_model(family: str = "resnet", **more: Any) -> Checkpoint:
    return new_image_model(family, image_size=8, num_channels=1, **{**SIZES[family], **more})


def folder(path: Path, count: int = 12) -> Path:
    for number, row in enumerate(squares(count)):
        (path / row["label"]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(row["image"]).save(path / row["label"] / f"{number}.png")
    return path


# --- Models of images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SIZES)
def test_an_image_classifier_is_saved_as_a_stock_one(family: str, tmp_path: Path) -> None:
    ckpt = image_model(family)
    train(ckpt, squares(), objective=Classification(), **SETTINGS)
    assert label_names(ckpt.model) == ("down", "up")
    probs = predict(ckpt, squares())
    assert probs.shape == (12, 2)
    ckpt.save(tmp_path / "out")
    back = load(tmp_path / "out")
    assert back.tokenizer is None
    assert torch.equal(predict(back, squares()), probs)
    stock = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    pixels = back.image_processor(squares()[0]["image"][..., None], input_data_format="channels_last",
                                  return_tensors="pt")["pixel_values"]  # fmt: skip
    with torch.no_grad():
        assert torch.allclose(stock(pixels.float()).logits.softmax(1)[0], probs[0], atol=1e-6)


@pytest.mark.parametrize(("family", "blocks"), [("resnet", 4), ("convnext", 4), ("vit", 1)])
def test_the_anatomy_of_models_of_images(family: str, blocks: int) -> None:
    parts = anatomy(image_model(family).model)
    assert len(parts.blocks) == blocks
    assert parts.head is None
    assert not parts.causal
    assert parts.embedding is not None
    if family == "vit":
        assert {linear.role for linear in parts.linears(0)} >= {"q", "k", "v"}
        return
    with pytest.raises(IntaglioError, match="is not a linear layer"):
        parts.linears(0)


def test_new_models_of_images_refuse_sizes_that_do_not_fit() -> None:
    for given, message in [
        ({"family": "bert", "width": 8, "depth": 1}, "no family 'bert' of images"),
        ({"family": "vit", "width": 0, "depth": 1}, "width is 0"),
        ({"family": "vit", "width": 9, "depth": 1, "heads": 2}, "not a multiple of heads"),
        ({"family": "resnet", "width": 8, "depth": 1, "heads": 2}, "resnet has no attention"),
        ({"family": "resnet", "width": 8, "depth": 1, "num_channels": 2}, "num_channels is 2"),
        ({"family": "resnet", "width": 8, "depth": 1, "layer_kind": "x"}, "no field 'layer_kind'"),
    ]:
        with pytest.raises(IntaglioError, match=message):
            new_image_model(**given)  # type: ignore[arg-type]


def test_sizes_and_seed_of_a_new_model_of_images() -> None:
    resnet, vit = image_model("resnet", depth=3), image_model("vit", heads=4)
    assert resnet.config.hidden_sizes == [8, 16, 32]
    assert (vit.config.num_attention_heads, vit.config.image_size, vit.config.patch_size) == (4, 8, 1)
    default = new_image_model("vit", width=16, depth=1)
    assert (default.config.num_channels, default.config.image_size, default.config.patch_size) == (3, 32, 4)
    assert new_image_model("vit", width=16, depth=1, patch_size=8).config.patch_size == 8
    assert new_image_model("convnext", width=8, depth=1).image_processor.size["height"] == 32
    again, other = image_model("resnet", depth=3), image_model("resnet", depth=3, seed=1)
    assert same(weights(resnet), weights(again))
    assert not same(weights(resnet), weights(other))


# --- Data -------------------------------------------------------------------------------------------------------------


def test_images_of_a_folder_and_of_an_array(tmp_path: Path) -> None:
    images = load_labelled_images(folder(tmp_path / "images"))
    assert images.labels == ("down",) * 6 + ("up",) * 6
    assert images.index[0] == "down/0.png"
    assert np.array_equal(read_image(images.images[0], "it", 1)[..., 0], squares()[0]["image"])
    assert read_image(images.images[0], "it").shape == (8, 8, 3)
    rows = squares()
    np.savez(tmp_path / "a.npz", images=np.stack([row["image"] for row in rows]), labels=[row["label"] for row in rows])
    arrays = load_labelled_examples(tmp_path / "a.npz")
    assert [row["label"] for row in arrays.rows] == [row["label"] for row in rows]
    assert sorted(arrays.hashes) == sorted(load_labelled_examples(tmp_path / "images").hashes)
    np.savez(tmp_path / "b.npz", images=np.zeros((2, 8)), labels=[0, 1])
    (tmp_path / "c.npz").write_bytes(b"no archive")
    (tmp_path / "empty").mkdir()
    (tmp_path / "d.npz").write_bytes(b"")
    with (tmp_path / "e.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    pixels = np.zeros((2, 8, 8), np.uint8)
    np.savez(tmp_path / "f.npz", images=pixels, labels=[0, 1], index=["a", "b", "c"])
    np.savez(tmp_path / "g.npz", images=pixels, labels=[0, 1], index=["a", "b"])
    assert load_labelled_images(tmp_path / "g.npz").index == ("a", "b")
    for source, message in [
        ("d.npz", "cannot read the images"),
        ("e.npz", "cannot read the images"),
        ("f.npz", r"the index of .* has the shape \(3,\); a name for each image is needed"),
        ("b.npz", "images, uint8"),
        ("c.npz", "cannot read the images"),
        ("empty", "holds no images"),
        ("none.npz", "cannot read"),
    ]:
        with pytest.raises(IntaglioError, match=message):
            load_labelled_examples(tmp_path / source)


def test_broken_images_are_named_and_skipped_only_on_request(tmp_path: Path) -> None:
    images = folder(tmp_path / "images")
    (images / "up" / "bad.png").write_bytes(b"\x89PNG nothing")
    (images / "up" / "notes.txt").write_text("not an image")
    (images / "up" / "notes.pdf").write_text("of a kind that is only written")
    with pytest.raises(IntaglioError, match=r"the image up/bad\.png is broken"):
        load_labelled_examples(images)
    whole = load_labelled_examples(images, skip_broken=True)
    assert (len(whole), whole.skipped) == (12, ("up/bad.png",))
    picture = io.BytesIO()
    Image.fromarray(squares()[0]["image"]).convert("RGB").save(picture, "DDS")
    broken = bytearray(picture.getvalue())
    broken[80:88], broken[128:132] = b"\x04\0\0\0DX10", b"\xff\xff\xff\xff"  # a format that nobody knows
    (images / "up" / "bad.png").write_bytes(broken)
    with pytest.raises(IntaglioError, match=r"the image up/bad\.png is broken"):
        load_labelled_examples(images)


def test_an_index_that_repeats_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({**row, "index": n // 2}) for n, row in enumerate(TEXTS)))
    with pytest.raises(IntaglioError, match="the index 0 occurs 2 times"):
        load_labelled_examples(file)
    rows = load_labelled_examples([{**row, "index": f"t{n}"} for n, row in enumerate(TEXTS)]).rows
    assert [row["index"] for row in rows[:2]] == ["t0", "t1"]


# --- The objective ----------------------------------------------------------------------------------------------------


def test_it_is_an_objective() -> None:
    assert isinstance(Classification(), Objective)
    assert isinstance(Classification(), Prepares)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_text_classifier_is_saved_as_a_stock_one(family: str, tmp_path: Path) -> None:
    ckpt = checkpoint(family)
    body = ckpt.model.base_model
    train(ckpt, TEXTS, objective=Classification(), **SETTINGS)
    assert ckpt.model.base_model is body
    alone = torch.cat([predict(ckpt, [row]) for row in TEXTS])
    assert torch.allclose(predict(ckpt, TEXTS), alone, atol=1e-5)  # padding changes nothing
    ckpt.save(tmp_path / "out")
    back = load(tmp_path / "out")
    assert torch.equal(predict(back, TEXTS), predict(ckpt, TEXTS))
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert stock.config.id2label == {0: "dog", 1: "fox", 2: "sun"}
    with pytest.raises(IntaglioError, match="has the classes dog, fox, sun, and the examples a, b"):
        train(back, TEXTS, objective=Classification(labels=["a", "b"]), **SETTINGS)


def test_losses_by_hand() -> None:
    net = torch.nn.Linear(3, 4)
    batch = {"pixel_values": torch.randn(5, 3), "labels": torch.tensor([0, 1, 2, 3, 0])}
    logits = net(batch["pixel_values"])
    one_hot = F.one_hot(batch["labels"], 4).float()
    mixed = 0.75 * one_hot + 0.25 * one_hot.flip(0)
    for goal, targets, expected in [
        (Classification(), None, -(one_hot * logits.log_softmax(1)).sum(1).mean()),
        (Classification(), mixed, -(mixed * logits.log_softmax(1)).sum(1).mean()),
        (
            Classification(label_smoothing=0.2), None,
            -((0.8 * one_hot + 0.05) * logits.log_softmax(1)).sum(1).mean(),
        ),
        (
            Classification(loss_type="binary_cross_entropy"), mixed,
            -(mixed * logits.sigmoid().log() + (1 - mixed) * (1 - logits.sigmoid()).log()).sum(1).mean(),
        ),
        (
            Classification(loss_type="binary_cross_entropy", label_smoothing=0.2), None,
            F.binary_cross_entropy_with_logits(logits, 0.8 * one_hot + 0.05) * 4,
        ),
    ]:  # fmt: skip
        loss = goal.loss(net, batch if targets is None else {**batch, "targets": targets})
        assert float(loss.total.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
        assert torch.equal(loss.outputs.logits, logits)
        assert torch.equal(loss.outputs.features, batch["pixel_values"])
        assert torch.equal(loss.outputs.targets, one_hot if targets is None else mixed)


def test_a_model_of_images_may_have_a_vocabulary_of_visual_tokens(tmp_path: Path) -> None:
    config = BeitConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8,
                        patch_size=4, num_channels=1)  # fmt: skip
    BeitModel(config).save_pretrained(tmp_path / "beit")
    image_model().image_processor.save_pretrained(tmp_path / "beit")
    plan = Recipe.from_dict({"steps": [{"fit": {"dkvb": {"labels": str(folder(tmp_path / "images"))}}}]})
    assert dry_run(plan, model=str(tmp_path / "beit"))["seconds"] > 0
    ckpt = load(tmp_path / "beit")
    train(ckpt, squares(), objective=Classification(), **SETTINGS)
    ckpt.save(tmp_path / "out")
    assert type(load(tmp_path / "out").model).__name__ == "BeitForImageClassification"


def test_dropout_labels_and_length() -> None:
    ckpt = checkpoint("bert")
    rows = training_rows(Classification(dropout=0.25, length=4, labels=["sun", "fox", "dog"]), ckpt, TEXTS, KeyedRNG(0))
    assert {len(row["input_ids"]) for row in rows} == {4}
    assert all(row["input_ids"][-1] == ckpt.tokenizer.sep_token_id for row in rows)
    assert ckpt.model.dropout.p == 0.25
    assert [row["label"] for row in rows[:3]] == [1, 2, 0]
    assert (
        max(len(row["input_ids"]) for row in training_rows(Classification(), checkpoint("bert"), TEXTS, KeyedRNG(0)))
        > 4
    )


def test_seed_of_the_head_length_of_predictions_and_examples_without_a_class() -> None:
    heads = []
    for seed in (0, 0, 1):
        ckpt = checkpoint("bert", layers=1)
        training_rows(Classification(), ckpt, TEXTS, KeyedRNG(seed))
        heads.append(ckpt.model.classifier.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    probs = [predict(ckpt, TEXTS[:3], length=length) for length in (4, None)]
    assert not torch.allclose(*probs, atol=1e-4)
    goal, data = Classification(unlabelled="?"), [TEXTS[0], {**TEXTS[1], "label": "?"}]
    assert [row["label"] for row in training_rows(goal, ckpt, data, KeyedRNG(0))] == [1, -1]
    with pytest.raises(IntaglioError, match="example 1 has the label '\\?'"):
        training_rows(goal, ckpt, data, KeyedRNG(0, training=False))


def test_features_are_the_inputs_of_the_last_layer() -> None:
    ckpt = image_model("vit")
    rows = training_rows(Classification(), ckpt, squares(), KeyedRNG(0))
    batch = Classification().collate(rows, KeyedRNG(0))
    logits, features = classifier_outputs(ckpt.model, batch)
    assert features is not None
    assert torch.allclose(ckpt.model.classifier(features), logits, atol=1e-6)


# --- Modifiers --------------------------------------------------------------------------------------------------------


class Mix:
    """Mixes inputs with the reversed batch, hides the features of the forward pass, and adds a term."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def attach(self, run: Any) -> ModifierSession:
        assert [example["label"] for example in run.examples[:2]] == [0, 1]
        return MixSession(self.log)


class MixSession(ModifierSession):
    def __init__(self, log: list[str]) -> None:
        self.log, self.inside = log, False

    def before_step(self, step: int, batch: Any) -> None:
        self.log.append(f"before {step}")

    def after_step(self, step: int) -> None:
        self.log.append(f"after {step}")

    def change_batch(self, model: Any, batch: Any) -> Any:
        pixels, labels = batch["pixel_values"], F.one_hot(batch["labels"], 2).float()
        self.ids = batch["id"]
        return {**batch, "pixel_values": (pixels + pixels.flip(0)) / 2, "targets": (labels + labels.flip(0)) / 2}

    @contextmanager
    def forward_context(self, model: Any, batch: Any) -> Any:
        handle = model.register_forward_hook(lambda *args: self.log.append("model"))
        yield
        handle.remove()

    def extra_loss(self, model: Any, batch: Any, outputs: Any) -> Loss:
        assert isinstance(outputs, Classified)
        assert torch.equal(outputs.targets, batch["targets"])
        assert torch.equal(batch["id"], self.ids)
        model(batch["pixel_values"])  # outside the context
        return Loss(0 * outputs.logits.sum() + 2.0, {"mixed": 2.0})

    def report(self) -> dict[str, Any]:
        return {"summary": "Mixed in halves."}


def test_a_modifier_changes_batch_pass_and_loss() -> None:
    ckpt, mix = image_model(), Mix()
    result = train(ckpt, squares(), objective=Classification(), modifiers=[mix], **{**SETTINGS, "steps": 2})
    assert mix.log == ["before 1", "model", "after 1", "before 2", "model", "after 2"]
    assert result.history[0].parts["mixed"] == 2.0
    assert result.history[0].loss > 2.0
    assert result.reports == {"Mix": {"summary": "Mixed in halves."}}
    assert ckpt.record.steps[-1].chosen["modifiers"] == {"Mix": {"summary": "Mixed in halves."}}


def test_a_modifier_in_a_stock_trainer(tmp_path: Path) -> None:
    ckpt, mix, goal, rng = image_model(), Mix(), Classification(), KeyedRNG(0)
    rows = training_rows(goal, ckpt, squares(), rng)
    module = ObjectiveModule(ckpt, goal, [mix], rows)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, remove_unused_columns=False, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    collate = EpochCollator(goal, rng, ids=True)
    Trainer(module, arguments, collate, rows, callbacks=[module.callback]).train()
    assert mix.log == ["before 1", "model", "after 1", "before 2", "model", "after 2"]
    assert module.detach() == {"Mix": {"summary": "Mixed in halves."}}
    plain = EpochCollator(goal, rng)(rows[:2])
    with pytest.raises(IntaglioError, match="the batch has no id"):
        module.train()(**plain)
    expected = goal.loss(ckpt.model.eval(), plain).total
    assert torch.equal(module.eval()(**plain)["loss"], expected)
    assert len(mix.log) == 6


# --- Training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_killed_training_resumes_bit_for_bit(tmp_path: Path, lora: dict[str, Any] | None) -> None:
    family = "resnet" if lora is None else "vit"
    whole, killed, again = (image_model(family) for _ in range(3))
    arguments = {**SETTINGS, "save_every": 1, "lora": lora}
    unbroken = train(whole, squares(), objective=Classification(), **arguments)
    with pytest.raises(Killed):
        train(killed, squares(), objective=Classification(), directory=tmp_path, progress=killer(3), **arguments)
    resumed = train(again, squares(), objective=Classification(), directory=tmp_path, **arguments)
    assert resumed.history == unbroken.history
    assert same(weights(again), weights(whole))


def test_under_lora_the_head_is_trained_in_full() -> None:
    ckpt, fresh = checkpoint("bert"), checkpoint("bert")
    before = training_rows(Classification(), fresh, TEXTS, KeyedRNG(0)) and weights(fresh)
    targets = {"r": 2, "targets": ["query"]}
    train(ckpt, TEXTS, objective=Classification(), lora=targets, **SETTINGS)
    after = weights(ckpt)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert {"classifier.weight", "classifier.bias"} <= changed
    assert all("classifier" in name or "query.weight" in name for name in changed)


def test_held_out_scores() -> None:
    ckpt = image_model()
    result = train(
        ckpt, squares(24), objective=Classification(), evaluate=make_evaluator(squares(8)),
        **{**SETTINGS, "steps": 30, "batch_size": 8},
    )  # fmt: skip
    last = result.history[-1].evaluation
    assert set(last) == {"accuracy", "macro_f1", "error", "loss"}
    assert last["accuracy"] == 1.0
    assert last["error"] == 0.0
    assert last["loss"] < 0.6
    assert not ckpt.model.training


def test_bad_examples_are_named() -> None:
    for rows, message in [
        ([{"image": squares()[0]["image"]}] * 2, "example 0 has the label None"),
        ([{"image": squares()[0]["image"], "label": "a"}] * 2, "1 different labels"),
        ([{"label": "a"}, {"label": "b"}], "example 0 has no image"),
        ([{"image": 3.5, "label": "a"}, {"image": 3.5, "label": "b"}], "the image 0 is float"),
    ]:
        with pytest.raises(IntaglioError, match=message):
            train(image_model(), rows, objective=Classification(), **SETTINGS)
    with pytest.raises(IntaglioError, match="LlamaForCausalLM does not classify"):
        predict(checkpoint(), TEXTS)


# --- Recipes ----------------------------------------------------------------------------------------------------------


def recipe(classes: Any, **training: Any) -> Recipe:
    new = {"family": "resnet", "width": 8, "depth": 2, "image_size": 8, "num_channels": 1}
    step = {"classes": str(classes), "steps": 4, "batch_size": 4, **training}
    return Recipe.from_dict({"new": new, "steps": [{"train": step}]})


def test_a_recipe_trains_an_image_classifier(tmp_path: Path) -> None:
    images = folder(tmp_path / "images")
    (images / "up" / "bad.png").write_bytes(b"nothing")
    held_out = folder(tmp_path / "held-out", 4)
    for number, row in enumerate(squares(4)):
        Image.fromarray(255 - row["image"]).save(held_out / row["label"] / f"{number}.png")
    plan = recipe(images, validation=str(held_out), skip_broken=True)
    document = carve(plan, tmp_path / "out")
    assert document["data"]["training"] == 12
    assert document["data"]["skipped"] == ["up/bad.png"]
    assert document["classes"] == ["down", "up"]
    assert set(document["scores"]) == {"accuracy", "macro_f1"}
    assert "evaluation/accuracy" in document["curve"]
    wrong = round(4 * (1 - document["scores"]["accuracy"]))
    assert len(document["mistakes"]) == wrong
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Held-out examples by class" in page
    assert ("data:image/png;base64," in page) == bool(wrong)
    assert "img-src data:" in page  # the page's policy allows nothing by itself
    assert load(tmp_path / "out").image_processor is not None
    assert carve(plan, tmp_path / "out", resume=True) == document


def test_validation_texts_are_cut_as_the_training_texts_are(tmp_path: Path) -> None:
    for name, rows in {"training": TEXTS[:6], "validation": TEXTS[6:]}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    step = {"classes": str(tmp_path / "training.jsonl"), "validation": str(tmp_path / "validation.jsonl"),
            "objective": {"classification": {"length": 4}}, "steps": 1, "batch_size": 4}  # fmt: skip
    new = {"family": "llama", "width": 16, "depth": 1}
    document = carve(Recipe.from_dict({"new": new, "steps": [{"train": step}]}), tmp_path / "out")
    ckpt = load(tmp_path / "out")
    cut, whole = (make_evaluator(TEXTS[6:], length=length)(ckpt)["loss"] for length in (4, None))
    assert cut != pytest.approx(whole, abs=1e-4)
    assert document["curve"]["evaluation/loss"][-1] == pytest.approx(cut, abs=1e-6)
    scored = Train.model_validate(step)._data(None, frozenset(), None)[1]
    assert scored(ckpt)["loss"] == pytest.approx(cut, abs=1e-6)
    probs = predict(ckpt, TEXTS[6:], length=4).amax(1)
    shown = [item["probability"] for item in document["mistakes"]]
    assert shown
    assert all(min(abs(float(p) - value) for p in probs) < 1e-6 for value in shown)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"validation": "{images}"}, "every example of the validation .* is a training example too"),
        ({"validation": "{other}"}, "the validation .* has the label 'u'; did you mean up"),
        ({"validation": "x", "evaluate": 0.1}, "validation and evaluate are given"),
        (
            {"objective": {"classification": {"labels": ["up", "down", "up"]}}},
            "each named once",
        ),
        ({"objective": {"meap": {}}}, "classes need the objective classification, or none"),
        ({"classes": "{single}"}, "has the label 'up'; at least two classes are needed"),
        ({"classes": "{texts}"}, "new resnet takes images"),
        ({"classes": "missing.jsonl"}, "cannot read the labelled texts"),
        ({"texts": "wikipedia"}, "texts and classes are given"),
        ({"classes": "{broken}"}, r"the image up/bad\.png is broken"),
        ({"classes": "{repeated}"}, "the index x occurs 2 times"),
    ],
)
def test_recipes_with_bad_data_are_refused(training: dict[str, Any], message: str, tmp_path: Path) -> None:
    places = {"images": folder(tmp_path / "images"), "single": tmp_path / "single", "texts": tmp_path / "a.jsonl"}
    places["other"] = folder(tmp_path / "other", 4)
    (places["other"] / "up").rename(places["other"] / "u")
    Image.fromarray(255 - squares()[1]["image"]).save(places["other"] / "u" / "1.png")
    places |= {"broken": folder(tmp_path / "broken"), "repeated": tmp_path / "b.jsonl"}
    (places["broken"] / "up" / "bad.png").write_bytes(b"nothing")
    places["repeated"].write_text("\n".join(json.dumps({**row, "index": "x"}) for row in TEXTS[:2]))
    places["texts"].write_text("\n".join(map(json.dumps, TEXTS)))
    (places["single"] / "up").mkdir(parents=True)
    Image.fromarray(squares()[1]["image"]).save(places["single"] / "up" / "a.png")
    given = {name: value.format(**places) if isinstance(value, str) else value for name, value in training.items()}
    with pytest.raises(IntaglioError, match=message):
        carve(recipe(**{"classes": places["images"], **given}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_split_goes_by_contents_and_leaves_an_example_of_each_class(tmp_path: Path) -> None:
    splits = []
    for name in ("images", "moved"):
        images = folder(tmp_path / name)
        for other in ("rare", "other"):
            (images / other).mkdir()
            Image.fromarray(squares(14)[12 + (other == "rare")]["image"]).save(images / other / "a.png")
        (images / "up" / "copy.png").write_bytes((images / "up" / "1.png").read_bytes())
        step: Any = Recipe.from_dict({"model": "m", "steps": [{"train": {"classes": str(images), "evaluate": 0.8,
                                                                         "steps": 1}}]}).steps[0]  # fmt: skip
        training, held_out, shared = step.labelled()
        assert {"rare", "other"} <= set(training.classes)
        assert set(held_out.classes) <= set(training.classes)
        assert sorted(row["index"] for part in (training, held_out) for row in part.rows) == sorted(
            row["index"] for row in load_labelled_examples(images).rows
        )
        assert shared == len(set(training.hashes) & set(held_out.hashes))
        splits.append([row["index"] for row in held_out.rows])
    assert splits[0] == splits[1]
    alone = [{"text": word, "label": word} for word in ("a", "b", "c")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, alone)))
    with pytest.raises(IntaglioError, match=r"no class of .* has an example to hold out beside another"):
        carve(recipe(tmp_path / "a.jsonl", evaluate=0.4), tmp_path / "out")


def test_other_fields_of_recipes_are_refused() -> None:
    step = {"train": {"classes": "a", "steps": 1}}
    for value, message in [
        ({"model": "m", "steps": [{"train": {"skip_broken": True, "steps": 1}}]}, "skip_broken belongs to classes"),
        ({"model": "m", "steps": [step, {"magnitude": {"sparsity": 0.5}}]}, "a recipe on classes has one step"),
        ({"model": "m", "measure": {"samples": 2}, "steps": [step]}, "do not apply to classes"),
        ({"new": {"family": "vit", "width": 8, "depth": 1}, "steps": [{"train": {"steps": 1}}]}, "needs a train step"),
        ({"new": {"family": "llama", "width": 8, "depth": 1, "image_size": 8}, "steps": [step]}, "not llama"),
        ({"new": {"family": "vit", "width": 8, "depth": 1, "context": 16}, "steps": [step]}, "do not apply to vit"),
        ({"model": "m", "steps": [{"train": {"objective": "classification", "steps": 1}}]}, "needs classes"),
    ]:
        with pytest.raises(IntaglioError, match=message):
            Recipe.from_dict(value)


def test_a_recipe_trains_a_text_classifier(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({**row, "index": f"text {n}"}) for n, row in enumerate(TEXTS)))
    new = {"family": "bert", "width": 16, "depth": 1, "heads": 2, "context": 64}
    step = {"classes": str(file), "evaluate": 0.25, "steps": 3, "batch_size": 4, "early_stopping_patience": 3}
    document = carve(Recipe.from_dict({"new": new, "steps": [{"train": step}]}), tmp_path / "out")
    assert (document["data"]["training"], document["data"]["validation"]) == (9, 3)
    assert "evaluation/loss" in document["curve"]
    for row in document["mistakes"]:
        assert row["index"].startswith("text ")
    back = load(tmp_path / "out")
    assert label_names(back.model) == ("dog", "fox", "sun")
    done = CliRunner().invoke(app, ["classify", str(tmp_path / "out"), str(file), "--json"])
    rows = json.loads(done.stdout)["texts"]
    chosen = predict(back, TEXTS).argmax(1).tolist()
    assert [row["class"] for row in rows] == [label_names(back.model)[index] for index in chosen]
    refused = CliRunner().invoke(app, ["classify", str(tmp_path / "out"), "--learn", str(file)])
    assert refused.exit_code == 2
    assert "cannot learn more by itself" in refused.stderr
