"""Pages generated from the README, other repository files and docstrings; links lead to pages of the site."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from generate import pages, style, text

import intaglio
from intaglio.methods.registry import PUBLISHED
from intaglio.recipe.schema import Calibration, Measure, RecipeHeader

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("link", "source", "page", "expected"),
    [
        ("[x](benchmarks/README.md)", "README.md", "index.md", "[x](benchmarks.md)"),
        ("[x](recipes)", "README.md", "index.md", "[x](recipes.md)"),
        ("[x](../README.md)", "docs/weights.md", "weights.md", "[x](index.md)"),
        ("[x](../README.md#methods)", "docs/weights.md", "weights.md", "[x](index.md#methods)"),
        ("[x](evidence.md)", "docs/weights.md", "weights.md", "[x](evidence.md)"),
        ("[x](../README.md)", "benchmarks/README.md", "benchmarks.md", "[x](index.md)"),
        ("[x](docs/weights.md)", "README.md", "api/index.md", "[x](../weights.md)"),
        ("[x](https://arxiv.org/abs/1)", "README.md", "index.md", "[x](https://arxiv.org/abs/1)"),
        ("[x](#here)", "README.md", "index.md", "[x](#here)"),
    ],
)
def test_links(link: str, source: str, page: str, expected: str) -> None:
    assert text.relink(link, source, page) == expected


def test_a_link_to_a_file_outside_the_site_is_refused() -> None:
    with pytest.raises(ValueError, match=r"README.md links to src/intaglio/anatomy.py, which is not a page"):
        text.relink("[x](src/intaglio/anatomy.py)", "README.md", "index.md")


def test_inline_code() -> None:
    assert text.inline("`a <= 1` or <b>") == "<code>a &lt;= 1</code> or &lt;b&gt;"
    assert text.cell("|x|") == "\\|x\\|"


def test_brackets_and_comparisons_in_docstrings_are_escaped() -> None:
    assert text.prose("M[(a, b)][c] of `x[1]`\nhere\n\n    y[a][b]\n\nz") == (
        "M\\[(a, b)]\\[c] of `x[1]`\nhere\n\n    y[a][b]\n\nz"
    )
    assert text.prose("p(y | x, y_<t) > `a<b`\n\n    y_<t") == "p(y | x, y_&lt;t) > `a<b`\n\n    y_<t"
    assert text.prose("1. one\n   more\n2. two") == "1. one\n    more\n\n2. two"


def test_home_is_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    home = pages.home()
    sections = re.findall(r"^## (.+)$", readme, re.MULTILINE)
    assert set(pages.NOT_AT_HOME) <= set(sections)
    kept = [name for name in sections if name not in pages.NOT_AT_HOME]
    assert re.findall(r"^## (.+)$", home, re.MULTILINE) == [*kept[:-1], "Methods", kept[-1]]
    lines = set(home.split("\n"))
    for name in ("Quick start", "What `demo` prints"):
        section = readme.partition(f"## {name}\n")[2].partition("\n## ")[0]
        code = [line for line in section.split("\n") if line.startswith("    ")]
        assert code
        assert set(code) <= lines
    for entry in PUBLISHED.values():
        assert f"[{entry.name}](methods/{entry.slug}.md)" in home


def test_the_python_page_has_every_public_name() -> None:
    page = pages.api_index()
    for name in intaglio.__all__:
        assert re.search(rf"^::: intaglio\.\S*\.{name}$|\[`{name}`\]\(", page, re.MULTILINE), name


def test_the_keys_of_a_recipe() -> None:
    rows = pages.recipe_fields().split("\n")
    names = [re.findall(r"`([^`]+)`", row)[0] for row in rows[2:]]
    inner = [
        f"{above}.{name}"
        for above, kind in (("calibration", Calibration), ("measure", Measure))
        for name in kind.model_fields
    ]
    assert names == ["steps", *RecipeHeader.model_fields, *inner]
    assert (
        "| `calibration.samples` | whole number, at least 1, at most 1,000,000 | `128` |"
        " number of segments. Default 128. |" in rows
    )


def test_slots_are_filled() -> None:
    assert pages.fill("a\n<!-- generated: recipe keys -->\nb") == f"a\n{pages.recipe_fields()}\nb"
    with pytest.raises(KeyError):
        pages.fill("<!-- generated: something else -->")


def test_the_colours_are_those_of_the_reports() -> None:
    sheet = (ROOT / style.SHEET).read_text(encoding="utf-8")
    made = style.style(sheet)
    light, dark = re.findall(r"--ink: (#[0-9a-f]+)", sheet)[:2]
    first, second = made.split("\n[data-md-color-scheme='slate']")
    assert light in first
    assert dark in second
    assert dark not in first
    assert ".picture text { fill: var(--ink); }" in made
    with pytest.raises(ValueError, match="0 palettes"):
        style.style("p { margin: 0; }")


def test_the_navigation_has_every_method() -> None:
    found = [
        page for area in pages.navigation() for methods in area.values() for link in methods for page in link.values()
    ]
    assert sorted(found) == sorted(f"methods/{slug}.md" for slug in PUBLISHED)
