"""Names in real Python source, labelled with the roles that they play, and a small Llama that was trained on such text.

The roles come from the syntax tree, so they are exact; many are decided by the token behind the name (`x =` against
`x(` against `x.`). Files are those of the standard library, sealed by their hash as in `source_code`. A file is written
anew with a space between any two tokens, so that no token of the vocabulary reaches into two words; comments and lines
of nothing but strings are left out, strings are written `"s"`, a level of indentation is one space.

    world = Roles()
    examples = world.examples("train", 640, seed)      # passages of a few lines with their labelled names
    checkpoint = world.trained()

Dimension letters: N windows, T tokens of a window, S tokens of all training files.
"""

from __future__ import annotations

import ast
import io
import keyword
import tokenize
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.from_scratch import new, trained_tokenizer
from intaglio.data.segments import Segments
from intaglio.data.texts import Corpus
from intaglio.errors import IntaglioError
from intaglio.evidence.worlds.sealing import Part, draw, keyed
from intaglio.evidence.worlds.source_code import SourceCode
from intaglio.evidence.worlds.trained import trained
from intaglio.methods.base import Progress, no_progress

ROLES = ("attribute", "call", "definition", "import", "keyword", "load", "parameter", "store")
"""Attribute that is not called; function of a call (a name or an attribute); name of a function or class; name in an
import; keyword of an argument; name that is read; parameter of a function; name that is set. Other names (in `global`,
`except ... as`, `del` ...) have no label: there are too few."""
STRING = '"s"'
PASSAGE = 256
"""Characters of a passage; whole lines, at least one."""
_CODE = ("intaglio.data.python_source", "intaglio.evidence.worlds.source_code", "intaglio.evidence.worlds.roles")
_DECIDES = ("vocabulary", "width", "depth", "context", "steps", "batch")


@dataclass(frozen=True)
class Line:
    """One logical line of a file, written anew.

    Args:
        text: begins with a line break, its indentation and a space.
        names: `(start, end, role)` of its names, in characters; None for a name without a label.
    """

    text: str
    names: tuple[tuple[int, int, str | None], ...]


def _positions(tree: ast.AST) -> dict[tuple[int, int], str]:
    """The role at `(line, column in bytes)` of every name that the syntax tree tells it of."""
    found: dict[tuple[int, int], str] = {}
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            role = "call" if id(node) in called else {ast.Store: "store", ast.Load: "load"}.get(type(node.ctx))
            if role is not None:
                found[node.lineno, node.col_offset] = role
        elif isinstance(node, ast.Attribute) and node.end_lineno is not None and node.end_col_offset is not None:
            place = node.end_lineno, node.end_col_offset - len(node.attr.encode())
            found[place] = "call" if id(node) in called else "attribute"
        elif isinstance(node, ast.keyword) and node.arg is not None:
            found[node.lineno, node.col_offset] = "keyword"
        elif isinstance(node, ast.arg):
            found[node.lineno, node.col_offset] = "parameter"
    return found


def lines(source: str) -> Iterator[Line]:
    """Yield the logical lines of a file with their labelled names.

    Args:
        source: Python that this interpreter can parse.

    Raises:
        SyntaxError: it cannot.
    """
    tree = ast.parse(source)
    positions = _positions(tree)
    imports = {
        line
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    level, words, strings = 0, list[tuple[str, str | None]](), 0
    before = ""
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
            words, before = [], ""
        elif kind == "STRING" or (kind == "FSTRING_START" and not inside):
            words.append((STRING, None))
        elif kind in ("NAME", "OP", "NUMBER") and not inside:
            role = None
            if kind == "NAME" and not keyword.iskeyword(token.string):
                column = len(token.line[: token.start[1]].encode())
                role = positions.get((token.start[0], column), "")
                role = "definition" if before in ("def", "class") else role
                role = "import" if not role and token.start[0] in imports else role
            words.append((token.string, role))
            before = token.string


def _line(level: int, words: list[tuple[str, str | None]]) -> Line:
    text, names = "\n" + " " * level, []
    for word, role in words:
        if role is not None:
            names.append((len(text) + 1, len(text) + 1 + len(word), role or None))
        text += f" {word}"
    return Line(text, tuple(names))


def passages(found: list[Line]) -> Iterator[dict[str, Any]]:
    """Yield lines as examples for labelling: as many whole lines as have at most 256 characters.

    Args:
        found: lines of a file.
    """
    text, names = "", list[tuple[int, int, str | None]]()
    for line in found:
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
class Roles:
    """The world: which source, a model's size, and how it is trained as a causal language model.

    Args:
        folder: source below this directory in place of the standard library; tests put a small one here. Default "".
        vocabulary: entries of the byte-level BPE that is trained on the training files. Default 1024.
        width: of the model. Default 128.
        depth: layers. Default 4.
        context: tokens of a training window, and the longest input. Default 128.
        steps: of training. Default 800.
        batch: windows of a step. Default 8.
        learning_rate: at its highest. Default 3e-3.
    """

    folder: str = ""
    vocabulary: int = 1024
    width: int = 128
    depth: int = 4
    context: int = 128
    steps: int = 800
    batch: int = 8
    learning_rate: float = 3e-3

    @property
    def source(self) -> SourceCode:
        """The files, and how they are sealed."""
        return SourceCode(folder=self.folder)

    def examples(self, part: Part, count: int, seed: int) -> list[dict[str, Any]]:
        """Passages with labelled names, at random out of the files of a sealed set.

        Args:
            part: which.
            count: passages with at least one labelled name.
            seed: decides which.

        Raises:
            IntaglioError: there are fewer.
        """
        every = _passages(self.folder, part)
        names = [str(number) for number in range(len(every))]
        return [every[place] for place in draw(f"roles {part}:{seed}", names, count, f"passages of {part} files")]

    def tokenizer(self) -> Any:
        """The vocabulary, trained on the training files."""
        return _tokenizer(self.folder, self.vocabulary, self.context)

    def training(self, seed: int) -> Segments:
        """The windows of a whole training, cut at random out of all training files in a row.

        Args:
            seed: decides their places.
        """
        stream_S = _stream(self.folder, self.vocabulary, self.context)
        starts = len(stream_S) - self.context + 1
        if starts < 1:
            raise IntaglioError(f"the training files have {len(stream_S)} tokens; a window of {self.context} is needed")
        places_N = np.array([keyed(f"roles train:{seed}", str(n)) % starts for n in range(self.steps * self.batch)])
        windows_NT = np.lib.stride_tricks.sliding_window_view(stream_S, self.context)[places_N]
        return Segments.of(torch.from_numpy(windows_NT.astype(np.int64)))

    def new(self, seed: int) -> Checkpoint:
        """A model of the world's size with random weights.

        Args:
            seed: of the weights.
        """
        sizes = {"width": self.width, "depth": self.depth, "context": self.context}
        return new("llama", seed=seed, tokenizer=self.tokenizer(), **sizes)

    def trained(self, seed: int = 0, progress: Progress = no_progress) -> Checkpoint:
        """The trained model, found again in the user's cache; one object a process: copy it before it is changed.

        Args:
            seed: of weights and windows. Default 0.
            progress: called after each step of a training.
        """
        settings = asdict(self)
        recipe = {
            "steps": self.steps,
            "batch_size": self.batch,
            "learning_rate": self.learning_rate,
            "final_share": 0.1,
            "betas": (0.9, 0.95),
            "weight_decay": 0.1,
            "seed": seed,
        }
        return trained(
            "roles",
            {"seed": seed, "data": self.source.digest, "settings": {name: settings[name] for name in _DECIDES}},
            lambda: self.new(seed),
            lambda: self.training(seed),
            recipe,
            _CODE,
            progress,
        )


@lru_cache(maxsize=16)
def _lines(folder: str, part: Part) -> tuple[tuple[Line, ...], ...]:
    found = []
    for text in SourceCode(folder=folder).part(part).documents:
        try:
            found.append(tuple(lines(text)))
        except SyntaxError:
            continue  # templates that are no Python of this version
    return tuple(found)


@lru_cache(maxsize=16)
def _passages(folder: str, part: Part) -> tuple[dict[str, Any], ...]:
    every = (passage for file in _lines(folder, part) for passage in passages(list(file)))
    return tuple(passage for passage in every if any(label is not None for label in passage["labels"]))


def _texts(folder: str) -> Corpus:
    files = ("".join(line.text for line in file) for file in _lines(folder, "train"))
    return Corpus("Python source with spaces", tuple(text for text in files if text))


@lru_cache(maxsize=2)
def _tokenizer(folder: str, vocabulary: int, context: int) -> Any:
    return trained_tokenizer(_texts(folder), vocabulary, context)


@lru_cache(maxsize=2)
def _stream(folder: str, vocabulary: int, context: int) -> np.ndarray:
    """All training files in a row, each with the end-of-text token behind it, uint16 [S]."""
    tokenizer = _tokenizer(folder, vocabulary, context)
    pieces: list[int] = []
    for text in _texts(folder).documents:
        pieces += [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id]
    return np.array(pieces, dtype=np.uint16)
