"""What a method's class says of itself: its docstring in parts, and its parameters with types and defaults."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from intaglio.methods.base import Method

_HEADINGS = ("Args", "Raises", "Warns")


@dataclass(frozen=True)
class Description:
    """A docstring in parts.

    Args:
        prose: what stands before and after the lists, as Markdown; the source left out.
        lists: `{heading: {name: text}}`, for Args, Raises and Warns.
        source: the paragraph that begins with "Source:", in one line; empty where there is none.
    """

    prose: str
    lists: Mapping[str, Mapping[str, str]]
    source: str = ""


def describe(docstring: str) -> Description:
    """Take a docstring of the house's style apart.

    Args:
        docstring: dedented, as `inspect.getdoc` gives it.
    """
    prose: list[str] = []
    source = ""
    lists: dict[str, dict[str, str]] = {}
    for paragraph in re.split(r"\n\s*\n", docstring):
        first, _, rest = paragraph.partition("\n")
        heading = first.removesuffix(":")
        if heading in _HEADINGS and first.endswith(":"):
            lists[heading] = _items(rest)
        elif first.startswith("Source:"):
            source = " ".join(paragraph.split())
        else:
            prose.append(paragraph)
    return Description("\n\n".join(prose), lists, source)


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
    """The fields of a method, those that only Python can set last.

    Args:
        method: its class.
        paper: from `paper_values`.
    """
    schema = method.model_json_schema()
    properties, definitions = schema.get("properties", {}), schema.get("$defs", {})
    said = describe(inspect.getdoc(method) or "").lists.get("Args", {})
    rows = []
    for name, field in sorted(method.model_fields.items(), key=lambda item: bool(item[1].exclude)):
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
