"""The generated part of the README is current, and its recipe and the shipped ones are valid."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import readme

from intaglio.recipe.schema import Recipe
from intaglio.recipe.yaml import parse_yaml

ROOT = Path(__file__).resolve().parents[2]


def test_the_readme_is_current() -> None:
    text = readme.README.read_text(encoding="utf-8")
    assert readme.renewed(text) == text, "run `make readme`"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_validates(path: Path) -> None:
    assert Recipe.read(path).steps


def test_the_readmes_recipe_validates() -> None:
    recipes = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(recipes) == 1
    assert [step.slug for step in Recipe.from_document(parse_yaml(recipes[0])).steps] == ["wanda", "train"]
