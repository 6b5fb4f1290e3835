"""The pages that are made: from the README and other files of the repository, from docstrings, from the catalogue."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from intaglio.methods.registry import PUBLISHED
from pydantic import BaseModel

import intaglio
from generate import cards, notes, style
from generate import evidence as shown
from generate.text import ROOT, cell, relink
from intaglio.evidence import record as records
from intaglio.methods import describe
from intaglio.recipe.schema import New, RecipeHeader
from intaglio.trainer.loop import train
from intaglio.trainer.lora import Lora
from intaglio.trainer.recipe_step import Train

NOT_AT_HOME = ("Methods", "Against the peer", "Adding a method")
"""Sections of the README that have a page of their own here."""

API: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "api/methods.md": (
        "What a method is",
        "The protocols that a method may implement, and the registry. Each method's own page is in"
        " [the catalogue](../catalogue.md).",
        ("intaglio.methods.base",),
    ),
    "api/masks.md": (
        "Masks over attention",
        "Visibility rules for stock models, set from outside, a layer at a time.",
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
    "api/soup.md": ("Parameter averaging", "Soups of checkpoints, and moving averages.", ("intaglio.modeling.soup",)),
    "api/evidence.md": (
        "Evidence",
        "Claims as experiments; [how they are judged](../evidence.md) says the same at length.",
        (
            "intaglio.evidence.experiment",
            "intaglio.evidence.run",
            "intaglio.evidence.record",
            "intaglio.evidence.renew",
            "intaglio.evidence.statistics",
        ),
    ),
}
"""`{page: (title, first sentence, modules)}` beside `api/index.md`, which has the names of the package itself."""

BUNDLED = ("mkdocs-material", "pymdown-extensions", "mkdocs")
"""What lends the site its scripts, styles and icons."""


def _read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def home() -> str:
    """The README without the sections that have a page of their own, and with a way into the catalogue."""
    first, *sections = re.split(r"^(?=## )", _read("README.md"), flags=re.MULTILINE)
    kept = [s for s in sections if s.partition("\n")[0].removeprefix("## ") not in NOT_AT_HOME]
    text = relink("".join([first, *kept[:-1]]), "README.md", "index.md")
    methods = [cards.table(entries, "methods/") for entries in cards.by_room().values()]
    last = relink(kept[-1], "README.md", "index.md")
    return "\n\n".join([text.rstrip(), "## Methods", *methods, "[All methods, by room](catalogue.md).", last])


def api_index() -> str:
    """What `import intaglio` offers, methods left to the catalogue."""
    methods = {entry.name: slug for slug, entry in PUBLISHED.items()}
    names = [name for name in intaglio.__all__ if name not in methods]
    cards_of = ", ".join(f"[`{name}`](../methods/{slug}.md)" for name, slug in methods.items())
    parts = [
        "# Python",
        "Everything here is an attribute of `intaglio`, loaded when it is first used. The methods are too: "
        f"{cards_of}.",
    ]
    parts += [f"::: {getattr(intaglio, name).__module__}.{name}" for name in sorted(names, key=str.lower)]
    return "\n\n".join(parts) + "\n"


def api_page(page: str) -> str:
    """A page of docstrings.

    Args:
        page: a key of `API`.
    """
    title, first, modules = API[page]
    return "\n\n".join([f"# {title}", first, *(f"::: {module}" for module in modules)]) + "\n"


def licences() -> str:
    """The licences of what the site itself is made with, from their own packages."""
    parts = ["# Licences of this site", "Scripts, styles and icons of these pages come with:"]
    for name in BUNDLED:
        found = distribution(name)
        files = [path for path in found.files or () if re.match(r"LICEN[CS]E", path.name)]
        for path in files:
            text = Path(path.locate()).read_text(encoding="utf-8").strip()
            parts += [f"## {name} {found.version}", f"```text\n{text}\n```"]
        if not files:
            raise ValueError(f"the package {name} brings no licence file, and the site must show one")
    return "\n\n".join(parts) + "\n"


def recipe_fields() -> str:
    """The keys of a recipe file, from the classes that read it."""
    steps = "| `steps` | a list of steps: each a method with its [parameters](catalogue.md) | required | in order |"
    return "\n".join(
        ["| key | type | default | what it is |", "| --- | --- | --- | --- |", steps, *_field_rows("", RecipeHeader)]
    )


def new_fields() -> str:
    """The keys of a model from scratch."""
    return "\n".join(["| key | type | default | what it is |", "| --- | --- | --- | --- |", *_field_rows("", New)])


def train_fields() -> str:
    """The keys of a training step: its own, and those of `intaglio.train`."""
    said = {**_said(train), **_said(Train)}
    schema = Train.model_json_schema()
    rows = []
    for name, field in Train.model_fields.items():
        accepted = describe.describe_type(schema["properties"][name], schema.get("$defs", {}))
        default = describe.to_yaml(field.get_default(call_default_factory=True))
        rows.append(f"| `{name}` | {cell(accepted)} | `{default}` | {cell(said[name])} |")
    return "\n".join(
        ["| key | type | default | what it is |", "| --- | --- | --- | --- |", *rows, *_field_rows("lora.", Lora)]
    )


def _said(documented: Any) -> Mapping[str, str]:
    return describe.describe(inspect.getdoc(documented) or "").lists["Args"]


def _field_rows(above: str, kind: type[BaseModel]) -> list[str]:
    """A row for each field, those of nested models at the end."""
    schema = kind.model_json_schema()
    said = _said(kind)
    rows, nested = [], []
    for name, field in kind.model_fields.items():
        if isinstance(field.default, BaseModel):
            nested += _field_rows(f"{above}{name}.", type(field.default))
            accepted, default = "mapping, below", ""
        else:
            accepted = describe.describe_type(schema["properties"][name], schema.get("$defs", {}))
            default = "required" if field.is_required() else f"`{describe.to_yaml(field.default)}`"
        rows.append(f"| `{above}{name}` | {cell(accepted)} | {default} | {cell(said[name])} |")
    return rows + nested


SLOTS: dict[str, Callable[[], str]] = {
    "recipe keys": recipe_fields,
    "new keys": new_fields,
    "training keys": train_fields,
}


def fill(markdown: str) -> str:
    """Replace each `<!-- made: NAME -->` of a guide by what is made under that name.

    Args:
        markdown: of the guide.

    Raises:
        KeyError: nothing is made under a name.
    """
    return re.sub(r"<!-- made: (.+?) -->", lambda found: SLOTS[found[1]](), markdown)


def from_file(source: str, page: str) -> str:
    """A file of the repository as a page.

    Args:
        source: its path in the repository.
        page: that it becomes.
    """
    return relink(_read(source), source, page)


def made() -> Iterator[tuple[str, str]]:
    """Every page and file of the site that is made: `(path in the site's source, content)`."""
    yield "index.md", home()
    for source, page in (
        ("benchmarks/README.md", "benchmarks.md"),
        ("CHANGELOG.md", "changelog.md"),
        ("CONTRIBUTING.md", "contributing.md"),
    ):
        yield page, from_file(source, page)
    yield "catalogue.md", cards.catalogue()
    for slug in PUBLISHED:
        yield f"methods/{slug}.md", cards.card(slug, shown.of(slug), notes.read(slug))
        record = records.RESULTS / f"{slug}.json"
        if record.is_file():
            yield f"records/{slug}.json", record.read_text(encoding="utf-8")
    yield "api/index.md", api_index()
    for page in API:
        yield page, api_page(page)
    yield "licences.md", licences()
    yield "assets/palette.css", style.style(_read(style.SHEET))


def navigation() -> list[Mapping[str, Any]]:
    """The methods' part of the navigation, by room."""
    return [
        {room.capitalize(): [{entry.name: f"methods/{entry.slug}.md"} for entry in entries]}
        for room, entries in cards.by_room().items()
    ]
