"""Examples on a method's page: a shipped recipe and the constructor call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from generate.text import ROOT
from intaglio.methods.registry import PUBLISHED, get_method

RECIPES = ROOT / "recipes"


@dataclass(frozen=True)
class Example:
    """A recipe file: its name, its text, and the same parsed."""

    name: str
    text: str
    document: Mapping[str, Any]


def example(slug: str) -> Example | None:
    """Return the shipped recipe with the fewest steps that uses a method (of equals the shorter file), or None."""
    shipped = [(path.name, path.read_text(encoding="utf-8")) for path in sorted(RECIPES.glob("*.yaml"))]
    recipes = [Example(name, text, yaml.safe_load(text)) for name, text in shipped]
    using = [recipe for recipe in recipes if fields_of(recipe.document, slug) is not None]
    return min(using, key=lambda recipe: (len(recipe.document["steps"]), len(recipe.text)), default=None)


def methods_in(step: Any) -> dict[str, dict[str, Any]]:
    """Return the methods of a recipe step with their fields; for `fit` and `train` those named inside it."""
    if isinstance(step, str):
        return {step: {}}
    name, fields = next(iter(step.items()))
    if name == "fit":
        return methods_in(fields)
    if name != "train":
        return {name: dict(fields or {})}
    inside = [fields.get("objective"), fields.get("select"), *fields.get("modifiers", ())]
    return {slug: own for part in inside if part for slug, own in methods_in(part).items()}


def fields_of(document: Mapping[str, Any], slug: str) -> dict[str, Any] | None:
    """Return the fields that a recipe sets for a method where it names it last; None if it does not use it."""
    return next((found[slug] for step in reversed(document["steps"]) if slug in (found := methods_in(step))), None)


def is_last_step(document: Mapping[str, Any], slug: str) -> bool:
    """Return whether a recipe ends with the method as a step of its own."""
    last = document["steps"][-1]
    return last == slug or (isinstance(last, dict) and slug in last)


def call(slug: str, fields: Mapping[str, Any]) -> str:
    """Return the constructor call of a method, default values left out."""
    defaults = get_method(slug).model_fields
    given = [f"{name}={value!r}" for name, value in fields.items() if value != defaults[name].default]
    return f"intaglio.{PUBLISHED[slug].name}({', '.join(given)})".replace("'", '"')
