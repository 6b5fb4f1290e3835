"""The recipe and the call on a card are ones that a user can run."""

from __future__ import annotations

import ast
from typing import Any

import pytest
import yaml
from generate import facts
from intaglio.methods.registry import PUBLISHED, get_method

from intaglio.recipe.schema import Fit, Recipe

PARTS = [slug for slug, entry in PUBLISHED.items() if facts.PARTS & set(entry.kinds)]
CARVINGS = [slug for slug, entry in PUBLISHED.items() if "carving" in entry.kinds and slug not in PARTS]


@pytest.mark.parametrize("slug", PARTS)
def test_what_shapes_training_is_shown_in_a_train_step(slug: str) -> None:
    document = facts.example(slug)
    assert document is not None
    steps = Recipe.from_dict(yaml.safe_load(facts.as_yaml(document))).steps
    assert steps[-1].slug == "train"
    get_method(slug)(**facts.given(document, slug))


@pytest.mark.parametrize("slug", CARVINGS)
def test_the_recipe_on_a_card_is_a_recipe_and_the_call_is_its_step(slug: str) -> None:
    document = facts.example(slug)
    assert document is not None
    (step,) = Recipe.from_dict(yaml.safe_load(facts.as_yaml(document))).steps
    assert step.slug == slug
    text = facts.call(slug, facts.given(document, slug))
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call)
    arguments = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
    assert text.startswith(f"intaglio.{PUBLISHED[slug].name}(")
    assert get_method(slug)(**arguments) == step


def test_a_long_step_has_a_line_for_each_field() -> None:
    fields = {
        "modifiers": [{"bip": {"sparsity": 0.5}}],
        "length": 128,
        "steps": 40,
        "batch_size": 2,
        "learning_rate": 1e-4,
    }
    document = {"model": "smollm2", "steps": [{"wanda": {"sparsity": 0.5}}, {"train": fields}]}
    written = facts.as_yaml(document)
    assert (
        "  - wanda: {sparsity: 0.5}\n  - train:\n      modifiers: [{bip: {sparsity: 0.5}}]\n      length: 128\n"
        in written
    )
    assert yaml.safe_load(written) == document
    assert max(map(len, written.splitlines())) <= facts.WIDTH


def test_a_method_that_is_no_step_has_no_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = PUBLISHED["wanda"]
    other = type(entry)(**{**vars(entry), "kinds": ("decoder",), "fitted": False})
    monkeypatch.setitem(PUBLISHED, "wanda", other)
    assert facts.example("wanda") is None


@pytest.mark.parametrize("slug", [slug for slug, entry in PUBLISHED.items() if entry.fitted])
def test_a_fitted_method_is_shown_as_a_fit(slug: str) -> None:
    document = facts.example(slug)
    assert document is not None
    (step,) = Recipe.from_dict(yaml.safe_load(facts.as_yaml(document))).steps
    assert isinstance(step, Fit)
    assert step.method == get_method(slug)(**facts.given(document, slug))


@pytest.mark.parametrize(
    ("step", "slug", "fields"),
    [
        ("wanda", "wanda", {}),
        ({"wanda": None}, "wanda", {}),
        ({"wanda": {"sparsity": 0.5}}, "wanda", {"sparsity": 0.5}),
        ({"fit": {"aded": {"top": 3}}}, "aded", {"top": 3}),
        ({"fit": "aded"}, "aded", {}),
    ],
)
def test_what_a_step_names(step: Any, slug: str, fields: dict[str, Any]) -> None:
    assert facts.used(step) == slug
    assert facts.given({"steps": [step]}, slug) == fields


def test_what_a_train_step_names() -> None:
    step = {"train": {"objective": {"meap": {"length": 16}}, "modifiers": [{"bip": None}], "steps": 3}}
    assert facts.parts(step) == {"meap": {"length": 16}, "bip": {}}
    assert facts.given({"steps": ["wanda", step]}, "meap") == {"length": 16}
    assert facts.parts("wanda") == facts.parts({"wanda": {}}) == {}
