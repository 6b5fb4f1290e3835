"""The registry: every method's entry, read from a generated table, and its class, imported on demand.

`method_table.json` is generated from the class attributes of the methods by `make catalogue`; a test checks that it is
current. So `intaglio list` and the names in `import intaglio` need neither torch nor the methods.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from intaglio.errors import IntaglioError, did_you_mean
from intaglio.methods.base import Kind, Method, TrainingData

TABLE = Path(__file__).with_name("method_table.json")

AREAS: dict[str, str] = {
    "weights": "which parameters stay",
    "activations": "which units fire",
    "training": "which examples and gradients count",
    "objectives": "which tokens are hidden and predicted",
    "decoding": "which next tokens are allowed, and how many model passes they cost",
    "attention": "which positions see which",
    "retrieval": "text encoders and retrieval components",
    "probes": "reading a model: evaluations and diagnostics",
}
"""Packages of methods; a method of slug `s` is the module or package `s` in its area."""


def area_package(area: str) -> str:
    """Return the package of an area."""
    return f"intaglio.methods.{area}"


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Args:
        slug: name in recipes and on the command line.
        area: package that holds the method: a key of `AREAS`, or the package of shared machinery.
        name: name of the class.
        module: module that defines the class.
        kinds: protocols it implements.
        summary: what it does, in one clause.
        citation: authors, title, venue and year; empty for shared machinery.
        url: of the paper.
        fitted: whether a `fit` step builds or trains what it owns.
    """

    slug: str
    area: str
    name: str
    module: str
    kinds: tuple[Kind, ...]
    summary: str
    citation: str = ""
    url: str = ""
    fitted: bool = False


METHODS: dict[str, Entry] = {
    row["slug"]: Entry(**{**row, "kinds": tuple(row["kinds"])}) for row in json.loads(TABLE.read_text(encoding="utf-8"))
}
"""Everything that a recipe can name: published methods in the order of their slugs, then shared machinery."""

PUBLISHED: dict[str, Entry] = {slug: entry for slug, entry in METHODS.items() if entry.citation}
"""The methods with a paper: the catalogue."""


def list_methods(kind: Kind) -> list[str]:
    """Return the slugs of all methods of a kind, shared machinery last."""
    return [slug for slug, entry in METHODS.items() if kind in entry.kinds]


def list_fitted() -> list[str]:
    """Return the slugs of all methods that a `fit` step can name."""
    return [slug for slug, entry in METHODS.items() if entry.fitted]


def get_method(slug: str) -> type[Method]:
    """Import and return the class of a method.

    Raises:
        IntaglioError: no method has that slug.
    """
    if slug not in METHODS:
        raise IntaglioError(f"there is no method named {slug!r}; {did_you_mean(slug, PUBLISHED)}")
    entry = METHODS[slug]
    method: type[Method] = getattr(import_module(entry.module), entry.name)
    return method


def list_objectives(trains_on: TrainingData) -> list[str]:
    """Return the slugs of all objectives that are trained on a kind of data."""
    return [slug for slug in list_methods("objective") if get_method(slug).trains_on == trains_on]


def vocabulary_config_keys() -> frozenset[str]:
    """Return the config keys in which any method keeps token ids."""
    return frozenset().union(*(get_method(slug).vocabulary_config_keys for slug in METHODS))
