"""Links between pages, inline code, and the template environment."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

ROOT = Path(__file__).resolve().parents[2]
PAGES: dict[str, str] = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks": "benchmarks.md",
    "benchmarks/README.md": "benchmarks.md",
    "recipes": "recipes.md",
}
"""`{path in the repository: page of the site}`; files in docs/ keep their names."""
_LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")
_CODE = re.compile(r"`+([^`]+)`+")


def relink(markdown: str, source: str, page: str) -> str:
    """Turn a repository file's links to other files into links between pages of the site.

    Links to the web and within the page are unchanged.

    Raises:
        ValueError: a link leads to a file that is not a page of the site.
    """

    def replace(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        target = PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if target is None:
            raise ValueError(f"{source} links to {match[1]}, which is not a page of the site")
        return f"]({posixpath.relpath(target, posixpath.dirname(page) or '.')}{match[2] or ''})"

    return _LINK.sub(replace, markdown)


def inline(text: str) -> Markup:
    """Return text as HTML, with backticks as code."""
    parts = _CODE.split(text)
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if index % 2 else escape(part) for index, part in enumerate(parts)
    )


def prose(text: str) -> str:
    """Return a docstring's paragraphs as Markdown, with brackets and `<` escaped: M[a][b] is no link, y_<t no tag.

    Paragraphs that are indented by four spaces, and text in backticks, are code.
    """

    def escaped(paragraph: str) -> str:
        if all(line.startswith("    ") for line in paragraph.split("\n")):
            return paragraph
        # Markdown needs four spaces under a list item, and an empty line between items of several lines.
        paragraph = re.sub(r"\n(?=\d+\. )", "\n\n", re.sub(r"(?m)^ {3}(?=\S)", "    ", paragraph))
        parts = re.split(r"(`+[^`]+`+)", paragraph)
        return "".join(
            part if index % 2 else part.replace("[", "\\[").replace("<", "&lt;") for index, part in enumerate(parts)
        )

    return "\n\n".join(escaped(paragraph) for paragraph in re.split(r"\n\s*\n", text))


def cell(text: str) -> str:
    """Escape a line of text for a cell of a Markdown table."""
    return text.replace("|", "\\|")


def environment() -> Environment:
    """Return the template environment, with autoescape."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {"inline": inline, "prose": prose}
    return templates
