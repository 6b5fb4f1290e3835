"""`intaglio train` on interactions and `recommend`: results, resuming, and bad input in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForMaskedLM, AutoTokenizer
from typer.testing import CliRunner

from intaglio.checkpoint import weights_digest
from intaglio.cli.app import app
from intaglio.recipe.run import carve
from intaglio.recipe.schema import Recipe
from tests.conftest import TinyDir
from tests.trainer.test_resume import Killed, killer

OPTIONS = ("--steps", "40", "--width", "16", "--depth", "1", "--context", "8", "--learning-rate", "0.01")


def run(*words: str | Path, stdin: str | None = None) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], input=stdin)


def log(path: Path, rows: list[str], header: str = "user,item,time,title") -> Path:
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def cycle(users: int = 30) -> list[str]:
    """Users who walk along twelve films, one named with a comma."""
    return [
        f'u{user},i{(user + step) % 12},{step},"Film, the {(user + step) % 12}th"'
        for user in range(users)
        for step in range(10)
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recommender")
    done = run("train", "--interactions", log(folder / "log.csv", cycle()), "-o", folder / "out", *OPTIONS)
    assert done.exit_code == 0, done.output
    return folder / "out"


def test_it_writes_a_stock_checkpoint_with_its_items_and_a_report(trained: Path) -> None:
    assert AutoModelForMaskedLM.from_pretrained(trained).config.vocab_size == 14
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert tokenizer("i3\ni4")["input_ids"] == tokenizer.convert_tokens_to_ids(["i3", "i4"])
    assert {file.suffix for file in trained.iterdir()} <= {".json", ".html", ".safetensors"}
    document = json.loads((trained / "report.json").read_text())
    assert document["data"] | {"digest": "", "source": ""} == {
        "users": 30, "items": 12, "interactions": 300, "digest": "", "source": ""}  # fmt: skip
    assert [(row["recommender"], row["protocol"]) for row in document["rankings"]] == [
        (name, protocol) for protocol in ("full", "popular", "uniform") for name in ("bert4rec", "popularity")
    ]
    page = (trained / "report.html").read_text()
    assert "Film, the 8th" in page
    assert "<svg" in page


def test_recommend_ranks_by_item_and_title(trained: Path) -> None:
    by_item = json.loads(run("recommend", trained, "--history", "i3, i4,i5", "-k", "3", "--json").stdout)
    by_title = json.loads(run("recommend", trained, "--history", "-", "-k", "3", "--json",
                              stdin="Film, the 3th\nFilm, the 4th\nFilm, the 5th\n").stdout)  # fmt: skip
    assert by_item == by_title
    assert [one["item"] for one in by_item["history"]] == ["i3", "i4", "i5"]
    found = by_item["recommendations"]
    assert [one["rank"] for one in found] == [1, 2, 3]
    assert not {"i3", "i4", "i5"} & {one["item"] for one in found}
    assert sorted((one["score"] for one in found), reverse=True) == [one["score"] for one in found]
    seen = json.loads(run("recommend", trained, "--history", "i3", "-k", "99", "--include-seen", "--json").stdout)
    assert len(seen["recommendations"]) == 12
    assert "Film, the" in run("recommend", trained, "--history", "i3").stdout


def test_it_goes_on_with_a_trained_model(trained: Path, tmp_path: Path) -> None:
    data = log(tmp_path / "log.csv", cycle(20))
    done = run("train", trained, "--interactions", data, "-o", tmp_path / "more", "--steps", "2")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "more" / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()
    new = log(tmp_path / "new.csv", [row.replace("i3,", "other,") for row in cycle()])
    done = run("train", trained, "--interactions", new, "-o", tmp_path / "no", "--steps", "2")
    assert (done.exit_code, (tmp_path / "no").exists()) == (2, False)
    assert "has 1 items that the model does not know, such as 'other'" in done.stderr


@pytest.mark.parametrize("objective", ["bert4rec", "sasrec"])
def test_a_killed_run_resumes_to_the_same_bytes(objective: str, tmp_path: Path) -> None:
    recipe = Recipe.from_dict({
        "new": {"family": {"bert4rec": "bert", "sasrec": "gpt2"}[objective], "width": 16, "depth": 1, "heads": 2,
                "context": 8, "tokenizer": "items", "dropout": 0.1},
        "steps": [{"train": {"objective": {objective: {}}, "steps": 6, "save_every": 1,
                             "interactions": str(log(tmp_path / "log.csv", cycle()))}}],
    })  # fmt: skip
    carve(recipe, tmp_path / "whole")
    with pytest.raises(Killed):
        carve(recipe, tmp_path / "killed", progress=killer(4))
    carve(recipe, tmp_path / "killed", resume=True)
    assert weights_digest(tmp_path / "killed") == weights_digest(tmp_path / "whole")


@pytest.mark.parametrize(
    ("rows", "header", "sentence"),
    [
        (["u,1"], "user,time", "has no column 'item_id'; it has: user_id, timestamp"),
        (["u1,a,1", "u2,b,2"], "user,item,time", "has one item a user, so nothing follows it"),
        (["u1,a,1", "u1,b,2"], "user,item,time", "has no users and items with 5 interactions each"),
        (["u1,a,soon"], "user,item,time", "line 2 of .* has the timestamp 'soon'; a number or a date"),
        (["u1,,1"], "user,item,time", "line 2 of .* has no item_id; a value is needed"),
        (["u1,a"], "user,item,time", "line 2 of .* has 2 columns; 3 are named"),
    ],
)
def test_a_bad_log_is_one_sentence(rows: list[str], header: str, sentence: str, tmp_path: Path) -> None:
    import re

    done = run("train", "--interactions", log(tmp_path / "log.csv", rows, header), "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert re.search(sentence, " ".join(done.stderr.split()))
    assert len(done.stderr.strip().splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["log.csv"]


def test_bad_options_are_one_sentence(trained: Path, tiny_dir: TinyDir, tmp_path: Path) -> None:
    for words, sentence in (
        (("train", "-o", tmp_path / "o"), "training data is missing; give one of --recipe FILE and --interactions LOG"),
        (("train", "--interactions", "x"), "an output directory is missing"),
        (
            ("train", "--interactions", "x", "-o", "o", "--objective", "meap"),
            "--objective is 'meap'; accepted: bert4rec",
        ),
        (("train", "--interactions", "x", "-o", "o", "--set", "mask=1"), "there is no such field here; did you mean"),
        (
            ("train", "--interactions", "nowhere", "-o", tmp_path / "o"),
            "'nowhere' are neither a bundled name nor a file",
        ),
        (("recommend", trained, "--history", "i3,none"), "the model does not know the item 'none'; it has 12, such as"),
        (("recommend", tiny_dir("llama"), "--history", "a"), "is no recommender: its tokens are no items"),
    ):
        done = run(*words)
        assert done.exit_code == 2, words
        assert sentence in done.stderr
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"interactions": None}, "bert4rec needs interactions"),
        ({"objective": {"meap": {}}}, "interactions need one of the objectives bert4rec and sasrec"),
        ({"evaluate": 0.1}, "evaluate and select do not apply to interactions"),
        ({"texts": "wikipedia"}, "texts and interactions are given"),
    ],
)
def test_steps_that_do_not_fit_are_refused(change: dict[str, Any], sentence: str) -> None:
    from intaglio.errors import IntaglioError

    step = {"objective": {"bert4rec": {}}, "interactions": "movielens", "steps": 2, **change}
    with pytest.raises(IntaglioError, match=sentence):
        Recipe.from_dict({"model": "m", "steps": [{"train": {k: v for k, v in step.items() if v is not None}}]})


def test_tokens_and_data_of_a_new_model_must_fit() -> None:
    from intaglio.errors import IntaglioError

    new = {"family": "bert", "width": 16, "depth": 1}
    step = {"train": {"objective": {"bert4rec": {}}, "interactions": "movielens", "steps": 2}}
    for document, sentence in (
        ({"new": new, "steps": [step]}, "a model of interactions needs tokenizer: items"),
        (
            {"new": {**new, "tokenizer": "items"}, "steps": [{"train": {"steps": 2}}]},
            "needs a train step with interactions",
        ),
        ({"new": {**new, "tokenizer": "items"}, "steps": [step, step]}, "a recipe on interactions has one step"),
    ):
        with pytest.raises(IntaglioError, match=sentence):
            Recipe.from_dict(document)
