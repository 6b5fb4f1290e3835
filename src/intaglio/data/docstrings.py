"""Pairs of documentation and code from Python source, which is parsed, never imported or run."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Literal

from intaglio.data.python_source import SourceFile

Kind = Literal["code", "text"]
"""Kind of document: `code`, the function without docstrings; `text`, the docstring after its summary."""
FEWEST_WORDS = 4
"""Fewest words of a summary; shorter ones are not searchable."""
MOST_CHARACTERS = 400
"""Most characters of a summary; longer first paragraphs are not summaries."""
FEWEST_LINES = 3
"""Fewest lines of a function's body."""
FEWEST_TEXT_WORDS = 12
"""Fewest words of a docstring after its summary."""

_WORD = re.compile(r"[a-z][a-z0-9]+")
_EMPTY_SUMMARY = re.compile(
    r"[\w.]+\s*\(.*"  # a signature, as written by hand for functions in C
    r"|(?:see|same as|alias (?:for|of)|deprecated|todo|fixme|xxx|args|parameters|returns?:|examples?)\b.*"
    r"|[>.=*:\-#@].*",
    re.I | re.S,
)

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Documented = _Function | ast.ClassDef


@dataclass(frozen=True)
class Pair:
    """A summary (the docstring's first paragraph, on one line) and its document, without the summary.

    `name` is that of the function or class in its module, such as `Path.exists`.
    """

    package: str
    module: str
    name: str
    query: str
    document: str

    @cached_property
    def id(self) -> str:
        """The first 16 digits of SHA-256 over location and content."""
        content = "\0".join((self.module, self.name, self.query, self.document))
        return sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def words(text: str) -> str:
    """Return the words of a text in lower case, by which duplicates are compared."""
    return " ".join(_WORD.findall(text.lower()))


def pairs(files: Iterable[SourceFile], kind: Kind) -> Iterator[Pair]:
    """Yield the documented functions of some files.

    Left out: nested functions (their code is part of another's), summaries that are not sentences (a signature, a
    reference to another function, fewer than four words), documents that are too short or repeat the summary, and files
    that this Python cannot parse.
    """
    for file in files:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in the files
                tree = ast.parse(file.text)
        except (SyntaxError, ValueError, RecursionError):
            continue
        lines = file.text.split("\n")
        for name, node in _documented(tree, ""):
            pair = _pair(file, lines, name, node, kind)
            if pair is not None:
                yield pair


def _documented(node: ast.AST, prefix: str) -> Iterator[tuple[str, _Documented]]:
    """Yield functions and classes with docstrings, except nested ones."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Documented):
            if ast.get_docstring(child, clean=False) is not None:
                yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from _documented(child, f"{prefix}{child.name}.")
        elif isinstance(child, (ast.If, ast.Try, ast.With)):
            yield from _documented(child, prefix)


def _pair(file: SourceFile, lines: list[str], name: str, node: _Documented, kind: Kind) -> Pair | None:
    summary, _, rest = inspect.cleandoc(ast.get_docstring(node) or "").partition("\n\n")
    query = " ".join(summary.split())
    known = words(query)
    if len(known.split()) < FEWEST_WORDS or len(query) > MOST_CHARACTERS or _EMPTY_SUMMARY.fullmatch(query):
        return None
    if kind == "text":
        document = rest.strip()
        long_enough = len(words(document).split()) >= FEWEST_TEXT_WORDS
    elif isinstance(node, ast.ClassDef):
        return None
    else:
        document = _code(lines, node)
        long_enough = sum(bool(line.strip()) for line in document.split("\n")) > FEWEST_LINES
    if not long_enough or f" {known} " in f" {words(document)} ":
        return None
    try:
        f"{query}{document}".encode()
    except UnicodeEncodeError:
        return None  # a lone surrogate, written as an escape
    return Pair(file.package, file.module, name, query, document)


def _code(lines: list[str], function: _Function) -> str:
    """Return a function's source from `def` on, without docstrings; "" where a docstring shares a line with code."""
    dropped: set[int] = set()
    for node in ast.walk(function):
        if not isinstance(node, _Documented) or ast.get_docstring(node, clean=False) is None:
            continue
        text = node.body[0]
        last = text.end_lineno or text.lineno
        before = lines[text.lineno - 1].encode()[: text.col_offset]
        after = lines[last - 1].encode()[text.end_col_offset :]
        if before.strip() or after.strip() or (node is not function and len(node.body) == 1):
            return ""
        dropped.update(range(text.lineno, last + 1))
    numbers = range(function.lineno, (function.end_lineno or function.lineno) + 1)
    return textwrap.dedent("\n".join(lines[number - 1] for number in numbers if number not in dropped)).strip()
