"""Carve by a recipe: killed at any moment, OUT is absent or whole, and a resumed run ends in the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from intaglio.checkpoint import RECORD, load, weights_digest
from intaglio.data.texts import load_texts
from intaglio.errors import IntaglioError
from intaglio.methods.base import Progress
from intaglio.recipe import run
from intaglio.recipe.plan import plan
from intaglio.recipe.run import carve, compare
from intaglio.recipe.schema import Measure, Recipe
from intaglio.recipe.source import warn_if_worse_than_uniform
from tests.families import tiny_checkpoint_dir

STEPS = [{"wanda": {"sparsity": 0.25}}, {"sparsegpt": {"sparsity": 0.5, "block": 16}}, {"dsnot": {"pattern": "2:4"}}]
# Everything that must be the same, byte for byte; the report holds timings.
MEASURED = {"report.json", "report.html"}
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "then",
    "sleeps",
    "by",
    "a",
    "river",
]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus"
    path.mkdir()
    for index in range(30):
        turned = WORDS[index % 7 :] + WORDS[: index % 5]
        (path / f"{index:02}.txt").write_text(" ".join(turned * 6), encoding="utf-8")
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_checkpoint_dir("gemma3", tmp_path / "model")


def make_recipe(corpus: Path, steps: list[dict] | None = None) -> Recipe:
    return Recipe.from_dict(
        {
            "seed": 3,
            "calibration": {"texts": str(corpus), "samples": 6, "length": 32, "batch_size": 2},
            "measure": {"texts": str(corpus), "samples": 2, "length": 32, "speed": False},
            "steps": steps or STEPS,
        }
    )


def files(out: Path) -> dict[str, bytes]:
    found = sorted(file for file in out.rglob("*") if file.is_file() and file.name not in MEASURED)
    return {file.relative_to(out).as_posix(): file.read_bytes() for file in found}


def leftovers(out: Path) -> list[str]:
    return [path.name for path in out.parent.iterdir() if path.name.startswith(f".{out.name}")]


class Killed(BaseException):
    """Stands for the end of the process."""


def kill_at(call: int) -> Progress:
    count = 0

    def progress(done: int, total: int, what: str) -> None:
        nonlocal count
        count += 1
        if count == call:
            raise Killed

    return progress


def test_what_a_carve_leaves(model: Path, corpus: Path, tmp_path: Path) -> None:
    document = carve(make_recipe(corpus), tmp_path / "out", model=str(model))
    assert leftovers(tmp_path / "out") == []
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", RECORD} | MEASURED <= names
    assert document["before"]["kl_mean"] == 0.0
    assert document["before"]["top1_agreement"] == 1.0
    assert document["after"]["kl_mean"] > 0
    assert min(document["after"]["zero_fraction"].values()) >= 0.5
    back = load(tmp_path / "out")
    assert [step.slug for step in back.record.steps] == ["wanda", "sparsegpt", "dsnot"]
    assert back.record.steps[0].seed == 3
    assert back.tokenizer.chat_template


@pytest.mark.parametrize(
    "call",
    [
        20,
        65,
        pytest.param(3, marks=pytest.mark.slow),
        pytest.param(30, marks=pytest.mark.slow),
        pytest.param(50, marks=pytest.mark.slow),
    ],
)
def test_killed_anywhere_it_resumes_to_the_same_bytes(model: Path, corpus: Path, tmp_path: Path, call: int) -> None:
    recipe, whole, broken = make_recipe(corpus), tmp_path / "whole", tmp_path / "broken"
    carve(recipe, whole, model=str(model))
    with pytest.raises(Killed):
        carve(recipe, broken, model=str(model), progress=kill_at(call))
    assert not broken.exists()
    carve(recipe, broken, model=str(model), resume=True)
    assert files(broken) == files(whole)
    assert leftovers(broken) == []


def test_finished_steps_are_not_done_again(model: Path, corpus: Path, tmp_path: Path) -> None:
    recipe, out, seen = make_recipe(corpus), tmp_path / "out", set()
    with pytest.raises(Killed):
        carve(recipe, out, model=str(model), progress=kill_at(60))
    carve(recipe, out, model=str(model), resume=True, progress=lambda done, total, what: seen.add(what.split(":")[0]))
    assert "dsnot" in seen
    assert "wanda" not in seen


def test_an_interrupted_run_is_neither_forgotten_nor_mixed_up(model: Path, corpus: Path, tmp_path: Path) -> None:
    recipe, out = make_recipe(corpus), tmp_path / "out"
    with pytest.raises(Killed):
        carve(recipe, out, model=str(model), progress=kill_at(60))
    with pytest.raises(IntaglioError, match="has finished 2 of 3 steps; resume it, or overwrite it"):
        carve(recipe, out, model=str(model))
    other = make_recipe(corpus, [{"magnitude": {"sparsity": 0.5}}])
    with pytest.raises(IntaglioError, match="was of another recipe"):
        carve(other, out, model=str(model), resume=True)
    carve(other, out, model=str(model), overwrite=True)
    assert [step.slug for step in load(out).record.steps] == ["magnitude"]
    assert leftovers(out) == []


@pytest.mark.parametrize("what", ["text", "model"])
def test_other_texts_or_weights_of_the_same_name_are_not_mixed_in(
    what: str, model: Path, corpus: Path, tmp_path: Path
) -> None:
    recipe, out = make_recipe(corpus), tmp_path / "out"
    with pytest.raises(Killed):
        carve(recipe, out, model=str(model), progress=kill_at(60))
    if what == "text":
        (corpus / "00.txt").write_text("the dog runs by a river and sleeps " * 20)
    else:
        os.utime(model / "model.safetensors", ns=(1, 1))
    with pytest.raises(IntaglioError, match="was of another recipe, model, text"):
        carve(recipe, out, model=str(model), resume=True)


def test_a_run_that_has_ended_is_left_as_it_is_by_resume(model: Path, corpus: Path, tmp_path: Path) -> None:
    recipe, out = make_recipe(corpus, [{"magnitude": {"sparsity": 0.5}}]), tmp_path / "out"
    document = carve(recipe, out, model=str(model))
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert carve(recipe, out, model=str(model), resume=True) == document
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(IntaglioError, match="exists and is not empty"):
        carve(make_recipe(corpus, [{"magnitude": {"sparsity": 0.25}}]), out, model=str(model), resume=True)


def test_resume_without_anything_to_resume_starts(model: Path, corpus: Path, tmp_path: Path) -> None:
    carve(make_recipe(corpus, [{"magnitude": {"sparsity": 0.5}}]), tmp_path / "out", model=str(model), resume=True)
    assert (tmp_path / "out" / RECORD).is_file()


def test_killed_just_after_out_appeared(
    model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = make_recipe(corpus, [{"magnitude": {"sparsity": 0.5}}]), tmp_path / "out"

    def die(*_: object) -> None:
        raise Killed

    real = run.publish
    monkeypatch.setattr(run, "publish", lambda *arguments: (real(*arguments), die()))
    with pytest.raises(Killed):
        carve(recipe, out, model=str(model))
    monkeypatch.undo()
    assert (out / RECORD).is_file()
    assert leftovers(out) != []
    document = carve(recipe, out, model=str(model), resume=True)
    assert document["steps"][0]["slug"] == "magnitude"
    assert leftovers(out) == []


def test_threads_are_put_back_on_resume(model: Path, corpus: Path, tmp_path: Path) -> None:
    recipe, threads = make_recipe(corpus), torch.get_num_threads()
    try:
        with pytest.raises(Killed):
            carve(recipe, tmp_path / "out", model=str(model), progress=kill_at(60))
        torch.set_num_threads(threads + 1)
        carve(recipe, tmp_path / "out", model=str(model), resume=True)
        assert load(tmp_path / "out").record.threads == threads
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


FIT = {"fit": {"aded": {"nodes": 7}}}


def test_a_fit_attaches_and_leaves_the_weights_alone(model: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    document = carve(make_recipe(corpus, [FIT]), out, model=str(model))
    assert document["title"] == f"{model} fitted aded"
    assert document["before"]["perplexity"] == document["after"]["perplexity"]
    assert weights_digest(out) == weights_digest(model)
    (step,) = load(out).record.steps
    assert (step.slug, step.verb, step.seed, step.parameters["nodes"]) == ("aded", "fit", 3, 7)
    assert step.chosen["entries"] >= step.chosen["rows"] > 0
    # The table is of the documents that nothing is measured on.
    train, held_out = load_texts(str(corpus)).split()
    assert step.chosen["documents"] == len(train) < len(train) + len(held_out)
    assert load(out).decoder("aded").nodes == 7


@pytest.mark.parametrize(
    "call",
    [
        64,
        pytest.param(20, marks=pytest.mark.slow),
        pytest.param(70, marks=pytest.mark.slow),
        pytest.param(78, marks=pytest.mark.slow),
    ],
)
def test_a_fit_too_is_put_aside_and_resumed(model: Path, corpus: Path, tmp_path: Path, call: int) -> None:
    recipe, whole, broken = make_recipe(corpus, [{"wanda": {"sparsity": 0.5}}, FIT]), tmp_path / "a", tmp_path / "b"
    count = 0

    def counted(*_: object) -> None:
        nonlocal count
        count += 1

    carve(recipe, whole, model=str(model), progress=counted)
    assert "attachments/aded.safetensors" in files(whole)
    with pytest.raises(Killed):
        carve(recipe, broken, model=str(model), progress=kill_at(min(call * count // 80, count)))
    assert not broken.exists()
    carve(recipe, broken, model=str(model), resume=True)
    assert files(broken) == files(whole)
    assert leftovers(broken) == []
    assert "aded" in load(broken).attachments


def test_a_carve_behind_a_fit_makes_it_stale(model: Path, corpus: Path, tmp_path: Path) -> None:
    carve(make_recipe(corpus, [FIT]), tmp_path / "a", model=str(model))
    carve(make_recipe(corpus, [{"magnitude": {"sparsity": 0.5}}]), tmp_path / "b", model=str(tmp_path / "a"))
    with pytest.raises(IntaglioError, match="aded was fitted before magnitude changed the weights; fit it again"):
        load(tmp_path / "b").decoder("aded")
    carve(make_recipe(corpus, [FIT]), tmp_path / "c", model=str(tmp_path / "b"))
    assert load(tmp_path / "c").decoder("aded").nodes == 7


def test_a_fit_for_an_encoder_is_refused_before_any_work(corpus: Path, tmp_path: Path) -> None:
    encoder = tiny_checkpoint_dir("bert", tmp_path / "encoder")
    for what in (lambda: carve(make_recipe(corpus, [FIT]), tmp_path / "out", model=str(encoder)),
                lambda: plan(make_recipe(corpus, [FIT]), model=str(encoder))):  # fmt: skip
        with pytest.raises(IntaglioError, match=r"aded needs a model that generates; .* is an encoder"):
            what()
    assert not (tmp_path / "out").exists()


def test_a_second_carve_to_the_same_place_is_refused(model: Path, corpus: Path, tmp_path: Path) -> None:
    recipe, out = make_recipe(corpus, [{"magnitude": {"sparsity": 0.5}}]), tmp_path / "out"

    def intrude(done: int, total: int, what: str) -> None:
        with pytest.raises(IntaglioError, match=r"another carve to .* is running"):
            carve(recipe, out, model=str(model))

    carve(recipe, out, model=str(model), progress=intrude)


def test_the_same_seed_gives_the_same_files_and_another_does_not(model: Path, corpus: Path, tmp_path: Path) -> None:
    first = make_recipe(corpus, [{"wanda": {"sparsity": 0.5}}])
    other = Recipe.from_dict(first.dump() | {"seed": 5})  # a seed that begins with another document
    for name, recipe in (("a", first), ("b", first), ("c", other)):
        carve(recipe, tmp_path / name, model=str(model))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a")["model.safetensors"] != files(tmp_path / "c")["model.safetensors"]


def test_a_carved_checkpoint_can_be_carved_again(model: Path, corpus: Path, tmp_path: Path) -> None:
    carve(make_recipe(corpus, [{"magnitude": {"sparsity": 0.25}}]), tmp_path / "a", model=str(model))
    carve(make_recipe(corpus, [{"wanda": {"sparsity": 0.5}}]), tmp_path / "b", model=str(tmp_path / "a"))
    assert [step.slug for step in load(tmp_path / "b").record.steps] == ["magnitude", "wanda"]


def test_an_encoder_is_measured_by_its_embeddings(corpus: Path, tmp_path: Path) -> None:
    encoder = tiny_checkpoint_dir("modernbert", tmp_path / "encoder")
    document = carve(make_recipe(corpus, [{"wanda": {"sparsity": 0.5}}]), tmp_path / "out", model=str(encoder))
    assert document["before"]["cosine"] == pytest.approx(1.0, abs=1e-6)
    assert 0 < document["after"]["cosine"] < 1
    for side in (document["before"], document["after"]):
        assert side["perplexity"] is side["kl_mean"] is side["decode_tokens_per_s"] is None


def test_compare_measures_agreement_only_on_the_same_tokens(model: Path, corpus: Path, tmp_path: Path) -> None:
    wanted = Measure(texts=str(corpus), samples=2, length=32)
    carve(make_recipe(corpus, [{"magnitude": {"sparsity": 0.5}}]), tmp_path / "out", model=str(model))
    document = compare(str(model), str(tmp_path / "out"), wanted=wanted)
    assert document["a"]["kl_mean"] == 0.0
    assert document["b"]["kl_mean"] > 0
    encoder = tiny_checkpoint_dir("bert", tmp_path / "encoder")
    assert compare(str(model), str(encoder), wanted=wanted)["b"]["kl_mean"] is None


@pytest.mark.parametrize(("family", "field"), [("llama", "kl_mean"), ("bert", "cosine")])
def test_compare_of_other_sizes_has_no_agreement(family: str, field: str, corpus: Path, tmp_path: Path) -> None:
    one = tiny_checkpoint_dir(family, tmp_path / "one")
    other = tiny_checkpoint_dir(family, tmp_path / "other")
    checkpoint = load(other)
    if family == "llama":  # a padded embedding
        checkpoint.model.resize_token_embeddings(checkpoint.vocabulary + 16)
    else:
        config = type(checkpoint.config)(
            **{**checkpoint.config.to_dict(), "hidden_size": 2 * checkpoint.config.hidden_size}
        )
        checkpoint.model = type(checkpoint.model)(config).eval()
    checkpoint.save(other, overwrite=True)
    document = compare(str(one), str(other), wanted=Measure(texts=str(corpus), samples=2, length=32, speed=False))
    assert document["a"][field] is not None
    assert document["b"][field] is None


def test_a_model_that_knows_less_than_nothing_is_noted(model: Path, corpus: Path, tmp_path: Path) -> None:
    checkpoint, side = load(model), {"perplexity": 1e6}
    assert "worse than a uniform guess among its" in warn_if_worse_than_uniform(checkpoint, side)[0]
    for perplexity in (None, 1.0, float(checkpoint.vocabulary)):
        assert warn_if_worse_than_uniform(checkpoint, {"perplexity": perplexity}) == []


def test_a_plan_reads_no_weights(model: Path, corpus: Path) -> None:
    (model / "model.safetensors").chmod(0o600)
    found = plan(make_recipe(corpus, [*STEPS, FIT]), model=str(model))
    assert [step["slug"] for step in found["steps"]] == ["wanda", "sparsegpt", "dsnot", "aded"]
    assert [step["verb"] for step in found["steps"]] == ["carve"] * 3 + ["fit"]
    assert all(step["seconds"] > 0 and step["memory_bytes"] > found["bytes"] for step in found["steps"])
    assert found["tokens"] == 6 * 32
    assert found["libraries_bytes"] > 1e8
    with pytest.raises(IntaglioError, match="2:3 does not fit"):
        plan(make_recipe(corpus, [{"wanda": {"pattern": "2:3"}}]), model=str(model))


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.15, 0.3, 0.5, 0.8, 1.2])
def test_kill_minus_9(model: Path, corpus: Path, tmp_path: Path, delay: float) -> None:
    """A real process, really killed, some time after it began to work."""
    recipe, out, whole = make_recipe(corpus, [*STEPS, FIT]), tmp_path / "out", tmp_path / "whole"
    code = (
        "import sys; from intaglio.recipe.run import carve; from intaglio.recipe.schema import Recipe; import json\n"
        "import torch; torch.set_num_threads(1)\n"
        "r = Recipe.from_dict(json.loads(sys.argv[1])); print('ready', flush=True)\n"
        "carve(r, sys.argv[2], model=sys.argv[3])\n"
    )
    import json

    command = [sys.executable, "-c", code, json.dumps(recipe.dump()), str(out), str(model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
    carve(recipe, whole, model=str(model))
    if not out.exists():
        carve(recipe, out, model=str(model), resume=True)
    assert files(out) == files(whole)
    assert leftovers(out) == []
