"""Identifiers in real Python source labelled with their roles, and a small Llama trained on such text.

The roles come from the syntax tree, so they are exact; many are decided by the token after the identifier (`x =`, `x(`,
`x.`). Files are those of `source_code`. Each file is rewritten with a space between any two tokens, so that no token of
the vocabulary spans two words; comments and lines of nothing but strings are dropped, strings become `"s"`, a level of
indentation is one space.
"""

from __future__ import annotations

import ast
import io
import keyword
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.from_scratch import new, trained_tokenizer
from intaglio.data.python_source import STANDARD_LIBRARY
from intaglio.data.segments import Segments
from intaglio.data.texts import Corpus
from intaglio.evidence.testbeds.cached_models import pretraining_recipe, trained_model
from intaglio.evidence.testbeds.source_code import TOY, SourceCode
from intaglio.evidence.testbeds.splits import Part, Sized, draw, random_windows, token_stream

ROLES = ("attribute", "call", "definition", "import", "keyword", "load", "parameter", "store")
"""Attribute that is not called; function of a call; name of a function or class; name in an import; keyword of an
argument; name that is read; parameter of a function; name that is assigned. Other names (in `global`, `except ... as`,
`del` ...) have no label: there are too few."""
STRING = '"s"'
PASSAGE = 256
"""Most characters of a passage; whole lines, at least one."""
_DECIDES = ("packages", "vocabulary", "width", "depth", "context", "steps", "batch")


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


def passages(file: list[Line]) -> Iterator[dict[str, Any]]:
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


@dataclass(frozen=True)
class IdentifierRoles(Sized):
    """Source, size of the model, and its training as a causal language model."""

    packages: tuple[str, ...] = (STANDARD_LIBRARY,)
    folder: str = ""
    vocabulary: int = 1024
    width: int = 128
    depth: int = 4
    context: int = 128
    steps: int = 800
    batch: int = 8
    learning_rate: float = 3e-3
    MINIATURE: ClassVar = {"packages": (TOY,), "folder": "", "vocabulary": 280, "width": 16, "depth": 4, "context": 64,
                           "steps": 4, "batch": 4}  # fmt: skip

    @property
    def source(self) -> SourceCode:
        """The files and their sets."""
        return SourceCode(packages=self.packages, folder=self.folder)

    def examples(self, part: Part, count: int, seed: int) -> list[dict[str, Any]]:
        """Return random passages of a set, each with at least one labelled identifier."""
        every = _passages(self.source, part)
        names = [str(number) for number in range(len(every))]
        return [every[index] for index in draw(f"roles {part}:{seed}", names, count, f"passages of {part} files")]

    def tokenizer(self) -> Any:
        """Return the tokenizer, trained on the training files."""
        return _tokenizer(self.source, self.vocabulary, self.context)

    def training(self, seed: int) -> Segments:
        """Return the windows of a training."""
        stream_S = _stream(self.source, self.vocabulary, self.context)
        return random_windows(f"roles train:{seed}", stream_S, self.steps * self.batch, self.context)

    def new(self, seed: int) -> Checkpoint:
        """Return an untrained model of the test bed's size."""
        sizes = {"width": self.width, "depth": self.depth, "context": self.context}
        return new("llama", seed=seed, tokenizer=self.tokenizer(), **sizes)

    def trained(self, seed: int = 0) -> Checkpoint:
        """Return the trained model; see `trained_model`."""
        return trained_model(
            "identifier_roles",
            {"seed": seed, "data": self.source.digest, "settings": self.settings(*_DECIDES)},
            lambda: self.new(seed),
            lambda: self.training(seed),
            pretraining_recipe(self.steps, self.batch, self.learning_rate, seed),
        )


@lru_cache(maxsize=16)
def _lines(source: SourceCode, part: Part) -> tuple[tuple[Line, ...], ...]:
    files = []
    for text in source.part(part).documents:
        try:
            files.append(tuple(lines(text)))
        except SyntaxError:
            continue  # templates that are no Python of this version
    return tuple(files)


@lru_cache(maxsize=16)
def _passages(source: SourceCode, part: Part) -> tuple[dict[str, Any], ...]:
    every = (passage for file in _lines(source, part) for passage in passages(list(file)))
    return tuple(passage for passage in every if any(label is not None for label in passage["labels"]))


@lru_cache(maxsize=2)
def _texts(source: SourceCode) -> tuple[str, ...]:
    texts = ("".join(line.text for line in file) for file in _lines(source, "train"))
    return tuple(text for text in texts if text)


@lru_cache(maxsize=2)
def _tokenizer(source: SourceCode, vocabulary: int, context: int) -> Any:
    return trained_tokenizer(Corpus("Python source with spaces", _texts(source)), vocabulary, context)


@lru_cache(maxsize=2)
def _stream(source: SourceCode, vocabulary: int, context: int) -> np.ndarray:
    return token_stream(_tokenizer(source, vocabulary, context), _texts(source))
