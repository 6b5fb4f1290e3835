"""`intaglio soup` and `recipe.soup`: greedy, maximum and uniform soups of checkpoints, and bad input."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from intaglio.checkpoint import Checkpoint, load
from intaglio.checkpoint.from_scratch import new_image_model
from intaglio.checkpoint.soup import Trial, average, maximum, uniform, weight_cosine
from intaglio.cli.app import app
from intaglio.data.labelled_examples import load_labelled_examples
from intaglio.data.segments import segments
from intaglio.data.text_pairs import load_text_pairs
from intaglio.data.texts import load_texts
from intaglio.errors import IntaglioError
from intaglio.measures.language_modeling import quality
from intaglio.recipe.soup import Sizes, soup
from intaglio.trainer import train
from intaglio.trainer.classification import Classification, make_evaluator
from intaglio.trainer.contrastive import Contrastive
from intaglio.trainer.recipe_step import Train
from intaglio.trainer.retrieval_evaluation import retrieval_evaluator
from tests.families import tiny_model, tiny_tokenizer
from tests.test_bad_input import cli_refusal
from tests.trainer.helpers import PAIRS, TEXTS, run

SIZES = ("--samples", "4", "--length", "16")


def save(model: Any, path: Path, family: str = "llama") -> Path:
    model.save_pretrained(path)
    tiny_tokenizer(family).save_pretrained(path)
    return path


def near(model: nn.Module, seed: int, scale: float = 0.02) -> nn.Module:
    """A copy with noise on its matrices, as after fine-tuning."""
    other, source = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.ndim > 1:
                parameter += scale * torch.randn(parameter.shape, generator=source)
    return other


@pytest.fixture
def place(tmp_path: Path) -> Path:
    base = tiny_model("llama_tied", layers=1)
    for n, name in enumerate("abc"):
        save(near(base, n + 1, 0.02 * (n + 1)), tmp_path / name, "llama_tied")
    for name, texts in {"validation": TEXTS[:10], "test": TEXTS[10:20], "train": TEXTS[20:]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path


def command(place: Path, *words: str | Path, models: str = "abc") -> Any:
    out = ("-o", place / "out", "--overwrite", *SIZES)
    done = CliRunner().invoke(app, ["soup", *(str(place / name) for name in models), *map(str, [*out, *words])])
    assert done.exit_code == 0, done.output
    return done


def perplexity(directory: Path, texts: Path) -> float:
    ckpt = load(directory)
    data = segments(ckpt.tokenizer, load_texts(texts), 4, 16, seed=0, fewer=True)
    value = quality(ckpt, data).perplexity
    assert value is not None
    return value


def test_a_greedy_soup_is_no_worse_than_its_best_model_on_validation(place: Path) -> None:
    """Greedy's VALIDATION score is >= the best single model's, by construction; reported on another split."""
    data = ("--metric", "perplexity", "--validation", place / "validation.jsonl", "--test", place / "test.jsonl")
    document = json.loads(command(place, *data, "--json").stdout)
    alone = [perplexity(place / name, place / "validation.jsonl") for name in "abc"]
    assert [row["validation"] for row in document["models"]] == pytest.approx(alone, rel=1e-5)
    assert document["score"] <= min(alone) * (1 + 1e-6)
    assert document["score"] == pytest.approx(perplexity(place / "out", place / "validation.jsonl"), rel=1e-5)
    assert document["test_score"] == pytest.approx(perplexity(place / "out", place / "test.jsonl"), rel=1e-5)
    on_test = [perplexity(place / name, place / "test.jsonl") for name in "abc"]
    assert [row["test"] for row in document["models"]] == pytest.approx(on_test, rel=1e-5)
    chosen = [n for n, row in enumerate(document["models"]) if row["in_soup"]]
    expected = average([place / "abc"[n] for n in chosen])
    made = load(place / "out").model.state_dict()
    assert all(torch.allclose(made[name], value, atol=1e-6) for name, value in expected.items())
    assert document["higher_is_better"] is False
    assert document["notes"] == []
    step = load(place / "out").record.steps[-1]
    assert (step.slug, step.parameters["mode"], sorted(step.chosen["models"])) == ("soup", "greedy", chosen)


def test_maximum_and_uniform_soups(place: Path) -> None:
    data = ("--metric", "bits_per_byte", "--validation", place / "validation.jsonl", "--json")
    best = json.loads(command(place, "--mode", "maximum", "--top", "2", *data).stdout)
    scores = [row["validation"] for row in best["models"]]
    lowest = sorted(range(3), key=lambda n: scores[n])[:2]
    assert [n for n, row in enumerate(best["models"]) if row["in_soup"]] == sorted(lowest)
    assert best["test_score"] is None
    whole = json.loads(command(place, "--mode", "uniform", *data).stdout)
    assert [row["in_soup"] for row in whole["models"]] == [True] * 3
    assert [row["validation"] for row in whole["models"]] == pytest.approx(scores)
    plain = json.loads(command(place, "--mode", "uniform", "--json").stdout)
    assert (plain["score"], plain["metric"], plain["trials"]) == (None, None, [])
    expected = average([place / name for name in "abc"])
    made = load(place / "out").model
    state = made.state_dict()
    assert all(torch.allclose(state[name], value, atol=1e-6) for name, value in expected.items())
    assert made.lm_head.weight is made.model.embed_tokens.weight  # type: ignore[union-attr]


def test_the_table_warns_that_the_choice_flatters_itself(place: Path) -> None:
    data = ("--metric", "perplexity", "--validation", place / "validation.jsonl")
    shown = command(place, *data).stdout
    assert "greedy soup by perplexity, lower is better" in " ".join(shown.split())
    assert "give --test DATA for others" in " ".join(shown.split())
    assert f"checkpoint: {place / 'out'}" in shown
    assert "give --test" not in command(place, *data, "--test", place / "test.jsonl").stdout


def test_models_of_different_initialisations_are_averaged_with_a_warning(place: Path) -> None:
    save(tiny_model("llama_tied", layers=1, seed=9), place / "d", "llama_tied")
    done = command(place, "--mode", "uniform", models="ad")
    assert "seem to come from different initialisations (the cosine of their weights is" in done.stderr
    assert "warning" in done.stderr
    assert "initialisations" not in command(place, "--mode", "uniform", models="ab").stderr


def test_soups_of_encoders_are_chosen_by_retrieval(tmp_path: Path) -> None:
    rows = "".join(json.dumps(pair) + "\n" for pair in PAIRS)
    (tmp_path / "pairs.jsonl").write_text(rows)
    for seed, name in enumerate("ab"):
        ckpt = Checkpoint(tiny_model("llama", layers=1), tiny_tokenizer("llama"), "tiny")
        run(ckpt, PAIRS, objective=Contrastive(), steps=2, seed=seed, warmup=0)
        ckpt.save(tmp_path / name)
    for metric in ("nDCG@10", "MRR@10"):
        models = [str(tmp_path / name) for name in "ab"]
        document = soup(
            models, tmp_path / "out", metric=metric, validation=str(tmp_path / "pairs.jsonl"), overwrite=True
        )
        made = load(tmp_path / "out")
        value = retrieval_evaluator(made.encoder(), load_text_pairs(tmp_path / "pairs.jsonl"))(made)[metric]
        assert document["score"] == pytest.approx(value, rel=1e-5)
        assert document["higher_is_better"] is True


def test_soups_of_image_classifiers_are_chosen_by_accuracy(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    for name in ("train", "validation"):
        images = draws.integers(0, 60, (24, 8, 8), dtype=np.uint8)
        images[::2, :4] += 150
        images[1::2, 4:] += 150
        np.savez(tmp_path / f"{name}.npz", images=images, labels=np.array(["up", "down"] * 12))
    rows = load_labelled_examples(tmp_path / "train.npz").rows
    base = new_image_model("resnet", width=8, depth=1, image_size=8, num_channels=1)
    train(base, rows, objective=Classification(), steps=2, batch_size=4)
    for seed, name in enumerate("ab"):
        ckpt = copy.deepcopy(base)
        train(ckpt, rows, objective=Classification(), steps=6, batch_size=4, seed=seed, learning_rate=3e-3)
        ckpt.save(tmp_path / name)
    models, data = [str(tmp_path / name) for name in "ab"], str(tmp_path / "validation.npz")
    for metric in ("accuracy", "macro_f1"):
        document = soup(models, tmp_path / "out", metric=metric, validation=data, overwrite=True)
        value = make_evaluator(load_labelled_examples(data).rows)(load(tmp_path / "out"))[metric]
        assert document["score"] == pytest.approx(value)
        assert document["score"] >= max(row["validation"] for row in document["models"])
    with pytest.raises(IntaglioError, match="24 of the 24 examples of"):
        soup(models, tmp_path / "out", metric="accuracy", validation=data, test=data, overwrite=True)


def test_the_size_of_the_text_is_as_given(place: Path) -> None:
    models, texts = [str(place / name) for name in "ab"], str(place / "validation.jsonl")
    values = [
        soup(models, place / "out", metric="perplexity", validation=texts, sizes=sizes, overwrite=True)["score"]
        for sizes in (Sizes(4, 16), Sizes(2, 16), Sizes(4, 24))
    ]
    assert len(set(values)) == 3


# --- Bad input --------------------------------------------------------------------------------------------------------


def refusal(place: Path, *words: str | Path, models: str = "ab") -> str:
    return cli_refusal(place, "soup", *(place / name for name in models), "-o", place / "out", *SIZES, *words)


def test_arguments_that_do_not_fit(place: Path) -> None:
    data: tuple[Any, ...] = ("--metric", "perplexity", "--validation", place / "validation.jsonl")
    for words, models, sentence in (
        (data, "a", "a soup of 1 model is given; two or more are accepted"),
        (data, "aba", "is given twice; give each once"),
        ((*data, "--mode", "gready"), "ab", "mode is 'gready'; did you mean greedy?"),
        (("--metric", "perplexty", *data[2:]), "ab", "there is no metric named 'perplexty'; did you mean perplexity?"),
        ((), "ab", "a greedy soup chooses by a metric on validation data; give both metric and validation"),
        (("--mode", "uniform", *data[2:]), "ab", "data are given without a metric; accepted: perplexity"),
        ((*data, "--mode", "maximum", "--top", "3"), "ab", "top is 3; a number from 1 to the 2 models is accepted"),
    ):
        assert sentence in refusal(place, *words, models=models)
    assert "an output directory is missing" in cli_refusal(place, "soup", place / "a", place / "b")


def test_unlike_shapes_are_named(place: Path) -> None:
    save(tiny_model("llama_tied", layers=2), place / "deep", "llama_tied")
    weights = load_file(place / "b" / "model.safetensors")
    said = cli_refusal(place, "soup", place / "a", place / "deep", "-o", place / "out", "--mode", "uniform")
    assert f"of {place / 'deep'} is missing in {place / 'a'}" in said
    config = json.loads((place / "b" / "config.json").read_text())
    config["intermediate_size"] += 4
    (place / "b" / "config.json").write_text(json.dumps(config))
    for part in ("gate", "up"):
        key = f"model.layers.0.mlp.{part}_proj.weight"
        weights[key] = torch.cat([weights[key], weights[key][:4]])
    key = "model.layers.0.mlp.down_proj.weight"
    weights[key] = torch.cat([weights[key], weights[key][:, :4]], 1)
    save_file(weights, place / "b" / "model.safetensors", metadata={"format": "pt"})
    said = refusal(place, "--mode", "uniform")
    assert "the tensor model.layers.0.mlp." in said
    assert "has the shape" in said
    assert str(place / "b") in said


def test_unlike_tokenizers_are_named(place: Path) -> None:
    tokenizer = json.loads((place / "b" / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    (one, id_one), (other, id_other) = list(vocab.items())[-2:]
    vocab |= {one: id_other, other: id_one}
    (place / "b" / "tokenizer.json").write_text(json.dumps(tokenizer))
    said = refusal(place, "--mode", "uniform")
    shown = f"2 ids stand for other tokens, first {id_one} for {other!r} and {one!r}"
    assert f"{place / 'b'} and {place / 'a'} have different tokenizers ({shown}); a soup needs equal ones" in said
    for file in (place / "b").glob("tokenizer*"):
        file.unlink()
    command(place, "--mode", "uniform")


def test_splits_must_differ(place: Path) -> None:
    data: tuple[Any, ...] = ("--metric", "perplexity", "--validation", place / "validation.jsonl")
    said = refusal(place, *data, "--test", place / "validation.jsonl")
    assert "10 of the 10 examples of" in said
    assert "are in the test split" in said
    said = refusal(place, *data, "--training", place / "validation.jsonl")
    assert "are in the training split" in said
    mixed = place / "mixed.jsonl"
    shutil.copy(place / "test.jsonl", mixed)
    mixed.write_text(mixed.read_text() + (place / "validation.jsonl").read_text().splitlines()[0] + "\n")
    assert "1 of the 10 examples of" in refusal(place, *data, "--test", mixed)


def test_a_validation_split_that_is_the_training_split_by_the_record_is_refused(place: Path) -> None:
    ckpt = load(place / "a")
    step = Train.model_validate({"texts": str(place / "train.jsonl"), "steps": 1, "batch_size": 2, "length": 16})
    step.apply(ckpt)
    assert ckpt.record.steps[-1].chosen["data"]["source"] == str(place / "train.jsonl")
    ckpt.save(place / "trained")
    data: tuple[Any, ...] = ("--metric", "perplexity", "--validation", place / "train.jsonl")
    said = cli_refusal(place, "soup", place / "trained", place / "b", "-o", place / "out", *SIZES, *data)
    assert (
        f"the validation split {place / 'train.jsonl'} is what {place / 'trained'} was trained on by its record" in said
    )


def test_adapters_attachments_and_other_labels_are_refused(place: Path) -> None:
    (place / "b" / "adapter_config.json").write_text("{}")
    assert "holds an adapter, whose factors cannot be averaged" in refusal(place, "--mode", "uniform")
    (place / "b" / "adapter_config.json").unlink()
    config = json.loads((place / "b" / "config.json").read_text())
    (place / "b" / "config.json").write_text(json.dumps(config | {"id2label": {"0": "X", "1": "Y"}}))
    assert "have different labels; a soup needs equal ones" in refusal(place, "--mode", "uniform")
    (place / "b" / "config.json").write_text(json.dumps(config))
    ckpt = load(place / "a")
    ckpt.record_step("dkvb", {}, verb="fit")
    ckpt.attach("dkvb", {"x": torch.ones(1)}, {})
    ckpt.save(place / "fitted")
    said = cli_refusal(place, "soup", place / "fitted", place / "b", "-o", place / "out", "--mode", "uniform")
    assert "has the attachment dkvb with weights of its own" in said


# --- Averages ---------------------------------------------------------------------------------------------------------


def score(state: dict[str, torch.Tensor]) -> float:
    return -abs(float(state["x"]))


CANDIDATES = [{"x": torch.tensor(value)} for value in (-2.0, 1.5, 3.0, float("nan"))]


def test_a_maximum_soup_is_the_mean_of_the_best() -> None:
    result = maximum(CANDIDATES, score, 2)
    assert (result.chosen, float(result.state["x"]), result.score) == ((1, 0), -0.25, -0.25)
    assert result.log[:3] == (Trial((0,), -2.0, True), Trial((1,), -1.5, True), Trial((2,), -3.0, False))
    assert result.log[-1] == Trial((1, 0), -0.25, True)
    loss = maximum(CANDIDATES, lambda state: -score(state), 1, higher_is_better=False)
    assert (loss.chosen, loss.score) == ((1,), 1.5)
    assert maximum(CANDIDATES, score, 9).chosen == (1, 0, 2)
    with pytest.raises(IntaglioError, match="top is 0; a number of models from 1 on"):
        maximum(CANDIDATES, score, 0)


def test_a_uniform_soup_takes_all_and_scores_them() -> None:
    result = uniform(CANDIDATES[:3], score)
    assert result.chosen == (0, 1, 2)
    assert float(result.state["x"]) == pytest.approx(2.5 / 3)
    assert [trial.score for trial in result.log] == pytest.approx([-2, -1.5, -3, -2.5 / 3])


def test_averaging_the_weights_of_a_linear_model_averages_its_predictions() -> None:
    """Linear model: average of weights = average of predictions (exact)."""
    models = [nn.Linear(5, 3).double() for _ in range(3)]
    inputs, merged = torch.randn(7, 5, dtype=torch.float64), nn.Linear(5, 3).double()
    merged.load_state_dict(average([model.state_dict() for model in models], dtype=torch.float64))
    expected = torch.stack([model(inputs) for model in models]).mean(0)
    torch.testing.assert_close(merged(inputs), expected, rtol=0, atol=1e-12)


def test_statistics_of_batch_normalisation_are_averaged_and_its_counter_is_kept() -> None:
    """Integer buffers survive averaging."""
    models = [nn.BatchNorm1d(2) for _ in range(2)]
    for steps, model in enumerate(models, start=1):
        for _ in range(steps):
            model(torch.randn(5, 2) + steps)
    mixed = average([model.state_dict() for model in models])
    assert mixed["num_batches_tracked"].item() == 2
    torch.testing.assert_close(mixed["running_mean"], (models[0].running_mean + models[1].running_mean) / 2)  # type: ignore[operator]


def test_a_metric_that_is_not_finite_is_shown_as_such(place: Path) -> None:
    weights = load_file(place / "b" / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, place / "b" / "model.safetensors", metadata={"format": "pt"})
    data = ("--metric", "perplexity", "--validation", place / "validation.jsonl")
    document = json.loads(command(place, *data, "--json").stdout)
    assert document["models"][1] == {"model": str(place / "b"), "validation": None, "test": None, "in_soup": False}
    assert "not finite" in command(place, *data).stdout


def test_the_cosine_of_weights_sees_matrices_alone() -> None:
    one = {"w": torch.tensor([[3.0, 4.0]]), "norm": torch.ones(9)}
    assert weight_cosine(one, {"w": torch.tensor([[4.0, 3.0]]), "norm": -torch.ones(9)}) == pytest.approx(24 / 25)
    assert weight_cosine(one, one) == pytest.approx(1)
    assert weight_cosine({"norm": torch.ones(2)}, {"norm": torch.ones(2)}) is None
    assert weight_cosine(one, {**one, "w": torch.zeros(1, 2)}) is None
