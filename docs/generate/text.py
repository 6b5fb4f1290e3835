"""Links between pages, inline code, and the templates of the pages that are generated."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

ROOT = Path(__file__).resolve().parents[2]
HERE: dict[str, str] = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks": "benchmarks.md",
    "benchmarks/README.md": "benchmarks.md",
    "recipes": "recipes.md",
}
"""`{path in the repository: page of the site}`; pages below docs/ keep their names."""
_LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")
_CODE = re.compile(r"`+([^`]+)`+")


def relink(markdown: str, source: str, page: str) -> str:
    """Turn a file's links to other files of the repository into links between pages of the site.

    Args:
        markdown: the file's text; links to the web and within the page stay as they are.
        source: its path in the repository, with slashes.
        page: the page that it becomes.

    Raises:
        ValueError: a link leads to a file that is no page.
    """

    def other(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[1]))
        target = HERE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if target is None:
            raise ValueError(f"{source} links to {found[1]}, which is no page of the site")
        return f"]({posixpath.relpath(target, posixpath.dirname(page) or '.')}{found[2] or ''})"

    return _LINK.sub(other, markdown)


def inline(text: str) -> Markup:
    """Text as HTML, with what stands in backticks as code.

    Args:
        text: of a docstring or a field.
    """
    parts = _CODE.split(text)
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if index % 2 else escape(part) for index, part in enumerate(parts)
    )


def prose(text: str) -> str:
    """A docstring's paragraphs as Markdown: what looks like a link there is an index, as in M[a][b], what
    looks like a tag a comparison.

    Args:
        text: paragraphs; those that are indented by four or more are code, and so is what stands in backticks.
    """

    def escaped(paragraph: str) -> str:
        if all(line.startswith("    ") for line in paragraph.split("\n")):
            return paragraph
        # Markdown wants four spaces under an item of a list, and an empty line between items that have several lines.
        paragraph = re.sub(r"\n(?=\d+\. )", "\n\n", re.sub(r"(?m)^ {3}(?=\S)", "    ", paragraph))
        parts = re.split(r"(`+[^`]+`+)", paragraph)
        # Nothing there is HTML: y_<t is a y with an index.
        return "".join(
            part if index % 2 else part.replace("[", "\\[").replace("<", "&lt;") for index, part in enumerate(parts)
        )

    return "\n\n".join(escaped(paragraph) for paragraph in re.split(r"\n\s*\n", text))


def cell(text: str) -> str:
    """Text as it may stand in a cell of a Markdown table.

    Args:
        text: one line.
    """
    return text.replace("|", "\\|")


def environment() -> Environment:
    """The templates, with everything escaped that they do not call safe."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {"inline": inline, "prose": prose}
    return made
