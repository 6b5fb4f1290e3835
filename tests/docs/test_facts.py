"""The recipe and the constructor call on a method's page are valid, and the recipe is a shipped one."""

from __future__ import annotations

import ast
from typing import Any

import pytest
import yaml
from generate import facts

from intaglio.methods.registry import PUBLISHED, get_method
from intaglio.recipe.schema import Fit, Recipe

EXAMPLES = {slug: example for slug in PUBLISHED if (example := facts.example(slug))}


@pytest.mark.parametrize("slug", EXAMPLES)
def test_the_example_is_a_valid_shipped_recipe_that_uses_the_method(slug: str) -> None:
    example = EXAMPLES[slug]
    assert (facts.RECIPES / example.name).read_text(encoding="utf-8") == example.text
    recipe = Recipe.from_dict(yaml.safe_load(example.text))
    fields = facts.fields_of(example.document, slug)
    assert fields is not None
    method = get_method(slug)(**fields)
    if facts.is_last_step(example.document, slug):
        assert recipe.steps[-1] == method
    if method.fitted and "objective" not in PUBLISHED[slug].kinds:
        assert isinstance(recipe.steps[-1], Fit)
        assert recipe.steps[-1].method == method


@pytest.mark.parametrize("slug", EXAMPLES)
def test_the_call_is_the_method_of_the_recipe(slug: str) -> None:
    fields = facts.fields_of(EXAMPLES[slug].document, slug)
    assert fields is not None
    text = facts.call(slug, fields)
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call)
    assert text.startswith(f"intaglio.{PUBLISHED[slug].name}(")
    arguments = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
    assert get_method(slug)(**arguments) == get_method(slug)(**fields)


def test_lost_is_shown_before_training_and_not_on_a_trained_model() -> None:
    document = EXAMPLES["lost"].document
    assert "new" in document
    assert list(facts.methods_in(document["steps"][0])) == ["lost"]
    assert "train" in document["steps"][1]


def test_the_shortest_recipe_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    recipes = {
        "a": "steps: [wanda, {train: {steps: 1}}]",
        "b": "steps: [{wanda: {sparsity: 0.5, ignore: [lm_head]}}]",
        "c": "steps: [{wanda: {sparsity: 0.6}}]",
        "d": "steps: [magnitude]",
    }
    for name, text in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    monkeypatch.setattr(facts, "RECIPES", tmp_path)
    example = facts.example("wanda")
    assert example is not None
    assert example.name == "c.yaml"
    assert facts.example("dyspec") is None


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("wanda", {"wanda": {}}),
        ({"wanda": None}, {"wanda": {}}),
        ({"wanda": {"sparsity": 0.5}}, {"wanda": {"sparsity": 0.5}}),
        ({"fit": {"aded": {"top": 3}}}, {"aded": {"top": 3}}),
        ({"fit": "aded"}, {"aded": {}}),
        (
            {"train": {"objective": {"meap": {"length": 16}}, "modifiers": [{"bip": None}], "steps": 3}},
            {"meap": {"length": 16}, "bip": {}},
        ),
        ({"train": {"objective": "meap", "select": {"random": {}}}}, {"meap": {}, "random": {}}),
        ({"train": {"steps": 3}}, {}),
    ],
)
def test_the_methods_of_a_step(step: Any, expected: dict[str, dict[str, Any]]) -> None:
    assert facts.methods_in(step) == expected
    for slug, fields in expected.items():
        assert facts.fields_of({"steps": ["sparsegpt", step, "magnitude"]}, slug) == fields


def test_only_a_step_of_its_own_is_a_last_step() -> None:
    assert facts.is_last_step({"steps": ["wanda"]}, "wanda")
    assert facts.is_last_step({"steps": [{"wanda": {}}]}, "wanda")
    assert not facts.is_last_step({"steps": [{"wanda": {}}, {"train": {}}]}, "wanda")
    assert not facts.is_last_step({"steps": [{"fit": {"aded": {}}}]}, "aded")
