"""In guides and method pages, recipes validate, commands parse, Python compiles and constants match the code."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from generate import cards, notes, pages
from generate import evidence as shown

import intaglio
from intaglio.cli.app import app
from intaglio.cli.search import index_app
from intaglio.evidence.engine import claim, record, statistics
from intaglio.methods.registry import PUBLISHED
from intaglio.recipe.schema import Recipe
from intaglio.recipe.yaml import parse_yaml

ROOT = Path(__file__).resolve().parents[2]
GUIDES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
PAGES = (
    GUIDES
    | {"index.md": pages.home()}
    | {f"{s}.md": cards.card(s, shown.load_evidence(s), notes.read(s)) for s in PUBLISHED}
)


def blocks(language: str) -> list[tuple[str, str]]:
    found = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [(name, code) for name, text in PAGES.items() for code in found.findall(text)]


def commands() -> list[str]:
    """Return every `intaglio ...` line of a shell block or of running text."""
    lines = [line for _, code in blocks("sh") for line in code.splitlines()]
    spans = [code for text in PAGES.values() for code in re.findall(r"`(intaglio [a-z][^`\n]*)`", text)]
    return sorted({line for line in lines + spans if line.startswith("intaglio ")})


@pytest.mark.parametrize(("name", "code"), blocks("yaml"))
def test_recipes_validate(name: str, code: str) -> None:
    assert Recipe.from_document(parse_yaml(code)).steps, name


@pytest.mark.parametrize(("name", "code"), blocks("python"))
def test_python_compiles_and_uses_public_names(name: str, code: str) -> None:
    tree = ast.parse(code, name)
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "intaglio"
    }
    assert used <= set(intaglio.__all__)


@pytest.mark.parametrize("command", commands())
def test_commands_are_accepted(command: str) -> None:
    words = shlex.split(command)[1:]
    if words[0] == "index" and len(words) > 1:  # a group of commands, of which `create` is the default
        group = typer.main.get_command(index_app)
        words = words[1:] if words[1] in group.commands else ["create", *words[1:]]  # type: ignore[attr-defined]
        root: Any = group
    else:
        root = typer.main.get_command(app)
    # In running text a command may have no arguments, or placeholders.
    subcommand = root.get_command(typer.Context(root), words[0])
    assert subcommand is not None, words[0]
    if len(words) > 1:
        with subcommand.make_context(
            words[0], [word for word in words[1:] if word not in ("A", "B")] or ["--help"], resilient_parsing=True
        ):
            pass
    known = {option for parameter in subcommand.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("-")} - {"-"} <= known


def test_there_is_something_to_check() -> None:
    assert len(commands()) > 5
    assert {name for name, _ in blocks("yaml")} >= {"recipes.md", "index.md", "lost.md", "bip.md", "aded.md"}
    assert {name for name, _ in blocks("python")} >= {"recipes.md", "training.md", "wanda.md"}


def test_the_rules_are_those_of_the_code() -> None:
    text = re.sub(r"\s+", " ", GUIDES["evidence.md"])
    alphas = ", ".join(f"{alpha:.3f}".strip("0") for alpha in claim.ALPHAS[4][:3])
    for rule in (
        f"with alpha {alphas} and {claim.ALPHAS[4][3]:.2f}".replace("0.0", ".0"),
        f"over {statistics.MAX_DIVERGED:.0%}".replace("%", " %"),
        f"{ {3: 'three'}[claim.PROBE_UNITS] } pilot units",
        f"{ {3: 'three'}[claim.ABLATION_UNITS] } of the same units",
        f"Up to { {4: 'four'}[claim.MAX_ABLATIONS] } further arms",
        *(f"**{verdict}**" for verdict in record.VERDICTS),
    ):
        assert rule in text, rule


def test_no_page_contains_a_path_of_this_machine() -> None:
    for name, text in PAGES.items():
        assert not re.search(r"(?<![\w.])/(work|tmp|root|home)/", text), name
