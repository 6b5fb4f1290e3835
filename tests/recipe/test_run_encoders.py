"""`train` on pairs: mined negatives, held-out retrieval, and what the commands do with the encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from intaglio import report
from intaglio.checkpoint import load, weights_digest
from intaglio.cli.app import app
from intaglio.errors import IntaglioError
from intaglio.recipe.run import carve
from intaglio.recipe.schema import Recipe
from tests.families import tiny_checkpoint_dir, tiny_model, tiny_tokenizer
from tests.recipe.test_run import Killed, corpus, make_recipe  # noqa: F401
from tests.recipe.test_run_train import kill_training
from tests.trainer.helpers import TEXTS

TRAIN: dict[str, Any] = {"steps": 4, "batch_size": 4, "save_every": 1, "log_every": 1, "evaluate": 0.2,
                         "evaluate_every": 2}  # fmt: skip


def run(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    lines = [json.dumps({"query": f"fox number {n}", "positive": text}) + "\n" for n, text in enumerate(TEXTS)]
    file.write_text("".join(lines), encoding="utf-8")
    return file


def recipe(texts: Path, pairs: Path, objective: dict[str, Any], **more: Any) -> Recipe:
    return make_recipe(texts, [{"train": {**TRAIN, "objective": objective, "pairs": str(pairs), **more}}])


def test_negatives_are_mined_and_held_out_pairs_are_the_curve(
    corpus: Path,  # noqa: F811
    pairs: Path,
    tmp_path: Path,
) -> None:
    model = tiny_checkpoint_dir("bert", tmp_path / "model", layers=1)
    step = recipe(corpus, pairs, {"vdr": {"terms": 16}}, negatives={"count": 2, "encoder": "self"})
    document = carve(step, tmp_path / "whole", model=str(model))
    (trained,) = document["steps"]
    curve = trained["curve"]
    assert [value for value in curve["evaluation/nDCG@10"] if value is not None]
    assert set(curve) >= {"evaluation/MRR@10", "evaluation/error", "part/accuracy", "part/lexical_accuracy"}
    page = report.carve_page(document)
    assert "nDCG@10" in page
    assert "fox number" in page
    with pytest.raises(Killed):
        carve(step, tmp_path / "out", model=str(model), progress=kill_training(3))
    carve(step, tmp_path / "out", model=str(model), resume=True)
    assert weights_digest(tmp_path / "out") == weights_digest(tmp_path / "whole")
    assert (tmp_path / "out/attachments/vdr.safetensors").read_bytes() == (
        tmp_path / "whole/attachments/vdr.safetensors"
    ).read_bytes()


def test_the_commands_use_a_trained_encoder(corpus: Path, pairs: Path, tmp_path: Path) -> None:  # noqa: F811
    model = tiny_checkpoint_dir("bert", tmp_path / "model", layers=1)
    carve(recipe(corpus, pairs, {"vdr": {"terms": 16}}), tmp_path / "out", model=str(model))
    docs = tmp_path / "docs.jsonl"
    docs.write_text("".join(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(TEXTS[:5])))
    for name, options in (("sparse", ()), ("tokens", ("--set", "document_view=tokens"))):
        made = run("index", docs, "-o", tmp_path / name, "--encoder", tmp_path / "out", *options)
        assert made.exit_code == 0, made.output
        found = run("search", tmp_path / name, "the lazy dog", "--json")
        assert found.exit_code == 0, found.output
    wrong = run("index", docs, "-o", tmp_path / "x", "--encoder", tmp_path / "out", "--set", "document_view=bag")
    assert wrong.exit_code == 2
    assert "document_view: 'bag' is not accepted" in " ".join(wrong.output.split())
    assert not (tmp_path / "x").exists()
    shown = run("inspect", tmp_path / "out", "--terms", TEXTS[0], "--against", "the dog", "--json")
    explained = json.loads(shown.stdout)
    assert sum(term["weight"] for term in explained["terms"]) == pytest.approx(explained["score"])
    assert run("inspect", tmp_path / "out", "--terms", TEXTS[0]).exit_code == 0
    for words, says in (
        (("--terms", "x", "--masks"), "--masks and --terms are given"),
        (("--against", "x", "--masks"), "--against explains the score of a text"),
    ):
        refused = run("inspect", tmp_path / "out", *words)
        assert refused.exit_code == 2
        assert says in " ".join(refused.output.split())
    refused = run("inspect", model, "--terms", "x")
    assert refused.exit_code == 2
    assert "was not trained as an encoder" in " ".join(refused.output.split())


def test_a_dense_encoder_is_exported(corpus: Path, pairs: Path, tmp_path: Path) -> None:  # noqa: F811
    model = tiny_checkpoint_dir("bert", tmp_path / "model", layers=1)
    carve(recipe(corpus, pairs, {"contrastive": {}}), tmp_path / "out", model=str(model))
    done = run("export", tmp_path / "out", "-o", tmp_path / "stock", "--format", "sentence-transformers")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "stock/modules.json").read_text())[1]["path"] == "1_Pooling"
    assert load(tmp_path / "stock").encoder().slug == "contrastive"
    refused = run("export", model, "-o", tmp_path / "x", "--format", "sentence-transformers")
    assert refused.exit_code == 2
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"objective": {"contrastive": {}}, "pairs": None}, "contrastive needs pairs"),
        ({"objective": {"meap": {}}}, "pairs need an objective that trains an encoder"),
        ({"pairs": None, "negatives": {}}, "negatives are mined for pairs"),
        ({"objective": {"vdr": {}}, "steps": None, "tokens": 5}, "tokens does not apply to pairs"),
        ({"objective": {"vdr": {}}, "select": {"random": {"budget": 0.5}}}, "select does not apply to pairs"),
        ({"objective": {"vdr": {}}, "early_stopping_patience": 2}, "set metric_for_best_model: error"),
        ({"objective": {"vdr": {}}, "negatives": {"ranks": [5, 2]}}, "the first must not exceed the last"),
        ({"objective": {"vdr": {}}, "texts": "wikipedia"}, "texts and pairs are given"),
    ],
)
def test_a_step_that_does_not_fit_is_refused(fields: dict[str, Any], says: str) -> None:
    step = {**TRAIN, "pairs": "pairs.jsonl", **fields}
    with pytest.raises(IntaglioError, match=says) as caught:
        Recipe.from_dict({"steps": [{"train": {key: value for key, value in step.items() if value is not None}}]})
    assert "\n" not in str(caught.value)


def test_mining_settings_come_back() -> None:
    step = {**TRAIN, "objective": {"vdr": {}}, "pairs": "pairs.jsonl", "negatives": {"ranks": [2, 9], "margin": 0.9}}
    made = Recipe.from_dict({"steps": [{"train": step}]})
    assert Recipe.from_dict(json.loads(json.dumps(made.dump()))) == made


def test_a_malformed_pair_ends_the_run_before_anything_is_written(
    corpus: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    model = tiny_checkpoint_dir("bert", tmp_path / "model", layers=1)
    file = tmp_path / "bad.jsonl"
    file.write_text('{"query": "a", "positive": ""}\n')
    with pytest.raises(IntaglioError, match="its positive is empty"):
        carve(recipe(corpus, file, {"contrastive": {}}), tmp_path / "out", model=str(model))
    assert not (tmp_path / "out").exists()


def test_bad_input_of_encoders_is_one_sentence_at_the_command_line(
    corpus: Path,  # noqa: F811
    pairs: Path,
    tmp_path: Path,
) -> None:
    """A decoder without a head, one pair, vectors that are all zero: exit code 2 and nothing half-written."""
    whole, headless = tiny_checkpoint_dir("llama", tmp_path / "whole", layers=1), tmp_path / "headless"
    tiny_model("llama", layers=1).model.save_pretrained(headless)
    tiny_tokenizer("llama").save_pretrained(headless)
    alone = tmp_path / "alone.jsonl"
    alone.write_text(pairs.read_text().splitlines()[0])
    cases: list[tuple[Path, Path, dict[str, Any], str]] = [
        (headless, pairs, {}, "mistral_splade needs a language-model head, and LlamaModel has none"),
        (whole, alone, {}, "so there is nothing to contrast"),
        (whole, pairs, {"threshold": 1e6}, "sparsity collapsed at step 1: every query vector is zero"),
    ]
    for model, file, fields, says in cases:
        document = recipe(corpus, file, {"mistral_splade": fields}, evaluate=0.0).dump()
        (tmp_path / "recipe.yaml").write_text(json.dumps(document))  # JSON is YAML
        done = run("carve", model, "--recipe", tmp_path / "recipe.yaml", "-o", tmp_path / "out")
        assert done.exit_code == 2
        assert says in " ".join(done.output.split())
        assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_decoder_becomes_a_bidirectional_encoder(corpus: Path, tmp_path: Path) -> None:  # noqa: F811
    """Batches of one task, sampled negatives, instructions, and the export as stock modules."""
    file, model = tmp_path / "pairs.jsonl", tiny_checkpoint_dir("llama", tmp_path / "model", layers=1)
    rows: list[dict[str, Any]] = [{"query": f"fox number {n}", "positive": text} for n, text in enumerate(TEXTS)]
    labels = {"task": "foxes", "instruction": "Find the fox", "symmetric": True}
    more = {"negatives": {"count": 2, "sample": True, "ranks": [2, 9]}, "homogeneous_ratio": 1.0, "evaluate": 0.0}
    file.write_text("".join(json.dumps({**row, **labels}) + "\n" for row in rows), encoding="utf-8")
    carve(recipe(corpus, file, {"kalm_v2": {"temperature": 0.1}}, **more), tmp_path / "out", model=str(model))
    made = run("export", tmp_path / "out", "-o", tmp_path / "stock", "--format", "sentence-transformers")
    assert made.exit_code == 0, made.output
    assert json.loads((tmp_path / "stock/config.json").read_text())["is_causal"] is False
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(IntaglioError, match="groups examples by their task, and example 0 has none"):
        carve(recipe(corpus, file, {"kalm_v2": {}}, **more), tmp_path / "none", model=str(model))
    assert not (tmp_path / "none").exists()
