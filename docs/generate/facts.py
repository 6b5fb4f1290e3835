"""How a method is used: a short recipe, and its construction in Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from intaglio.methods.registry import PUBLISHED, get_method

from generate.text import ROOT
from intaglio.errors import IntaglioError
from intaglio.recipe.schema import Recipe

RECIPES = ROOT / "recipes"
WIDTH = 80
"""Characters of a line that a page shows without scrolling."""


def example(slug: str) -> dict[str, Any] | None:
    """A short recipe with the method in it, as plain data: a shipped one, or else one that its fields accept.

    Args:
        slug: of the method.

    Returns:
        None where the method is no step of a recipe, nor part of one in a recipe that is shipped.

    Raises:
        ValueError: no recipe is shipped for it, and neither its defaults nor half of the weights are accepted.
    """
    entry = PUBLISHED[slug]
    shipped = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(RECIPES.glob("*.yaml"))]
    if PARTS & set(entry.kinds):
        # What it is mostly for: a part of training, shown where it is the last step.
        for document in sorted(shipped, key=lambda document: len(document["steps"])):
            if slug in parts(document["steps"][-1]):
                return dict(document)
    if not (entry.fitted or "carving" in entry.kinds):
        return None
    for document in shipped:
        if [used(step) for step in document["steps"]] == [slug]:
            return dict(document)
    for fields in ({}, {"sparsity": 0.5}):
        step = {"fit": {slug: fields}} if entry.fitted else {slug: fields}
        document = {"model": "smollm2", "steps": [step]}
        try:
            Recipe.from_dict(document)
        except IntaglioError:
            continue
        return document
    raise ValueError(f"the card of {slug} has no recipe to show: ship one in recipes/")


PARTS = {"objective", "modifier", "selector"}
"""Kinds that stand inside a `train` step."""


def used(step: Any) -> str:
    """The method that a step names, also one that it fits.

    Args:
        step: of a recipe, as plain data.
    """
    if isinstance(step, str):
        return step
    verb, value = next(iter(step.items()))
    return used(value) if verb == "fit" else str(verb)


def parts(step: Any) -> dict[str, dict[str, Any]]:
    """The methods inside a `train` step, with their fields.

    Args:
        step: of a recipe, as plain data.
    """
    if not isinstance(step, dict) or "train" not in step:
        return {}
    fields = step["train"]
    named = [fields.get("objective"), fields.get("select"), *fields.get("modifiers", fields.get("shape", ()))]
    return {slug: dict(own or {}) for one in named if isinstance(one, dict) for slug, own in one.items()}


def given(document: Mapping[str, Any], slug: str) -> dict[str, Any]:
    """The fields that a recipe sets for a method, in its last step.

    Args:
        document: from `example`.
        slug: of the method.
    """
    step = document["steps"][-1]
    if slug in (inside := parts(step)):
        return inside[slug]
    fields = {} if isinstance(step, str) else next(iter(step.values()))
    if isinstance(step, dict) and "fit" in step:
        fields = {} if isinstance(fields, str) else next(iter(fields.values()))
    return dict(fields or {})


def as_yaml(document: Mapping[str, Any]) -> str:
    """A recipe as a user would write it: one line a step, or one a field where that would be long.

    Args:
        document: plain data.
    """
    lines = [f"{key}: {_flow(value)}" for key, value in document.items() if key != "steps"]
    steps = [
        f"  - {step}" if isinstance(step, str) else "".join(_step(name, rest) for name, rest in step.items())
        for step in document["steps"]
    ]
    return "\n".join([*lines, "steps:", *steps])


def _step(name: str, fields: Any) -> str:
    line = f"  - {name}: {_flow(fields)}"
    if len(line) <= WIDTH or not isinstance(fields, Mapping):
        return line
    return "\n".join([f"  - {name}:", *(f"      {key}: {_flow(value)}" for key, value in fields.items())])


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
    return text.removesuffix("\n...\n").strip()


def call(slug: str, fields: Mapping[str, Any]) -> str:
    """The method's construction in Python.

    Args:
        slug: of the method.
        fields: that differ from the defaults.
    """
    defaults = get_method(slug).model_fields
    given = [f"{name}={value!r}" for name, value in fields.items() if value != defaults[name].default]
    return f"intaglio.{PUBLISHED[slug].name}({', '.join(given)})".replace("'", '"')
