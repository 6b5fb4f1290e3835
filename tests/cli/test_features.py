"""`intaglio inspect --features` and `intaglio demo features`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from intaglio.checkpoint import Checkpoint
from intaglio.cli import demo_features
from intaglio.cli.app import app
from intaglio.cli.demo_features import _example
from intaglio.dictionaries.dictionary import CONFIG, SparseDictionary
from intaglio.methods.activations.gba_sae import GBASAE
from tests.families import tiny_model, tiny_tokenizer

IDS = torch.randint(8, 150, (12, 20), generator=torch.Generator().manual_seed(0))
TEXT = "the quick brown fox jumps over the lazy dog and then the dog sleeps in the sun\n\n"


def run(*words: str | Path, code: int = 0) -> Any:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return done


@pytest.fixture
def fitted(tmp_path: Path) -> Path:
    checkpoint = Checkpoint(tiny_model("llama", layers=2), tiny_tokenizer("llama"), "tiny")
    method = GBASAE(
        layer=1, width=24, tokens=220, batch_tokens=20, groups=3, adapt_every=2, beside=[{"topk_sae": {"k": 3}}]
    )
    method.fit(checkpoint, IDS)
    checkpoint.save(tmp_path / "model")
    method.dictionary("topk_sae.layers.1").save(tmp_path / "sae")
    (tmp_path / "texts.txt").write_text(TEXT * 40)
    return tmp_path


def test_a_page_of_features_is_written_and_a_table_printed(fitted: Path) -> None:
    options = ("--texts", fitted / "texts.txt", "--tokens", "300")
    out = run("inspect", fitted / "model", "--features", *options, "-o", fitted / "page.html").stdout
    page = (fitted / "page.html").read_text(encoding="utf-8")
    assert "features of layers.1" in page
    assert "gba_sae.layers.1" in page
    assert f"page: {fitted / 'page.html'}" in out
    assert "at a time" in out
    named = ("--dictionary", "topk_sae.layers.1", "-o", fitted / "other.html", "--json")
    document = json.loads(run("inspect", fitted / "model", "--features", *options, *named).stdout)
    assert document["dictionary"] == "topk_sae.layers.1"
    assert document["l0"] == 3
    assert 300 <= document["tokens"] < 450
    given = ("--dictionary", fitted / "sae", "-o", fitted / "other.html", "--json")
    read = json.loads(run("inspect", fitted / "model", "--features", *options, *given).stdout)
    assert read["features"] == document["features"]


def test_what_cannot_be_shown_is_one_sentence_and_writes_nothing(fitted: Path) -> None:
    model, page = fitted / "model", fitted / "page.html"
    config = json.loads((fitted / "sae" / CONFIG).read_text())
    config["metadata"]["intaglio"]["about"]["fingerprints"] = ["0" * 64]
    (fitted / "sae" / CONFIG).write_text(json.dumps(config))
    for words, says in (
        (["--features", "--masks"], "--masks and --features are given; give one of them"),
        (["--features", "-o", "page.pdf"], "the page page.pdf must be an .html file"),
        (["--features", "--dictionary", "other", "-o", page], "has no dictionary 'other'"),
        (["--features", "--dictionary", fitted / "sae", "-o", page], "whose weights are not those of"),
        (["--features", "--texts", fitted / "absent.txt", "-o", page], "absent.txt"),
    ):
        error = run("inspect", model, *words, code=2).stderr.strip()
        assert says in error
        assert "\n" not in error
    assert not page.exists()


def feature(m: int, rate: float, peaks: list[int]) -> dict[str, Any]:
    return {"id": m, "rate": rate, "contexts": [[[9, peak, 8], [1, 99, 0]] for peak in peaks]}


def test_the_example_is_a_rare_feature_with_one_token_at_its_peaks() -> None:
    rows = [feature(0, 0.5, [3, 3, 3, 3]), feature(1, 0.01, [3, 4, 5, 3]), feature(2, 0.01, [4, 4, 4, 5])]
    assert _example({"features": rows})["id"] == 2
    assert _example({"features": rows[:1]})["id"] == 0


@pytest.mark.slow
def test_the_demo_writes_its_page_dictionary_and_steered_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_features, "TOKENS", 8000)
    monkeypatch.setattr(demo_features, "READ", 2000)
    document = demo_features.demo(tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"report.html", "report.json", "dictionary"}
    assert SparseDictionary.load(tmp_path / "out" / "dictionary").width == demo_features.WIDTH
    texts = [row["text"] for row in document["steered"]]
    assert all(text.startswith(demo_features.PROMPT) for text in texts)
    assert len(set(texts)) > 1
    assert document["features"]["features"]
