"""Identifiers of Python source with their roles, as token-classification examples.

The roles come from the syntax tree, so they are exact; many are decided by the token after the identifier (`x =`, `x(`,
`x.`). A file is rewritten with a space between any two tokens; comments and lines of nothing but strings are dropped,
strings become `"s"`, a level of indentation is one space.
"""

from __future__ import annotations

import ast
import io
import keyword
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

ROLES = ("attribute", "call", "definition", "import", "keyword", "load", "parameter", "store")
"""Attribute that is not called; function of a call; name of a function or class; name in an import; keyword of an
argument; name that is read; parameter of a function; name that is assigned. Other names (in `global`, `except ... as`,
`del` ...) have no label: there are too few."""
STRING = '"s"'
PASSAGE = 256
"""Most characters of a passage; whole lines, at least one."""


@dataclass(frozen=True)
class Line:
    """One rewritten logical line of a file; its text begins with a line break, its indentation and a space."""

    text: str
    names: tuple[tuple[int, int, str | None], ...]


def _roles_by_position(tree: ast.AST) -> dict[tuple[int, int], str]:
    """Return the role at `(line, column in bytes)` of every identifier whose role follows from its node."""
    roles: dict[tuple[int, int], str] = {}
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            role = "call" if id(node) in called else {ast.Store: "store", ast.Load: "load"}.get(type(node.ctx))
            if role is not None:
                roles[node.lineno, node.col_offset] = role
        elif isinstance(node, ast.Attribute) and node.end_lineno is not None and node.end_col_offset is not None:
            position = node.end_lineno, node.end_col_offset - len(node.attr.encode())
            roles[position] = "call" if id(node) in called else "attribute"
        elif isinstance(node, ast.keyword) and node.arg is not None:
            roles[node.lineno, node.col_offset] = "keyword"
        elif isinstance(node, ast.arg):
            roles[node.lineno, node.col_offset] = "parameter"
    return roles


def lines(source: str) -> Iterator[Line]:
    """Yield the logical lines of a file with their labelled identifiers, or raise a SyntaxError."""
    tree = ast.parse(source)
    roles = _roles_by_position(tree)
    imports = {
        line
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    level, words, strings = 0, list[tuple[str, str | None]](), 0
    previous = ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind, inside = tokenize.tok_name[token.type], strings > 0
        strings += (kind == "FSTRING_START") - (kind == "FSTRING_END")
        if kind == "INDENT":
            level += 1
        elif kind == "DEDENT":
            level -= 1
        elif kind == "NEWLINE":
            if any(word != STRING for word, _ in words):
                yield _line(level, words)
            words, previous = [], ""
        elif kind == "STRING" or (kind == "FSTRING_START" and not inside):
            words.append((STRING, None))
        elif kind in ("NAME", "OP", "NUMBER") and not inside:
            role = None
            if kind == "NAME" and not keyword.iskeyword(token.string):
                column = len(token.line[: token.start[1]].encode())
                role = roles.get((token.start[0], column), "")
                role = "definition" if previous in ("def", "class") else role
                role = "import" if not role and token.start[0] in imports else role
            words.append((token.string, role))
            previous = token.string


def _line(level: int, words: list[tuple[str, str | None]]) -> Line:
    text, names = "\n" + " " * level, []
    for word, role in words:
        if role is not None:
            names.append((len(text) + 1, len(text) + 1 + len(word), role or None))
        text += f" {word}"
    return Line(text, tuple(names))


def passages(file: Iterable[Line]) -> Iterator[dict[str, Any]]:
    """Yield a file's lines as labelled passages: as many whole lines as have at most 256 characters."""
    text, names = "", list[tuple[int, int, str | None]]()
    for line in file:
        if text and len(text) + len(line.text) > PASSAGE:
            yield _example(text, names)
            text, names = "", []
        names += [(start + len(text), end + len(text), role) for start, end, role in line.names]
        text += line.text
    if text:
        yield _example(text, names)


def _example(text: str, names: list[tuple[int, int, str | None]]) -> dict[str, Any]:
    return {
        "passage": text,
        "spans": [[start, end] for start, end, _ in names],
        "labels": [role for _, _, role in names],
    }
