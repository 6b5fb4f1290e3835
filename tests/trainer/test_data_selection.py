"""Selectors: the choice at random, the metadata of a choice, and when the original is in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from intaglio.checkpoint import Checkpoint, load
from intaglio.methods.base import Progress, no_progress
from intaglio.methods.registry import get_method
from intaglio.recipe.run import carve
from intaglio.report import carve_page
from intaglio.trainer import Example, KeyedRNG, Selection, Selector
from intaglio.trainer.data_selection import CHOICE, RandomExamples, chosen
from tests.families import tiny_checkpoint_dir
from tests.recipe.test_run import corpus, files, make_recipe  # noqa: F401
from tests.recipe.test_run_train import TRAIN
from tests.trainer.helpers import TEXTS, checkpoint, run, same, weights
from tests.trainer.test_resume import Killed, killer

PARTS = [{"about": "a & b", "examples": 3, "degradation": 0.25}, {"about": "c", "examples": 4, "degradation": 0.5}]


class First:
    """A selector that takes the first examples, and tells of it."""

    budget = 0.1

    def __init__(self, compares: bool = True) -> None:
        self.compares, self.seen = compares, []  # type: ignore[var-annotated]

    def select(
        self,
        dataset: Sequence[Example],
        model: Checkpoint,
        original: Checkpoint | None,
        budget: float,
        rng: KeyedRNG,
        *,
        progress: Progress = no_progress,
    ) -> Selection:
        self.seen.append(original)
        progress(1, 1, "first: looking")
        bars = {"title": "clusters", "axis": "nats", "items": {"a & b": 0.25, "c": 0.5}}
        return Selection([2, 1, 0], {"chosen": 3, "clusters": PARTS, "seconds": {"looking": 1.5}, "bars": bars})


def test_a_choice_at_random() -> None:
    assert get_method("random") is RandomExamples
    assert isinstance(RandomExamples(), Selector)
    data, ckpt = [{"id": n} for n in range(40)], checkpoint()
    few, more = (list(RandomExamples().select(data, ckpt, None, share, KeyedRNG(3))) for share in (0.25, 0.5))
    assert len(few) == len(set(few)) == 10
    assert more[:10] == few
    assert list(RandomExamples().select(data, ckpt, None, 0.25, KeyedRNG(4))) != few
    assert len(RandomExamples().select(data, ckpt, None, 0.001, KeyedRNG(3))) == 1
    assert len(RandomExamples().select(data, ckpt, None, 1.0, KeyedRNG(3))) == 40


def test_the_original_is_loaded_for_those_who_compare() -> None:
    data, ckpt, asked = [{"id": n} for n in range(5)], checkpoint(), []

    def original() -> Checkpoint:
        asked.append(1)
        return ckpt

    for compares, given in ((True, ckpt), (False, None)):
        selector = First(compares)
        indices, metadata = chosen(selector, data, ckpt, original, 0)
        assert indices == [0, 1, 2]
        assert metadata["chosen"] == 3
        assert selector.seen == [given]
    assert asked == [1]
    chosen(selector := First(False), data, ckpt, ckpt, 0)
    assert selector.seen == [ckpt]  # it is there anyway


def test_metadata_of_a_selection_is_recorded_without_its_seconds() -> None:
    ckpt, plain, messages = checkpoint(), checkpoint(), []
    run(ckpt, select=First(), steps=2, progress=lambda done, total, what: messages.append(what))
    run(plain, TEXTS[:3], steps=2)
    assert same(weights(ckpt), weights(plain))
    assert messages[0] == "first: looking"
    step = ckpt.record.steps[-1]
    assert step.chosen["selection"] == {"chosen": 3, "clusters": PARTS}
    assert step.chosen["bars"]["title"] == "clusters"
    assert step.timings == {"looking": 1.5}
    assert "timings" not in step.model_dump()


def test_a_resumed_run_does_not_choose_again(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"steps": 3, "save_every": 1, "warmup": 0}
    whole, killed, again, other = (checkpoint() for _ in range(4))
    run(whole, select=First(), **arguments)
    with pytest.raises(Killed):
        run(killed, select=First(), directory=tmp_path, progress=killer(2), **arguments)
    selector = First()
    run(again, select=selector, directory=tmp_path, **arguments)
    assert selector.seen == []
    assert same(weights(again), weights(whole))
    assert again.record == whole.record
    run(other, select=selector, directory=tmp_path, resume=False, **arguments)
    assert len(selector.seen) == 1
    (tmp_path / CHOICE).write_text("{", encoding="utf-8")  # damaged: it is chosen again
    run(checkpoint(), select=selector, directory=tmp_path, **arguments)
    assert len(selector.seen) == 2


def test_a_selection_is_a_sequence() -> None:
    found = Selection((4, 2, 9))
    assert (list(found), len(found), found[1], found[:2], 9 in found) == ([4, 2, 9], 3, 2, (4, 2), True)
    assert found.metadata == {}


def test_a_choice_in_a_report(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    model = str(tiny_checkpoint_dir("llama", tmp_path / "model", layers=1))
    fields: dict[str, Any] = {"budget": 0.5, "embedding": "tfidf", "clusters": 2, "length": 64}
    steps = [
        {"wanda": {"pattern": "2:4"}},
        {"train": {**TRAIN, "lora": {"r": 2}, "select": {"paser": fields}}},
    ]
    recipe = make_recipe(corpus, steps)
    document = carve(recipe, tmp_path / "out", model=model)
    step = document["steps"][1]
    assert set(step["timings"]) == {"embedding", "clustering", "comparing", "concepts"}
    page = carve_page(document)
    assert "The examples that were chosen" in page
    assert "How far the model is from its original, by cluster" in page
    assert "seconds of comparing" in page
    again = carve(recipe, tmp_path / "again", model=model)
    assert again["steps"][1]["chosen"] == step["chosen"]
    assert files(tmp_path / "again") == files(tmp_path / "out")  # no seconds in what is compared
    assert load(tmp_path / "out").kind == "standalone"
    assert document["after"]["zero_fraction"] == pytest.approx(dict.fromkeys(document["after"]["zero_fraction"], 0.5))
