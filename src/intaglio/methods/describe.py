"""A method's description, from its class: the docstring in parts, and a table of its parameters."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic_core import to_jsonable_python

from intaglio.methods.base import Method

_HEADINGS = ("Args", "Raises", "Warns")


@dataclass(frozen=True)
class Description:
    """A docstring in parts.

    Args:
        prose: the paragraphs before and after the lists, as Markdown, without the source.
        lists: `{heading: {name: text}}`, for Args, Raises and Warns.
        source: the paragraph that begins with "Source:", in one line; empty if there is none.
    """

    prose: str
    lists: Mapping[str, Mapping[str, str]]
    source: str = ""


def describe(docstring: str) -> Description:
    """Split a docstring, dedented as by `inspect.getdoc`, into its parts."""
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
    """Parse lines `    name: text`, whose continuation lines are indented further."""
    items: dict[str, str] = {}
    for line in block.split("\n"):
        if item := re.fullmatch(r" {4}(\w+): (.*)", line):
            items[item[1]] = item[2]
        else:
            name = next(reversed(items))
            items[name] = f"{items[name]} {line.strip()}"
    return items


@dataclass(frozen=True)
class Parameter:
    """A row of a method's table of parameters.

    Args:
        name: of the field.
        type: accepted values in words; literal values as code.
        default: as YAML; "required" if there is none.
        paper: the paper's value where `Method.paper` differs from the default, else "".
        description: from the docstring, or else from the field.
    """

    name: str
    type: str
    default: str
    paper: str
    description: str


def required_fields(method: type[Method]) -> dict[str, Any]:
    """Return the fields without a default, each with its name in capitals as a placeholder."""
    return {name: name.upper() for name, field in method.model_fields.items() if field.is_required()}


def paper_values(method: type[Method], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields in which `Method.paper(**given)` differs from the defaults, without those in `given`."""
    if method.paper.__func__ is Method.paper.__func__:  # type: ignore[attr-defined]
        return {}
    paper = method.paper(**given)
    return {
        name: getattr(paper, name)
        for name, field in method.model_fields.items()
        if name not in given and getattr(paper, name) != field.get_default(call_default_factory=True)
    }


def parameters(method: type[Method], paper: Mapping[str, Any]) -> list[Parameter]:
    """Return the rows of a method's fields, those that take Python objects last.

    Args:
        method: its class.
        paper: from `paper_values`.
    """
    schema = method.model_json_schema()
    properties, definitions = schema.get("properties", {}), schema.get("$defs", {})
    documented: dict[str, str] = {}
    for base in reversed(method.__mro__):  # a base describes the fields it shares
        documented |= describe(inspect.cleandoc(base.__doc__ or "")).lists.get("Args", {})
    rows = []
    for name, field in sorted(method.model_fields.items(), key=lambda item: bool(item[1].exclude)):
        field_schema = properties.get(name)
        default = "required" if field.is_required() else to_yaml(field.get_default(call_default_factory=True))
        rows.append(
            Parameter(
                name=name,
                # A field that a recipe cannot hold has no schema.
                type="a Python object" if field_schema is None else describe_type(field_schema, definitions),
                default=default,
                paper=to_yaml(paper[name]) if name in paper else "",
                description=documented.get(name) or field.description or _field_description(field_schema or {}),
            )
        )
    return rows


def _field_description(schema: Mapping[str, Any]) -> str:
    choices = [schema, *schema.get("anyOf", ())]
    return next((choice["description"] for choice in choices if "description" in choice), "")


def to_yaml(value: Any) -> str:
    """Return the value of a field as a recipe has it."""
    plain = to_jsonable_python(value, exclude_none=True)
    text = yaml.safe_dump(plain, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
    return "none" if value is None else text


_TYPES = {"number": "number", "integer": "whole number", "string": "text", "boolean": "true or false", "null": "none"}
_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def describe_type(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """Return the accepted values of a field in words.

    Args:
        schema: JSON Schema of the field.
        definitions: the `$defs` it may refer to.
    """
    if "$ref" in schema:
        return describe_type(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in schema:
        return ", or ".join(describe_type(choice, definitions) for choice in schema["anyOf"])
    if "enum" in schema:
        *most, last = [f"`{value}`" for value in schema["enum"]]
        return f"{', '.join(most)} or {last}" if most else last
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = schema.get("type")
    if isinstance(kind, list):
        return ", or ".join(describe_type({**schema, "type": one}, definitions) for one in kind)
    if kind == "array":
        inner = schema.get("items")
        return f"list of: {describe_type(inner, definitions)}" if inner else "list"
    if kind == "object":
        return "mapping"
    if kind not in _TYPES:
        return "anything"
    bounds = [f"{word} {_bound(schema[key])}" for key, word in _BOUNDS.items() if key in schema]
    return ", ".join([_TYPES[kind], *bounds])


def _bound(value: float) -> str:
    """Return a bound without an exponent where it is a whole number: `1,000,000`, and 2^63 by its name."""
    return "2^63" if value == 2**63 else f"{value:,.0f}" if value == int(value) else f"{value:g}"
