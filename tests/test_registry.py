"""The registry's table is what the classes say, and a method is found by the name of its file alone."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from tools.catalogue import discover
from tools.new_method import write_skeleton

import intaglio
from intaglio.errors import IntaglioError
from intaglio.methods.base import Carving, Method
from intaglio.methods.registry import (
    AREAS,
    METHODS,
    PUBLISHED,
    Entry,
    area_package,
    get_method,
    list_fitted,
    list_methods,
    list_objectives,
)

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path(intaglio.__file__).parent.parent


def test_the_table_is_current() -> None:
    assert discover() == list(METHODS.values()), "run `make catalogue`"


def test_objectives_declare_what_they_are_trained_on() -> None:
    assert list_objectives("interactions") == ["bert4rec", "sasrec"]
    assert list_objectives("labels") == ["token_classification"]
    assert list_objectives("classes") == ["classification"]
    assert {"codegen2", "meap"} <= set(list_objectives("texts"))


def test_published_methods_come_first_in_the_order_of_their_slugs() -> None:
    assert list(METHODS) == [*sorted(PUBLISHED), *sorted(METHODS.keys() - PUBLISHED.keys())]
    assert len({entry.name for entry in METHODS.values()}) == len(METHODS)


@pytest.mark.parametrize("entry", METHODS.values(), ids=lambda entry: entry.slug)
def test_a_method_describes_itself(entry: Entry) -> None:
    method = get_method(entry.slug)
    assert issubclass(method, Method)
    assert not any(getattr(base, "citation", "") for base in method.__mro__[1:])  # bases are machinery
    assert entry.kinds
    assert entry.summary[0].islower()
    if "carving" in entry.kinds:
        assert isinstance(method.model_construct(), Carving)


@pytest.mark.parametrize("entry", PUBLISHED.values(), ids=lambda entry: entry.slug)
def test_a_published_method_cites_its_paper(entry: Entry) -> None:
    # A reader who knows the paper finds the code: method, authors, venue and year stand in the first line.
    first = (import_module(entry.module).__doc__ or "").splitlines()[0]
    author, year = entry.citation.split()[0], entry.citation[-4:]
    assert first.replace("-", "").startswith(entry.name)
    assert re.search(rf"\({author} .*{year}\)", first)
    title = entry.citation.partition(", ")[2].partition(":")[0]
    assert title in " ".join((get_method(entry.slug).__doc__ or "").split())
    assert entry.url.startswith("https://")


def slugs_in(path: Path) -> list[str]:
    """The slugs of the methods that a file defines, read without importing it."""
    classes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ClassDef)]
    keywords = [keyword for node in classes for keyword in node.keywords if keyword.arg == "slug"]
    return [keyword.value.value for keyword in keywords if isinstance(keyword.value, ast.Constant)]


@pytest.mark.parametrize("area", AREAS)
def test_in_an_area_a_slug_is_the_name_of_its_file(area: str) -> None:
    package = SOURCE.joinpath(*area_package(area).split("."))
    for path in package.rglob("*.py"):
        for slug in slugs_in(path):
            own = path.parent if path.name == "__init__.py" else path.with_suffix("")
            assert own == package / slug


def test_queries_and_an_unknown_slug() -> None:
    assert list_methods("selector") == ["paser", "points", "random"]
    assert set(list_fitted()) == {slug for slug in METHODS if get_method(slug).fitted}
    with pytest.raises(IntaglioError, match=r"there is no method named 'wada'; did you mean wanda\?"):
        get_method("wada")


def test_a_skeleton_passes_lint_and_fails_with_what_is_left_to_do(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    method, test, *_ = write_skeleton("row_norm", "weights", tmp_path)
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "src", "tests"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
    for path in (method, test):
        content: dict[str, Any] = {}
        exec(path.read_text(encoding="utf-8"), content)
    assert content["EXAMPLES"] == ({},)
    with pytest.raises(AssertionError, match="row_norm is a skeleton: write its file and tests"):
        content["test_it_is_in_the_catalogue"]()


@pytest.mark.parametrize(
    ("slug", "area", "sentence"),
    [
        ("Row-Norm", "weights", "SLUG is 'Row-Norm'; lower-case letters"),
        ("wanda", "weights", "there is such a method already"),
        ("row_norm", "rooms", "AREA is 'rooms'; accepted: weights, activations"),
    ],
)
def test_a_skeleton_that_cannot_be_written_is_one_sentence(slug: str, area: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        write_skeleton(slug, area, tmp_path)
    assert not any(tmp_path.iterdir())
