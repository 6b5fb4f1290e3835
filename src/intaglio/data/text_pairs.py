"""Training data of text encoders: a query, its relevant text, and texts that are not relevant."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from intaglio.data.docstrings import Pair, pairs
from intaglio.data.json_lines import json_lines
from intaglio.data.python_source import source_files
from intaglio.errors import IntaglioError, shorten

QUERIES, POSITIVES, NEGATIVES = ("query", "anchor"), ("positive", "document"), ("negatives", "negative")
"""Accepted names of the parts."""
DOCSTRINGS = "docstrings"
"""The bundled pairs, by name."""


@dataclass(frozen=True)
class TextPair:
    """A query with its relevant text.

    Args:
        query: the query.
        positive: the relevant text.
        negatives: texts that are not relevant. Default: none.
        scores: a teacher's scores of the positive and of each negative. Default: none.
    """

    query: str
    positive: str
    negatives: tuple[str, ...] = ()
    scores: tuple[float, ...] | None = None

    def row(self) -> dict[str, Any]:
        """Return the pair as plain data, which `as_pair` reads."""
        scores = {} if self.scores is None else {"scores": list(self.scores)}
        return {"query": self.query, "positive": self.positive, "negatives": list(self.negatives), **scores}


def as_pair(value: Any, what: str) -> TextPair:
    """Return a pair from a mapping; `what` names it in error messages.

    Raises:
        IntaglioError: a part is missing, empty or not text, or the scores do not fit the texts.
    """
    if not isinstance(value, Mapping):
        raise IntaglioError(f"{what} is {shorten(repr(value))}; an object with query and positive is accepted")
    parts = []
    for names in (QUERIES, POSITIVES):
        name = next((name for name in names if name in value), None)
        if name is None:
            known = ", ".join(sorted(str(key) for key in value if key != "id")) or "nothing"
            raise IntaglioError(f"{what} has no {names[0]} (nor {names[1]}); it has: {known}")
        parts.append(_text(value[name], f"{what}: its {name}"))
    name = next((name for name in NEGATIVES if value.get(name) is not None), NEGATIVES[0])
    given = [] if value.get(name) is None else value[name]
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, (list, tuple)):
        raise IntaglioError(f"{what}: its {name} is {shorten(repr(given))}; a text or a list of texts is accepted")
    negatives = tuple(_text(text, f"{what}: one of its {name}") for text in given)
    return TextPair(parts[0], parts[1], negatives, _scores(value.get("scores"), len(negatives), what))


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise IntaglioError(f"{what} is {shorten(repr(value))}; only a string is accepted")
    if not value.strip():
        raise IntaglioError(f"{what} is empty; both sides of a pair need text")
    return value


def _scores(value: Any, negatives: int, what: str) -> tuple[float, ...] | None:
    if value is None:
        return None
    numbers = isinstance(value, (list, tuple)) and all(
        isinstance(score, (int, float)) and not isinstance(score, bool) for score in value
    )
    if not numbers or len(value) != negatives + 1:
        raise IntaglioError(
            f"{what}: its scores are {shorten(repr(value))}; {negatives + 1} numbers are accepted, of the positive"
            " and of each negative"
        )
    return tuple(float(score) for score in value)


def load_text_pairs(path: str | os.PathLike[str]) -> list[TextPair]:
    """Return the pairs of a file with one JSON object a line.

    Args:
        path: each line has `query` (or `anchor`) and `positive` (or `document`), perhaps `negatives` (or `negative`, a
            text or a list), and a teacher's `scores`. The name `docstrings` stands for summaries and the rest of
            docstrings of Python's standard library.

    Raises:
        IntaglioError: the file cannot be read or is empty, or a line is malformed (it is named).
    """
    if os.fspath(path) == DOCSTRINGS:
        return [TextPair(pair.query, pair.document) for pair in _docstrings()]
    return [as_pair(value, place) for place, value in json_lines(path, "pairs", "query and positive")]


def _docstrings() -> list[Pair]:
    """Return the standard library's pairs, without equal queries or documents, in the order of their hashes."""
    queries: dict[str, Pair] = {}
    documents: set[str] = set()
    for pair in sorted(pairs(source_files(), "text"), key=lambda pair: pair.id):
        if pair.query not in queries and pair.document not in documents:
            queries[pair.query] = pair
        documents.add(pair.document)
    return list(queries.values())
