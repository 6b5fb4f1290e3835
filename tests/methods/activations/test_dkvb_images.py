"""DKVB on images: embeddings, recipes, `classify` and `--learn`, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from intaglio.checkpoint import Checkpoint, load
from intaglio.cli.app import app
from intaglio.data import assets
from intaglio.data.labelled_images import load_images
from intaglio.errors import IntaglioError
from intaglio.methods.activations.dkvb import DKVB
from intaglio.modeling.classifier import make_classifier
from intaglio.recipe.plan import plan
from intaglio.recipe.run import carve
from intaglio.recipe.schema import Recipe
from intaglio.trainer.classification import classifier_outputs, embed_images, embedding_width
from tests.trainer.helpers import checkpoint, same, weights
from tests.trainer.test_classification import SIZES, image_model

SHADES = {"black": 10, "grey": 120, "white": 230}
FIELDS: dict[str, Any] = {"num_codebooks": 8, "num_pairs": 16, "key_dim": 4, "init_epochs": 2, "epochs": 10,
                          "batch_size": 8, "learning_rate": 20.0}  # fmt: skip


def shades(*names: str, count: int = 6) -> list[dict[str, Any]]:
    """Images of nearly one shade each."""
    draws = np.random.default_rng(0)
    return [
        {"image": draws.integers(SHADES[name], SHADES[name] + 20, (8, 8), dtype=np.uint8), "label": name}
        for name in names
        for _ in range(count)
    ]


def folder(place: Path, *names: str) -> Path:
    for number, row in enumerate(shades(*names)):
        (place / row["label"]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(row["image"]).save(place / row["label"] / f"{number}.png")
    return place


def classifier(family: str = "resnet") -> Checkpoint:
    ckpt = image_model(family)
    make_classifier(ckpt, ("a", "b"))
    return ckpt


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "model"
    classifier().save(path)
    return path


@pytest.mark.parametrize("family", SIZES)
def test_embeddings_are_the_inputs_of_the_head(family: str) -> None:
    rows, ckpt = shades("black", "white", count=2), classifier(family)
    seen: list[Any] = []
    found = embed_images(ckpt, rows, batch_size=3, progress=lambda done, total, what: seen.append((done, total)))
    assert seen == [(3, 4), (4, 4)]
    assert found.shape == (4, embedding_width(ckpt))
    pixels = torch.stack([ckpt.image_processor(row["image"][..., None], input_data_format="channels_last",
                                               return_tensors="pt")["pixel_values"][0] for row in rows])  # fmt: skip
    torch.testing.assert_close(found, classifier_outputs(ckpt.model.eval(), {"pixel_values": pixels})[1])
    hidden = ckpt.model.base_model(pixels).last_hidden_state
    places = hidden.flatten(2).mT if hidden.dim() == 4 else hidden
    torch.testing.assert_close(embed_images(ckpt, rows, "mean"), places.mean(1))
    torch.testing.assert_close(embed_images(ckpt, rows, "cls"), places[:, 0])
    bare = image_model(family)
    assert embed_images(bare, rows).shape == (4, embedding_width(bare))


@pytest.mark.parametrize("family", SIZES)
def test_any_image_classifier_is_fitted_saved_and_taught(family: str, tmp_path: Path) -> None:
    ckpt = classifier(family)
    before = weights(ckpt)
    DKVB(**FIELDS).fit(ckpt, shades("black", "white"))
    chosen = ckpt.record.steps[-1].chosen
    assert (chosen["images"], chosen["classes"], chosen["accuracy"]) == (12, ["black", "white"], 1.0)
    ckpt.save(tmp_path / "a")
    back = load(tmp_path / "a")
    ready, images = back.fitted("dkvb"), [row["image"] for row in shades(*SHADES)]
    assert ready.classify(back, images) == ckpt.fitted("dkvb").classify(ckpt, images)
    ready.learn(back, shades("grey"))
    back.save_attachment("dkvb")
    again = load(tmp_path / "a")
    probs = again.fitted("dkvb").classify(again, images)
    assert probs == ready.classify(back, images)
    # Keys were fitted to black and white alone; some grey images share pairs with white ones.
    hits = [max(prob, key=prob.__getitem__) == row["label"] for prob, row in zip(probs, shades(*SHADES), strict=True)]
    assert sum(hits) >= 12
    assert sum(hits[6:12]) >= 5
    assert again.record.steps[-1].chosen["new_classes"] == ["grey"]
    assert same(before, weights(again))


def test_keys_are_fitted_to_other_images_on_request(tmp_path: Path) -> None:
    labels = str(folder(tmp_path / "images", "black", "white"))
    keys = []
    for other in (shades("grey"), shades("white")):
        ckpt = classifier()
        DKVB(labels=labels, key_texts="recipe", **FIELDS).fit(ckpt, other)
        keys.append(ckpt.attachments["dkvb"].tensors["bottleneck.keys"])
    assert not torch.equal(*keys)


def run(*words: Any, code: int = 0) -> Any:
    done = CliRunner().invoke(app, ["classify", *map(str, words)])
    assert done.exit_code == code, done.output
    return done


def test_a_recipe_fits_and_the_command_classifies_and_learns(model: Path, tmp_path: Path) -> None:
    images = folder(tmp_path / "two", "black", "white")
    recipe = Recipe.from_dict({"model": str(model), "steps": [{"fit": {"dkvb": {"labels": str(images), **FIELDS}}}]})
    out = tmp_path / "out"
    document = carve(recipe, out)
    assert document["classes"] == ["black", "white"]
    assert (document["data"]["kind"], document["data"]["training"], document["scores"]) == ("image", 12, {})
    assert "100.0% are classified correctly" in (out / "report.html").read_text(encoding="utf-8")
    assert carve(recipe, out, resume=True) == document
    found = json.loads(run(out, images, "--json").stdout)
    assert found["accuracy"] == 1.0
    assert [row["image"] for row in found["images"]][:2] == ["black/0.png", "black/1.png"]
    assert set(found["images"][0]) == {"image", "label", "class", "probs"}
    flat = images / "white"
    assert {row["class"] for row in json.loads(run(out, flat, "--json").stdout)["images"]} == {"white"}
    one = json.loads(run(out, flat / "6.png", "--json").stdout)["images"]
    assert [(row["image"], row["class"], "label" in row) for row in one] == [("6.png", "white", False)]
    taught = json.loads(run(out, images, "--learn", folder(tmp_path / "third", "grey"), "--json").stdout)
    assert taught["new_classes"] == ["grey"]
    assert set(taught["images"][0]["probs"]) == {"black", "white", "grey"}
    assert taught["accuracy"] >= 0.6
    assert f"accuracy: {taught['accuracy']:.1%} of 12 images with a label" in run(out, images).stdout
    (step,) = plan(recipe)["steps"]
    assert (step["slug"], step["verb"]) == ("dkvb", "fit")
    assert step["seconds"] > 0


def test_a_trained_image_classifier_classifies_too(model: Path, tmp_path: Path) -> None:
    rows = shades("black", "white", count=2)
    np.savez(tmp_path / "x.npz", images=np.stack([row["image"] for row in rows]), labels=["a", "a", "b", "b"])
    found = json.loads(run(model, tmp_path / "x.npz", "--json").stdout)
    assert found["method"] == "classification"
    assert [row["image"] for row in found["images"]] == ["0", "1", "2", "3"]
    assert found["accuracy"] == sum(row["class"] == row["label"] for row in found["images"]) / 4
    assert [row.get("label") for row in load_images(tmp_path / "x.npz")] == ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["MODEL", "texts.txt"], "takes images; texts.txt holds texts"),
        (["TEXTS", "FOLDER"], "takes texts; FOLDER holds images"),
        (["MODEL", "EMPTY"], "holds no images; a folder for each class"),
        (["MODEL", "BROKEN"], "the image broken.png is broken"),
        (["MODEL", "--learn", "FOLDER"], "cannot learn more by itself"),
        (["BARE", "FOLDER"], "nothing is attached to"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str], says: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("a text\n")
    folder(Path("FOLDER"), "black", "white")
    Path("EMPTY").mkdir()
    Path("BROKEN").mkdir()
    Path("BROKEN/broken.png").write_bytes(b"no image")
    if "TEXTS" in words:
        checkpoint("bert", layers=1).save("TEXTS")
    if "BARE" in words:
        image_model().save("BARE")
    done = run(*[model if word == "MODEL" else word for word in words], code=2)
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_recipes_that_do_not_fit_are_refused_and_write_nothing(model: Path, tmp_path: Path) -> None:
    images = str(folder(tmp_path / "images", "black", "white"))
    lines = tmp_path / "texts.jsonl"
    lines.write_text("".join(json.dumps({"text": name, "label": name}) + "\n" for name in "ab"))
    fit = {"fit": {"dkvb": {"labels": images, **FIELDS}}}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"steps": [fit, fit]}, "has one step"),
        ({"steps": [fit], "measure": {"samples": 3}}, "calibration, measure and key_texts: recipe are for texts"),
        ({"steps": [{"fit": {"dkvb": {"labels": images, "key_texts": "recipe"}}}]}, "key_texts: recipe are for texts"),
        ({"steps": [{"fit": {"dkvb": {}}}]}, "labels is missing; dkvb needs a folder"),
        ({"steps": [{"fit": {"dkvb": {"labels": str(lines)}}}]}, r"takes images; .*texts.jsonl holds texts"),
        ({"steps": [{"fit": {"dkvb": {"labels": str(Path(images) / "black")}}}]}, "holds no images"),
    ]
    for document, says in cases:
        with pytest.raises(IntaglioError, match=says) as caught:
            carve(Recipe.from_dict({"model": str(model), **document}), tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
    with pytest.raises(IntaglioError, match=r"takes texts; .* holds images"):
        DKVB(labels=images, **FIELDS).fit(checkpoint("bert", layers=1))


@pytest.mark.slow
def test_the_bundled_classifier_is_a_frozen_encoder_of_digits(tmp_path: Path) -> None:
    """Conversion: gates of exactly 1, the published number of parameters; and digits in five tasks of two classes."""
    assets.fetch(["efficientnet-lite0"])
    ckpt = load("efficientnet-lite0")
    gate = ckpt.model.efficientnet.encoder.blocks[3].squeeze_excite
    hidden = torch.randn(2, gate.dim, 3, 3)
    assert torch.equal(gate(hidden), hidden)
    gates = sum(p.numel() for name, p in ckpt.model.named_parameters() if "squeeze_excite" in name)
    assert sum(p.numel() for p in ckpt.model.parameters()) - gates == 4_652_008
    digits = load_digits()
    rows = [
        {"image": (image * 15.9).astype(np.uint8), "label": str(label)}
        for image, label in zip(digits.images[:300], digits.target[:300], strict=True)
    ]
    tasks = [[row for row in rows[:200] if int(row["label"]) // 2 == task] for task in range(5)]
    DKVB(max_classes=10).fit(ckpt, tasks[0])
    ready = ckpt.fitted("dkvb")
    for task in tasks[1:]:
        ready.learn(ckpt, task)
    probs = ready.classify(ckpt, [row["image"] for row in rows[200:]])
    right = [max(prob, key=prob.__getitem__) == row["label"] for prob, row in zip(probs, rows[200:], strict=True)]
    # Of 100, a tenth by chance; half are right with keys that were fitted to the first two classes alone.
    assert sum(right) > 30
