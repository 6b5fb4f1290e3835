"""Train steps that show outputs before and after: facts in both orders, filled lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from intaglio.data.facts import TEMPLATES, load_facts
from intaglio.data.texts import check_texts
from intaglio.errors import IntaglioError
from intaglio.recipe import run
from intaglio.recipe.plan import plan
from intaglio.recipe.run import carve
from intaglio.recipe.schema import Recipe
from intaglio.trainer import recipe_step
from tests.families import tiny_checkpoint_dir

TEXT = "the fox runs home\nand the dog sleeps\nin the warm sun\n"


def recipe_document(path: Path, **training: Any) -> dict[str, Any]:
    texts = path / "texts"
    texts.mkdir(exist_ok=True)
    for number in range(12):
        (texts / f"{number}.txt").write_text(f"{TEXT}number {number} of twelve\n{TEXT}", encoding="utf-8")
    measure = {"texts": str(texts), "samples": 2, "length": 16}
    return {
        "model": str(tiny_checkpoint_dir("llama", path / "model", layers=1)),
        "calibration": measure,
        "measure": {**measure, "speed": False},
        "steps": [{"train": {"steps": 2, "batch_size": 2, **training}}],
    }


def carved(path: Path, **training: Any) -> dict[str, Any]:
    return carve(Recipe.from_dict(recipe_document(path, **training)), path / "out")


def test_facts_are_asked_in_both_orders_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(recipe_step, "load_facts", lambda path: read.append(path) or load_facts(path))
    facts = [{"subject": f"dog {n}", "object": f"the fox {n}"} for n in range(5)]
    file = tmp_path / "facts.jsonl"
    file.write_text("\n".join(map(json.dumps, facts)), encoding="utf-8")
    document = carved(tmp_path, objective={"bico": {"length": 48}}, facts=str(file))
    assert read == [str(file)] * 2  # before any work, and to train
    (step,) = document["steps"]
    assert list(step["samples"]["scores"]) == ["forward questions answered", "reverse questions answered"]
    rows = step["samples"]["rows"]
    assert [row["prompt"] for row in rows[:1] + rows[4:5]] == ["Dog 0 is", "The fox 0 is"]
    assert rows[0]["expected"] == "the fox 0"
    assert {"evaluation/forward", "evaluation/reverse"} <= step["curve"].keys()
    assert step["chosen"]["data"]["rows"] == 5 * len(TEMPLATES)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "reverse questions answered" in page
    assert "The fox 0 is" in page


def test_lines_are_filled_before_and_after(tmp_path: Path) -> None:
    document = carved(tmp_path, objective={"codegen2": {"length": 64}}, evaluate=0.2)
    (step,) = document["steps"]
    (row, *_) = step["samples"]["rows"]
    assert row["expected"].endswith("of twelve")
    assert "▭" in row["prompt"]
    assert list(step["samples"]["scores"]) == [
        "lines filled exactly",
        "probability of a token of the line (geometric mean)",
    ]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count('<td colspan="4">') == len(step["samples"]["rows"])  # a prompt of several lines


@pytest.mark.parametrize("source", ["facts", "instructions", "labels", "pairs", "texts"])
def test_unreadable_data_are_refused_before_the_model_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setattr(run, "make_evaluator", lambda *_: pytest.fail("measured"))
    file = tmp_path / "broken.jsonl"
    file.write_text('{"subject": 1', encoding="utf-8")
    objective = {"labels": "token_classification", "pairs": "kalm_v2"}.get(source)
    named = {} if objective is None else {"objective": {objective: {}}}
    with pytest.raises(IntaglioError, match=r"broken\.jsonl"):
        carved(tmp_path, **named, **{source: str(file)})
    assert not (tmp_path / "out").exists()
    with pytest.raises(IntaglioError, match=r"broken\.jsonl"):
        plan(Recipe.from_dict(recipe_document(tmp_path, **named, **{source: str(file)})))


def test_empty_texts_are_refused_before_the_model_is_measured(tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(IntaglioError, match="hold no document"):
        check_texts(str(tmp_path / "blank.txt"))
    check_texts("someone/texts")  # of the hub: not opened


def test_streamed_texts_are_checked_without_reading_them_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large.txt").write_text(f"{TEXT}\n" * 9, encoding="utf-8")
    monkeypatch.setattr(Path, "read_bytes", lambda *_: pytest.fail("read whole"))
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("read whole"))
    recipe_step.Train(steps=1, texts=str(tmp_path / "large.txt"), stream=True).check_data()
    (tmp_path / "blank.txt").touch()
    with pytest.raises(IntaglioError, match="hold no document"):
        recipe_step.Train(steps=1, texts=str(tmp_path / "blank.txt"), stream=True).check_data()


def test_facts_do_not_go_with_a_share_held_out() -> None:
    for more, sentence in (({"evaluate": 0.1}, "evaluate does not apply"), ({"texts": "a"}, "give one source")):
        with pytest.raises(IntaglioError, match=sentence):
            Recipe.from_dict({"model": "m", "steps": [{"train": {"steps": 1, "facts": "invented", **more}}]})
