"""The description of a method for the terminal: prose in paragraphs, equations unchanged, parameters as a table."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from intaglio.methods import describe
from intaglio.methods.base import Method

_ITEM = re.compile(r"(\d+\.|-) +")
_EMPHASIS = re.compile(r"\*(\S[^*]*\S|\S)\*")


def description(method: type[Method]) -> RenderableType:
    """Return the docstring of a method, with its parameters as a table."""
    docstring = describe.describe(inspect.getdoc(method) or "")
    parts: list[RenderableType] = [part for block in docstring.prose.split("\n\n") for part in (*_blocks(block), "")]
    if method.model_fields:
        parts.append(_parameters(method))
    for heading in ("Raises", "Warns"):
        for name, text in docstring.lists.get(heading, {}).items():
            parts += [Padding(_text(f"{heading} {name}: {text}"), (0, 0, 1, 0))]
    if docstring.source:
        parts.append(_text(docstring.source))
    return Group(*parts)


def _blocks(block: str) -> Iterator[RenderableType]:
    """Yield a paragraph, the items of a list, or an indented block unchanged."""
    if all(line.startswith("    ") for line in block.split("\n")):
        yield Text(block, no_wrap=True, overflow="ignore")
        return
    # The item of a list begins a new line; other lines were broken for an editor and are joined.
    for piece in re.split(r"\n(?= *(?:\d+\.|-) )", block):
        line = " ".join(part.strip() for part in piece.split("\n"))
        item = _ITEM.match(line)
        if item is None:
            yield _text(line)
        else:
            row = Table.grid(padding=(0, 1, 0, 0))
            row.add_row(item[1], _text(line[item.end() :]))
            yield row


def _parameters(method: type[Method]) -> Table:
    table = Table("parameter", "default", "description", box=SIMPLE_HEAD, pad_edge=False)
    for row in describe.parameters(method, {}):
        accepted = f" [{row.type}]" if row.type else ""
        table.add_row(row.name, Text(row.default), _text(row.description) + Text(accepted.replace("`", ""), "dim"))
    return table


def _text(line: str) -> Text:
    """Render emphasis as the docstring marks it; nothing else is markup."""
    text, end = Text(), 0
    for match in _EMPHASIS.finditer(line):
        text.append(line[end : match.start()]).append(match[1], "italic")
        end = match.end()
    return text.append(line[end:])
