"""What a method's class says: its parameters, its description, and how it is used."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from generate.text import ROOT
from intaglio.catalogue import ENTRIES
from intaglio.errors import IntaglioError
from intaglio.method import Method, get
from intaglio.recipe import Recipe

RECIPES = ROOT / "recipes"
_HEADINGS = ("Args", "Raises", "Warns")


@dataclass(frozen=True)
class Description:
    """A docstring in parts.

    Args:
        prose: what stands before and after the lists, as Markdown; the source left out.
        lists: `{heading: {name: text}}`, for Args, Raises and Warns.
    """

    prose: str
    lists: Mapping[str, Mapping[str, str]]


def describe(docstring: str) -> Description:
    """Take a docstring of the house's style apart.

    Args:
        docstring: dedented, as `inspect.getdoc` gives it.
    """
    prose: list[str] = []
    lists: dict[str, dict[str, str]] = {}
    for paragraph in re.split(r"\n\s*\n", docstring):
        first, _, rest = paragraph.partition("\n")
        heading = first.removesuffix(":")
        if heading in _HEADINGS and first.endswith(":"):
            lists[heading] = _items(rest)
        elif not first.startswith("Source:"):
            prose.append(paragraph)
    return Description("\n\n".join(prose), lists)


def _items(block: str) -> dict[str, str]:
    """`    name: text` with continuation lines further in."""
    found: dict[str, str] = {}
    for line in block.split("\n"):
        if item := re.fullmatch(r" {4}(\w+): (.*)", line):
            found[item[1]] = item[2]
        else:
            name = next(reversed(found))
            found[name] = f"{found[name]} {line.strip()}"
    return found


@dataclass(frozen=True)
class Parameter:
    """A row of a method's table.

    Args:
        name: of the field.
        type: what is accepted, in words; values as code.
        default: as written in YAML; "required" where there is none.
        paper: the paper's value where `Method.paper` gives another one, else "".
        description: from the docstring, or else from the field.
    """

    name: str
    type: str
    default: str
    paper: str
    description: str


def needed(method: type[Method]) -> dict[str, Any]:
    """The fields that have no default, each with its name in capitals in the place of a value.

    Args:
        method: its class; it takes any text there.
    """
    return {name: name.upper() for name, field in method.model_fields.items() if field.is_required()}


def paper_values(method: type[Method], given: Mapping[str, Any]) -> dict[str, Any]:
    """The paper's values of the fields in which `Method.paper` differs from the defaults.

    Args:
        method: its class.
        given: fields that a user has to set.
    """
    if method.paper.__func__ is Method.paper.__func__:  # type: ignore[attr-defined]
        return {}
    paper = method.paper(**given)
    return {
        name: getattr(paper, name)
        for name, field in method.model_fields.items()
        if name not in given and getattr(paper, name) != field.get_default(call_default_factory=True)
    }


def parameters(method: type[Method], paper: Mapping[str, Any]) -> list[Parameter]:
    """The fields of a method.

    Args:
        method: its class.
        paper: from `paper_values`.
    """
    schema = method.model_json_schema()
    properties, definitions = schema.get("properties", {}), schema.get("$defs", {})
    said = describe(inspect.getdoc(method) or "").lists.get("Args", {})
    rows = []
    for name, field in method.model_fields.items():
        of_field = properties.get(name)
        default = "required" if field.is_required() else written(field.get_default(call_default_factory=True))
        rows.append(
            Parameter(
                name=name,
                # What no recipe can hold has no schema.
                type="an object of Python" if of_field is None else accepted(of_field, definitions),
                default=default,
                paper=written(paper[name]) if name in paper else "",
                description=said.get(name) or _described(of_field or {}),
            )
        )
    return rows


def _described(schema: Mapping[str, Any]) -> str:
    choices = [schema, *schema.get("anyOf", ())]
    return next((choice["description"] for choice in choices if "description" in choice), "")


def written(value: Any) -> str:
    """A value as one writes it in a recipe.

    Args:
        value: of a field.
    """
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
    return "none" if value is None else text


_TYPES = {"number": "number", "integer": "whole number", "string": "text", "boolean": "true or false", "null": "none"}
_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def accepted(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """What a field takes, in words, from its JSON Schema.

    Args:
        schema: of the field.
        definitions: the `$defs` it may refer to.
    """
    if "$ref" in schema:
        return accepted(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in schema:
        return ", or ".join(accepted(choice, definitions) for choice in schema["anyOf"])
    if "enum" in schema:
        *most, last = [f"`{value}`" for value in schema["enum"]]
        return f"{', '.join(most)} or {last}" if most else last
    if "const" in schema:
        return f"`{schema['const']}`"
    if isinstance(schema.get("type"), list):
        return ", or ".join(accepted({**schema, "type": kind}, definitions) for kind in schema["type"])
    if schema.get("type", "anything") not in (*_TYPES, "array", "object"):
        return "anything"
    if schema.get("type") == "array":
        inner = schema.get("items")
        return f"list of: {accepted(inner, definitions)}" if inner else "list"
    if schema.get("type") == "object":
        return "mapping"
    bounds = [f"{word} {schema[key]:g}" for key, word in _BOUNDS.items() if key in schema]
    return ", ".join([_TYPES[schema["type"]], *bounds])


def example(slug: str) -> dict[str, Any] | None:
    """A short recipe with the method in it, as plain data: a shipped one, or else one that its fields accept.

    Args:
        slug: of the method.

    Returns:
        None where the method is no step of a recipe.

    Raises:
        ValueError: no recipe is shipped for it, and neither its defaults nor half of the weights are accepted.
    """
    entry = ENTRIES[slug]
    if not (entry.fitted or "carving" in entry.kinds):
        return None
    for path in sorted(RECIPES.glob("*.yaml")):
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        if [used(step) for step in document["steps"]] == [slug]:
            return dict(document)
    for fields in ({}, {"sparsity": 0.5}):
        step = {"fit": {slug: fields}} if entry.fitted else {slug: fields}
        document = {"model": "smollm2", "steps": [step]}
        try:
            Recipe.of(document)
        except IntaglioError:
            continue
        return document
    raise ValueError(f"the card of {slug} has no recipe to show: ship one in recipes/")


def used(step: Any) -> str:
    """The method that a step names, also one that it fits.

    Args:
        step: of a recipe, as plain data.
    """
    if isinstance(step, str):
        return step
    verb, value = next(iter(step.items()))
    return used(value) if verb == "fit" else str(verb)


def given(document: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a recipe of one step sets.

    Args:
        document: from `example`.
    """
    (step,) = document["steps"]
    fields = {} if isinstance(step, str) else next(iter(step.values()))
    if isinstance(step, dict) and "fit" in step:
        fields = {} if isinstance(fields, str) else next(iter(fields.values()))
    return dict(fields or {})


def as_yaml(document: Mapping[str, Any]) -> str:
    """A recipe as a user would write it: one line a step.

    Args:
        document: plain data.
    """
    lines = [f"{key}: {_flow(value)}" for key, value in document.items() if key != "steps"]
    steps = [
        f"  - {step}" if isinstance(step, str) else "".join(f"  - {name}: {_flow(rest)}" for name, rest in step.items())
        for step in document["steps"]
    ]
    return "\n".join([*lines, "steps:", *steps])


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
    return text.removesuffix("\n...\n").strip()


def call(slug: str, fields: Mapping[str, Any]) -> str:
    """The method's construction in Python.

    Args:
        slug: of the method.
        fields: that differ from the defaults.
    """
    defaults = get(slug).model_fields
    given = [f"{name}={value!r}" for name, value in fields.items() if value != defaults[name].default]
    return f"intaglio.{ENTRIES[slug].name}({', '.join(given)})".replace("'", '"')
