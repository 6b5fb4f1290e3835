"""What a card says of a method is what its class says."""

from __future__ import annotations

import ast
from typing import Any

import pytest
import yaml
from generate import facts

import intaglio
from intaglio.catalogue import ENTRIES
from intaglio.method import get
from intaglio.recipe import Fit, Recipe

CARVINGS = [slug for slug, entry in ENTRIES.items() if "carving" in entry.kinds]
DOCSTRING = """What it is.

More of it: `x <= 1`.

Args:
    first: one line.
    second: begins here
        and ends here: twice.

Raises:
    IntaglioError: (in `apply`) always.

Source: somebody, somewhere,
2024.
"""


def test_a_docstring_in_parts() -> None:
    found = facts.describe(DOCSTRING)
    assert found.prose == "What it is.\n\nMore of it: `x <= 1`."
    assert found.lists["Args"] == {"first": "one line.", "second": "begins here and ends here: twice."}
    assert found.lists["Raises"] == {"IntaglioError": "(in `apply`) always."}
    assert "Warns" not in found.lists


@pytest.mark.parametrize("slug", ENTRIES)
def test_every_parameter_has_its_row(slug: str) -> None:
    rows = facts.parameters(get(slug), {})
    assert [row.name for row in rows] == list(get(slug).model_fields)
    for row in rows:
        assert row.description, row.name
        assert row.type, row.name
        assert row.default, row.name


def test_rows_of_dsnot() -> None:
    rows = {
        row.name: row for row in facts.parameters(get("dsnot"), facts.paper_values(get("dsnot"), {"sparsity": 0.5}))
    }
    assert rows["base"].type == "`wanda`, `magnitude` or `sparsegpt`"
    assert (rows["base"].default, rows["base"].paper) == ("wanda", "")
    assert rows["sparsity"].type == "number, at least 0, below 1, or none"
    assert (rows["max_cycles"].default, rows["max_cycles"].paper) == ("none", "50")
    assert rows["max_cycles"].description.startswith("swaps a row at the most; None (default) scales")
    assert rows["dampening"].type == "number, above 0, at most 1"
    paper = intaglio.DSnoT.paper(sparsity=0.5)
    changed = {name: row.paper for name, row in rows.items() if row.paper}
    assert {name: yaml.safe_load(value) for name, value in changed.items()} == {
        name: getattr(paper, name)
        for name in intaglio.DSnoT.model_fields
        if getattr(paper, name) != getattr(intaglio.DSnoT(sparsity=0.5), name)
    }


def test_a_method_without_constants_of_its_paper_has_no_such_column() -> None:
    assert facts.paper_values(get("wanda"), {"sparsity": 0.5}) == {}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "integer", "minimum": 1}, "whole number, at least 1"),
        ({"anyOf": [{"type": "boolean"}, {"type": "null"}]}, "true or false, or none"),
        ({"const": "x"}, "`x`"),
        ({"enum": ["x"]}, "`x`"),
        ({"type": "array", "items": {"type": "string"}}, "list of: text"),
        ({"type": "object"}, "mapping"),
        ({"type": ["string", "integer"]}, "text, or whole number"),
        ({}, "anything"),
        ({"$ref": "#/$defs/a"}, "number, below 3"),
    ],
)
def test_types_in_words(schema: dict[str, Any], words: str) -> None:
    assert facts.accepted(schema, {"a": {"type": "number", "exclusiveMaximum": 3}}) == words


@pytest.mark.parametrize(("value", "text"), [(None, "none"), (0.5, "0.5"), (True, "true"), ([], "[]"), ("all", "all")])
def test_values_as_in_a_recipe(value: object, text: str) -> None:
    assert facts.written(value) == text


@pytest.mark.parametrize("slug", CARVINGS)
def test_the_recipe_on_a_card_is_a_recipe_and_the_call_is_its_step(slug: str) -> None:
    document = facts.example(slug)
    assert document is not None
    (step,) = Recipe.of(yaml.safe_load(facts.as_yaml(document))).steps
    assert step.slug == slug
    text = facts.call(slug, facts.given(document))
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call)
    arguments = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
    assert text.startswith(f"intaglio.{ENTRIES[slug].name}(")
    assert get(slug)(**arguments) == step


def test_a_method_that_is_no_step_has_no_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ENTRIES["wanda"]
    other = type(entry)(**{**vars(entry), "kinds": ("decoder",), "fitted": False})
    monkeypatch.setitem(ENTRIES, "wanda", other)
    assert facts.example("wanda") is None


@pytest.mark.parametrize("slug", [slug for slug, entry in ENTRIES.items() if entry.fitted])
def test_a_fitted_method_is_shown_as_a_fit(slug: str) -> None:
    document = facts.example(slug)
    assert document is not None
    (step,) = Recipe.of(yaml.safe_load(facts.as_yaml(document))).steps
    assert isinstance(step, Fit)
    assert step.method == get(slug)(**facts.given(document))


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
    assert facts.given({"steps": [step]}) == fields
