"""What is said of a method is what its class says."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

import intaglio
from intaglio.methods import describe
from intaglio.methods.registry import PUBLISHED, get_method

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
    found = describe.describe(DOCSTRING)
    assert found.prose == "What it is.\n\nMore of it: `x <= 1`."
    assert found.lists["Args"] == {"first": "one line.", "second": "begins here and ends here: twice."}
    assert found.lists["Raises"] == {"IntaglioError": "(in `apply`) always."}
    assert "Warns" not in found.lists
    assert found.source == "Source: somebody, somewhere, 2024."


@pytest.mark.parametrize("slug", PUBLISHED)
def test_every_parameter_has_its_row(slug: str) -> None:
    rows = describe.parameters(get_method(slug), {})
    fields = get_method(slug).model_fields
    assert [row.name for row in rows] == sorted(fields, key=lambda name: bool(fields[name].exclude))
    for row in rows:
        assert row.description, row.name
        assert row.type, row.name
        assert row.default, row.name


def test_rows_of_dsnot() -> None:
    rows = {
        row.name: row
        for row in describe.parameters(
            get_method("dsnot"), describe.paper_values(get_method("dsnot"), {"sparsity": 0.5})
        )
    }
    assert rows["base"].type == "`wanda`, `magnitude` or `sparsegpt`"
    assert (rows["base"].default, rows["base"].paper) == ("wanda", "")
    assert rows["sparsity"].type == "number, at least 0, below 1, or none"
    assert (rows["max_cycles"].default, rows["max_cycles"].paper) == ("none", "50")
    assert rows["max_cycles"].description.startswith("most swaps per row; None (default) scales")
    assert rows["dampening"].type == "number, above 0, at most 1"
    paper = intaglio.DSnoT.paper(sparsity=0.5)
    changed = {name: row.paper for name, row in rows.items() if row.paper}
    assert {name: yaml.safe_load(value) for name, value in changed.items()} == {
        name: getattr(paper, name)
        for name in intaglio.DSnoT.model_fields
        if getattr(paper, name) != getattr(intaglio.DSnoT(sparsity=0.5), name)
    }


def test_a_method_without_constants_of_its_paper_has_no_such_column() -> None:
    assert describe.paper_values(get_method("wanda"), {"sparsity": 0.5}) == {}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "integer", "minimum": 1}, "whole number, at least 1"),
        ({"type": "integer", "minimum": 1000, "exclusiveMaximum": 2**63}, "whole number, at least 1,000, below 2^63"),
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
    assert describe.describe_type(schema, {"a": {"type": "number", "exclusiveMaximum": 3}}) == words


@pytest.mark.parametrize(("value", "text"), [(None, "none"), (0.5, "0.5"), (True, "true"), ([], "[]"), ("all", "all")])
def test_values_as_in_a_recipe(value: object, text: str) -> None:
    assert describe.to_yaml(value) == text
