"""What every registered modifier and selector promises; a new one inherits this by being registered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from intaglio.checkpoint import Checkpoint, load
from intaglio.methods.registry import PUBLISHED, get_method
from intaglio.recipe.run import carve
from intaglio.recipe.schema import Recipe, json_schema
from intaglio.trainer import CausalLM, KeyedRNG, Selector, TrainingModifier
from intaglio.trainer.dataset import all_examples
from tests.examples import EXAMPLES
from tests.families import DECODERS, tiny_checkpoint_dir, tiny_model
from tests.recipe.test_run import Killed, corpus, files, make_recipe  # noqa: F401
from tests.recipe.test_run_train import TRAIN, kill_training
from tests.trainer import toys
from tests.trainer.helpers import LABELLED, TEXTS, checkpoint, run, same, suited, weights
from tests.trainer.test_resume import Killed as TrainingKilled
from tests.trainer.test_resume import killer

TOYS: dict[str, dict[str, list[dict[str, Any]]]] = {
    "modifier": {"toy_modifier": [{"sparsity": 0.5}]},
    "selector": {"toy_selector": [{"budget": 0.2}]},
}


def cases(kind: str) -> list[tuple[str, int]]:
    slugs = [slug for slug, entry in PUBLISHED.items() if kind in entry.kinds]
    return [(slug, n) for slug in [*slugs, *TOYS[kind]] for n in range(len(TOYS[kind].get(slug) or EXAMPLES[slug]))]


MODIFIERS, SELECTORS = cases("modifier"), cases("selector")
CLASSIFYING = [slug for slug, _ in MODIFIERS if slug in PUBLISHED and get_method(slug).trains_on == "classes"]
"""Modifiers for classifiers, which train on labelled texts here."""


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    toys.register(monkeypatch)


def made(slug: str, index: int) -> Any:
    examples = {**TOYS["modifier"], **TOYS["selector"]}.get(slug) or EXAMPLES[slug]
    return get_method(slug)(**examples[index])


@pytest.mark.parametrize(("slug", "index"), [*MODIFIERS, *SELECTORS])
def test_it_is_what_its_kind_says_and_plain_data(slug: str, index: int) -> None:
    method = made(slug, index)
    assert isinstance(method, TrainingModifier if "modifier" in method.kinds else Selector)
    assert type(method).model_validate(json.loads(json.dumps(method.model_dump()))) == method


@pytest.mark.parametrize(
    ("slug", "index", "family"),
    [
        (*case, name)
        for case in MODIFIERS
        for name in DECODERS
        if name == "llama" or (case[1] == 0 and case[0] not in CLASSIFYING)
    ],
)
def test_a_modifier_saved_and_resumed_is_equal(slug: str, index: int, family: str, tmp_path: Path) -> None:
    if slug == "toy_modifier" and family in ("gpt2",):
        pytest.skip("its layers lie the other way round, and the toy does not care to know")
    arguments: dict[str, Any] = {"steps": 3, "save_every": 1, "warmup": 0, **suited(made(slug, index))}
    whole, killed, again = (checkpoint(family, layers=1) for _ in range(3))
    before = weights(whole)
    unbroken = run(whole, modifiers=[made(slug, index)], **arguments)
    with pytest.raises(TrainingKilled):
        run(killed, modifiers=[made(slug, index)], directory=tmp_path, progress=killer(2), **arguments)
    resumed = run(again, modifiers=[made(slug, index)], directory=tmp_path, **arguments)
    assert resumed.history == unbroken.history
    assert same(weights(again), weights(whole))
    assert not same(weights(whole), before)
    if whole.kind == "standalone":
        plain = checkpoint(family, layers=1)
        run(plain, **{**arguments, "steps": 1})
        stock = plain.model if slug in CLASSIFYING else tiny_model(family, layers=1)
        for model in (whole.model, killed.model):
            assert [type(module) for module in model.modules()] == [type(module) for module in stock.modules()]
            assert sorted(model.state_dict()) == sorted(stock.state_dict())


@pytest.mark.parametrize(
    ("slug", "index"), [pytest.param(*case, marks=pytest.mark.slow if case[1] else ()) for case in MODIFIERS]
)
def test_a_modifier_in_a_recipe_resumes_to_the_same_bytes(
    slug: str,
    index: int,
    corpus: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    model = str(tiny_checkpoint_dir("llama", tmp_path / "model", layers=1))
    step: dict[str, Any] = {**TRAIN, "modifiers": [{slug: made(slug, index).model_dump()}]}
    if slug in CLASSIFYING:
        file = tmp_path / "labelled.jsonl"
        file.write_text("\n".join(map(json.dumps, LABELLED)))
        wanted = Recipe.from_dict({"steps": [{"train": {**step, "classes": str(file)}}]})
    else:
        wanted = make_recipe(corpus, [{"train": step}])
    assert Recipe.from_dict(wanted.dump()) == wanted
    carve(wanted, tmp_path / "whole", model=model)
    with pytest.raises(Killed):
        carve(wanted, tmp_path / "broken", model=model, progress=kill_training(4))
    carve(wanted, tmp_path / "broken", model=model, resume=True)
    assert files(tmp_path / "broken") == files(tmp_path / "whole")
    assert load(tmp_path / "whole").record.steps[0].parameters["modifiers"] == [{slug: made(slug, index).model_dump()}]


def chosen(slug: str, index: int, seed: int, original: Checkpoint | None = None) -> list[Any]:
    method, ckpt = made(slug, index), checkpoint()
    before = weights(ckpt)
    examples = all_examples(ckpt, TEXTS)
    assert examples is not None
    found = list(method.select(examples, ckpt, original, method.budget, KeyedRNG(seed)))
    assert same(weights(ckpt), before)
    return found


@pytest.mark.parametrize(("slug", "index"), SELECTORS)
def test_a_selector_chooses_the_same_again_and_keeps_to_its_budget(slug: str, index: int) -> None:
    found = chosen(slug, index, 0, checkpoint(seed=1))
    assert found == chosen(slug, index, 0, checkpoint(seed=1))
    assert found
    if all(isinstance(value, int) for value in found):
        assert len(set(found)) == len(found) <= max(1, round(made(slug, index).budget * len(TEXTS)))
        assert set(found) <= set(range(len(TEXTS)))
    else:
        assert len(found) == len(TEXTS)


@pytest.mark.parametrize(("slug", "index"), SELECTORS)
def test_a_selector_in_a_recipe_sees_the_original_model_if_it_compares(
    slug: str,
    index: int,
    corpus: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_checkpoint_dir("llama", tmp_path / "model", layers=1)
    seen: list[Any] = []
    plain = get_method(slug).select  # type: ignore[attr-defined]

    def select(self: Any, dataset: Any, model: Any, original: Any, budget: float, rng: Any, **more: Any) -> Any:
        before = None if original is None else weights(original)
        seen.append((before, weights(model), all("text" in example for example in dataset)))
        return plain(self, dataset, model, original, budget, rng, **more)

    monkeypatch.setattr(get_method(slug), "select", select)
    steps = [{"magnitude": {"sparsity": 0.5}}, {"train": {**TRAIN, "select": {slug: made(slug, index).model_dump()}}}]
    document = carve(make_recipe(corpus, steps), tmp_path / "out", model=str(model))
    ((before, carved, texts),) = seen
    dense = weights(load(model))
    assert same(before, dense) if getattr(made(slug, index), "compares", True) else before is None
    assert not same(dense, carved)
    assert texts
    assert document["steps"][1]["chosen"]["steps"] == TRAIN["steps"]


def test_the_schema_and_python_know_them() -> None:
    schema = json_schema()
    (train,) = [
        c["properties"]["train"] for c in schema["properties"]["steps"]["items"]["oneOf"] if "train" in c["properties"]
    ]
    slugs = [choice["required"][0] for choice in train["properties"]["modifiers"]["items"]["oneOf"]]
    assert "toy_modifier" in slugs
    assert "toy_selector" in [choice["required"][0] for choice in train["properties"]["select"]["oneOf"]]
    ckpt = checkpoint()
    run(ckpt, objective=CausalLM(length=24), modifiers=[toys.ToyModifier()], select=toys.ToySelector(), steps=2)
    assert ckpt.record.steps[0].parameters["select"] == {"toy_selector": {"budget": 0.25}}
