"""A method's description for the terminal: prose in paragraphs, equations as they stand, parameters as a table."""

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
_MARKED = re.compile(r"\*(\S[^*]*\S|\S)\*")


def description(method: type[Method]) -> RenderableType:
    """What a class says of itself.

    Args:
        method: the class.
    """
    found = describe.describe(inspect.getdoc(method) or "")
    parts: list[RenderableType] = [part for block in found.prose.split("\n\n") for part in (*_blocks(block), "")]
    if method.model_fields:
        parts.append(_parameters(method))
    for heading in ("Raises", "Warns"):
        for name, text in found.lists.get(heading, {}).items():
            parts += [Padding(_text(f"{heading} {name}: {text}"), (0, 0, 1, 0))]
    if found.source:
        parts.append(_text(found.source))
    return Group(*parts)


def _blocks(block: str) -> Iterator[RenderableType]:
    """A paragraph, the items of a list, or lines that stay as they are."""
    if all(line.startswith("    ") for line in block.split("\n")):
        yield Text(block)
        return
    # A line that begins an item begins anew; others were broken for an editor and are joined.
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
    table = Table("parameter", "default", "what it is", box=SIMPLE_HEAD, pad_edge=False)
    for row in describe.parameters(method, {}):
        accepted = f" [{row.type}]" if row.type else ""
        table.add_row(row.name, Text(row.default), _text(row.description) + Text(accepted.replace("`", ""), "dim"))
    return table


def _text(line: str) -> Text:
    """Emphasis as the docstring marks it; nothing else is markup."""
    text, end = Text(), 0
    for found in _MARKED.finditer(line):
        text.append(line[end : found.start()]).append(found[1], "italic")
        end = found.end()
    return text.append(line[end:])
