"""Carving by a recipe that replaces the tokenizer: data are cut anew, reports compare no tokens, killed runs go on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from intaglio import report
from intaglio.checkpoint import from_scratch, load, weights_digest
from intaglio.errors import IntaglioError
from intaglio.methods.base import Progress
from intaglio.recipe.plan import plan
from intaglio.recipe.run import carve, compare
from intaglio.recipe.schema import Measure, Recipe
from tests.families import tiny_checkpoint_dir

TEXT = "the quick brown fox jumps over a lazy dog and then sleeps by a river "


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus"
    path.mkdir()
    for index in range(30):
        (path / f"{index:02}.txt").write_text(TEXT[index % 9 :] * 8, encoding="utf-8")
    return path


@pytest.fixture
def donor(tmp_path: Path) -> Path:
    made = from_scratch.new(
        "llama", width=24, depth=1, vocab=400, seed=1, tokenizer=[TEXT.replace("the ", "a rather ") * 9]
    )
    return made.save(tmp_path / "donor")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_checkpoint_dir("llama", tmp_path / "model")


def recipe(corpus: Path, *steps: dict[str, Any]) -> Recipe:
    return Recipe.from_dict(
        {
            "calibration": {"texts": str(corpus), "samples": 6, "length": 32, "batch_size": 2},
            "measure": {"texts": str(corpus), "samples": 2, "length": 32, "speed": False},
            "steps": list(steps),
        }
    )


def transplant(donor: Path, **fields: Any) -> dict[str, Any]:
    return {"omp_transplant": {"donor": str(donor), "digits": "single", **fields}}


def test_what_follows_is_calibrated_and_measured_in_the_new_tokens(
    corpus: Path, donor: Path, model: Path, tmp_path: Path
) -> None:
    steps = (transplant(donor), {"wanda": {"sparsity": 0.5}}, {"fit": {"aded": {}}})
    document = carve(recipe(corpus, *steps), tmp_path / "out", model=str(model))
    before, after = document["before"], document["after"]
    assert before["tokens"] != after["tokens"]
    assert after["kl_mean"] is None
    assert after["top1_agreement"] is None
    assert after["bits_per_byte"] is not None
    back = load(tmp_path / "out")
    assert set(back.attachments) == {"aded"}
    assert back.decoder("aded") is not None
    # The same steps on a model that had the tokenizer from the start calibrate on the same tokens.
    carve(recipe(corpus, transplant(donor)), tmp_path / "first", model=str(model))
    carve(recipe(corpus, *steps[1:]), tmp_path / "then", model=str(tmp_path / "first"))
    assert back.record.steps[1].calibration == load(tmp_path / "then").record.steps[1].calibration
    assert weights_digest(tmp_path / "out") == weights_digest(tmp_path / "then")
    assert re.search(r"replaced: after omp_transplant, [\d.]+% of the held-out tokens are new", document["notes"][-1])


def test_a_report_gives_no_verdict_on_other_tokens(corpus: Path, donor: Path, model: Path, tmp_path: Path) -> None:
    document = carve(recipe(corpus, transplant(donor)), tmp_path / "out", model=str(model))
    both = compare(str(model), str(tmp_path / "out"), wanted=Measure(texts=str(corpus), samples=2, length=32))
    for sides, told in (
        ((document["before"], document["after"]), report.summary(document)),
        ((both["a"], both["b"]), report.summary(both)),
    ):
        rows = {row.measure.key: row for row in report.rows(*sides)}
        assert rows["perplexity"].change.verdict == ""
        assert "not comparable" in rows["perplexity"].change.text
        assert rows["top1_agreement"].after.why == "on other tokens"
        assert rows["bits_per_byte"].change.text.endswith("%")
        assert told.startswith("Bits per byte ")
        assert "perplexities of other tokens do not compare" in told
    page = report.carve_page(document)
    assert "not comparable" in page
    assert "Perplexity, lower is better" not in page  # no bars beside each other
    # On the same tokens nothing has changed.
    same = compare(str(model), str(model), wanted=Measure(texts=str(corpus), samples=2, length=32, speed=False))
    assert "perplexity" in report.summary(same).lower()


def test_a_killed_run_goes_on_in_the_new_tokens(corpus: Path, donor: Path, model: Path, tmp_path: Path) -> None:
    whole = recipe(corpus, transplant(donor), {"wanda": {"sparsity": 0.5}})
    carve(whole, tmp_path / "whole", model=str(model))

    class Killed(Exception):
        pass

    def kill(done: int, total: int, what: str) -> None:
        if what.startswith("wanda"):
            raise Killed

    killed: Progress = kill
    with pytest.raises(Killed):
        carve(whole, tmp_path / "out", model=str(model), progress=killed)
    assert not (tmp_path / "out").exists()
    carve(whole, tmp_path / "out", model=str(model), resume=True)
    assert weights_digest(tmp_path / "out") == weights_digest(tmp_path / "whole")


def test_it_is_refused_before_any_work(corpus: Path, donor: Path, model: Path, tmp_path: Path) -> None:
    def never(done: int, total: int, what: str) -> None:
        raise AssertionError(what)

    for fields, sentence in (
        ({"donor": "nowhere"}, "donor: "),
        ({"k": 100_000}, "k is 100000; the two vocabularies share"),
        ({"least_overlap": 1.0}, "least_overlap requires 100%"),
    ):
        wrong = recipe(corpus, transplant(**({"donor": donor} | fields)))
        for run in (
            lambda wrong=wrong: carve(wrong, tmp_path / "out", model=str(model), progress=never),
            lambda wrong=wrong: plan(wrong, model=str(model)),
        ):
            with pytest.raises(IntaglioError, match=re.escape(sentence)) as caught:
                run()
            assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_a_plan_names_time_and_memory(corpus: Path, donor: Path, model: Path) -> None:
    (step,) = plan(recipe(corpus, transplant(donor)), model=str(model))["steps"]
    assert step["slug"] == "omp_transplant"
    assert step["seconds"] > 0
    assert step["memory_bytes"] > 0


def test_what_was_fitted_before_is_refused_after(corpus: Path, donor: Path, model: Path, tmp_path: Path) -> None:
    carve(recipe(corpus, {"fit": {"aded": {}}}), tmp_path / "fitted", model=str(model))
    carve(recipe(corpus, transplant(donor)), tmp_path / "out", model=str(tmp_path / "fitted"))
    with pytest.raises(IntaglioError, match="was fitted before omp_transplant changed the weights"):
        load(tmp_path / "out").decoder("aded")


def test_it_goes_with_pruning_unmasking_and_training(corpus: Path, donor: Path, model: Path, tmp_path: Path) -> None:
    steps = (
        {"magnitude": {"sparsity": 0.5}},
        transplant(donor),
        {"train": {"objective": {"meap": {"length": 24}}, "steps": 2, "batch_size": 2}},
        {"layerwise_unmasking": {"configuration": "0011"}},
    )
    document = carve(recipe(corpus, *steps), tmp_path / "out", model=str(model))
    assert document["after"]["tokens"] != document["before"]["tokens"]
    back = load(tmp_path / "out")
    assert back.kind == "runtime"
    assert torch.isfinite(back.model(torch.tensor([[5, 6, 7]])).logits).all()
