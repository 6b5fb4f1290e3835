"""Pages generated from the README and other repository files, from docstrings and from the catalogue."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import intaglio
from generate import cards, notes, style
from generate import evidence as shown
from generate.text import ROOT, cell, relink
from intaglio.evidence.engine import record as records
from intaglio.methods import describe
from intaglio.methods.registry import PUBLISHED
from intaglio.recipe.schema import New, RecipeHeader
from intaglio.trainer.loop import train
from intaglio.trainer.lora import Lora
from intaglio.trainer.recipe_step import Train

NOT_AT_HOME = ("Methods", "Comparison with llm-compressor", "Repository layout", "Contributing")
"""Sections of the README that are pages of their own on the site."""

API: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "api/methods.md": (
        "Method protocols",
        "The protocols that a method may implement, and the registry. The methods themselves are listed in"
        " [the catalogue](../catalogue.md).",
        ("intaglio.methods.base",),
    ),
    "api/masks.md": (
        "Attention masks",
        "Visibility rules, set per layer on stock models.",
        (
            "intaglio.masks",
            "intaglio.masks.rules",
            "intaglio.masks.rules.base",
            "intaglio.masks.rules.positional",
            "intaglio.masks.rules.explicit",
            "intaglio.masks.rules.boolean",
            "intaglio.masks.rules.scores",
            "intaglio.masks.registry",
            "intaglio.masks.visibility",
            "intaglio.masks.method",
            "intaglio.masks.visualize",
        ),
    ),
    "api/training.md": (
        "Training",
        "The training loop, and the protocols of objectives, training modifiers and selectors.",
        (
            "intaglio.trainer.protocols",
            "intaglio.trainer.causal_lm",
            "intaglio.trainer.lora",
            "intaglio.trainer.instruction_data",
            "intaglio.trainer.history",
        ),
    ),
    "api/drafters.md": (
        "Drafters",
        "The protocol of drafters for [speculative decoding](../decoding.md).",
        ("intaglio.speculative.protocols",),
    ),
    "api/constraints.md": (
        "Constraints",
        "Constraints on generated text; see [constrained output](../constraints.md).",
        (
            "intaglio.constraints.base",
            "intaglio.constraints.grammar",
            "intaglio.constraints.sql",
            "intaglio.constraints.predicate",
            "intaglio.constraints.vocabulary",
            "intaglio.constraints.processor",
        ),
    ),
    "api/search.md": (
        "Search",
        "Indexes of documents; see [searching your own documents](../search.md).",
        (
            "intaglio.search.index",
            "intaglio.search.documents",
            "intaglio.search.encoders",
            "intaglio.search.evaluate",
            "intaglio.search.judgements",
        ),
    ),
    "api/soup.md": (
        "Parameter averaging",
        "Checkpoint soups and moving averages.",
        ("intaglio.checkpoint.soup", "intaglio.recipe.soup"),
    ),
    "api/images.md": ("Image tiles", "Tiles of images that keep aspect ratios.", ("intaglio.data.image_tiles",)),
    "api/evidence.md": (
        "Evidence",
        "Registered claims and their records; see [how claims are judged](../evidence.md).",
        (
            "intaglio.evidence.engine.claim",
            "intaglio.evidence.engine.run",
            "intaglio.evidence.engine.record",
            "intaglio.evidence.engine.statistics",
        ),
    ),
}
"""`{page: (title, first sentence, modules)}`; `api/index.md` documents the names of the package itself."""

BUNDLED = ("mkdocs-material", "pymdown-extensions", "mkdocs")
"""Packages whose scripts, styles and icons the site contains."""


def _read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def home() -> str:
    """Return the README without the sections in `NOT_AT_HOME`, with tables that link to the methods' pages."""
    first, *sections = re.split(r"^(?=## )", _read("README.md"), flags=re.MULTILINE)
    kept = [s for s in sections if s.partition("\n")[0].removeprefix("## ") not in NOT_AT_HOME]
    text = relink("".join([first, *kept[:-1]]), "README.md", "index.md")
    methods = [cards.table(entries, "methods/") for entries in cards.by_area().values()]
    last = relink(kept[-1], "README.md", "index.md")
    return "\n\n".join([text.rstrip(), "## Methods", *methods, "[All methods by area](catalogue.md).", last])


def api_index() -> str:
    """Return the page of the public names of `intaglio`; methods are linked to their own pages."""
    methods = {entry.name: slug for slug, entry in PUBLISHED.items()}
    names = [name for name in intaglio.__all__ if name not in methods]
    cards_of = ", ".join(f"[`{name}`](../methods/{slug}.md)" for name, slug in methods.items())
    parts = [
        "# Python",
        f"Everything here is an attribute of `intaglio`, loaded lazily. So are the methods: {cards_of}.",
    ]
    parts += [f"::: {getattr(intaglio, name).__module__}.{name}" for name in sorted(names, key=str.lower)]
    return "\n\n".join(parts) + "\n"


def api_page(page: str) -> str:
    """Return a page of docstrings; `page` is a key of `API`."""
    title, first, modules = API[page]
    return "\n\n".join([f"# {title}", first, *(f"::: {module}" for module in modules)]) + "\n"


def licences() -> str:
    """Return the licences of the packages in `BUNDLED`."""
    parts = ["# Licences of this site", "The scripts, styles and icons of these pages come from:"]
    for name in BUNDLED:
        package = distribution(name)
        files = [path for path in package.files or () if re.match(r"LICEN[CS]E", path.name)]
        for path in files:
            text = Path(path.locate()).read_text(encoding="utf-8").strip()
            parts += [f"## {name} {package.version}", f"```text\n{text}\n```"]
        if not files:
            raise ValueError(f"the package {name} contains no licence file, which the site must show")
    return "\n\n".join(parts) + "\n"


def recipe_fields() -> str:
    """Return the table of a recipe's keys."""
    steps = "| `steps` | list of methods with their [parameters](catalogue.md) | required | steps, in order |"
    return _table([steps, *_field_rows("", RecipeHeader)])


def new_fields() -> str:
    """Return the table of the keys of `new`."""
    return _table(_field_rows("", New))


def train_fields() -> str:
    """Return the table of the keys of a `train` step: its own and those of `intaglio.train`."""
    descriptions = {**_descriptions(train), **_descriptions(Train)}
    schema = Train.model_json_schema()
    rows = []
    for name, field in Train.model_fields.items():
        accepted = describe.describe_type(schema["properties"][name], schema.get("$defs", {}))
        default = describe.to_yaml(field.get_default(call_default_factory=True))
        rows.append(f"| `{name}` | {cell(accepted)} | `{default}` | {cell(descriptions[name])} |")
    return _table([*rows, *_field_rows("lora.", Lora)])


def _table(rows: list[str]) -> str:
    return "\n".join(["| key | type | default | description |", "| --- | --- | --- | --- |", *rows])


def _descriptions(documented: Any) -> Mapping[str, str]:
    return describe.describe(inspect.getdoc(documented) or "").lists["Args"]


def _field_rows(prefix: str, kind: type[BaseModel]) -> list[str]:
    """Return a row for each field; those of nested models come last."""
    schema = kind.model_json_schema()
    descriptions = _descriptions(kind)
    rows, nested = [], []
    for name, field in kind.model_fields.items():
        if isinstance(field.default, BaseModel):
            nested += _field_rows(f"{prefix}{name}.", type(field.default))
            accepted, default = "mapping, below", ""
        else:
            accepted = describe.describe_type(schema["properties"][name], schema.get("$defs", {}))
            default = "required" if field.is_required() else f"`{describe.to_yaml(field.default)}`"
        rows.append(f"| `{prefix}{name}` | {cell(accepted)} | {default} | {cell(descriptions[name])} |")
    return rows + nested


SLOTS: dict[str, Callable[[], str]] = {
    "recipe keys": recipe_fields,
    "new keys": new_fields,
    "training keys": train_fields,
}


def fill(markdown: str) -> str:
    """Replace each `<!-- generated: NAME -->` of a guide by the table of that name in `SLOTS`."""
    return re.sub(r"<!-- generated: (.+?) -->", lambda match: SLOTS[match[1]](), markdown)


def from_file(source: str, page: str) -> str:
    """Return a file of the repository as a page of the site."""
    return relink(_read(source), source, page)


def generated() -> Iterator[tuple[str, str]]:
    """Yield every generated page and file: `(path in the site's source, content)`."""
    yield "index.md", home()
    for source, page in (
        ("benchmarks/README.md", "benchmarks.md"),
        ("CHANGELOG.md", "changelog.md"),
        ("CONTRIBUTING.md", "contributing.md"),
    ):
        yield page, from_file(source, page)
    yield "catalogue.md", cards.catalogue()
    for slug in PUBLISHED:
        yield f"methods/{slug}.md", cards.card(slug, shown.load_evidence(slug), notes.read(slug))
        record = records.RECORDS / f"{slug}.json"
        if record.is_file():
            yield f"records/{slug}.json", record.read_text(encoding="utf-8")
    yield "api/index.md", api_index()
    for page in API:
        yield page, api_page(page)
    yield "licences.md", licences()
    yield "assets/palette.css", style.style(_read(style.SHEET))


def navigation() -> list[Mapping[str, Any]]:
    """Return the navigation entries of the methods, by area."""
    return [
        {area.capitalize(): [{entry.name: f"methods/{entry.slug}.md"} for entry in entries]}
        for area, entries in cards.by_area().items()
    ]
