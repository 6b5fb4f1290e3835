"""Training data of text encoders: a query, its relevant text, and texts that are not relevant."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from intaglio.data.docstrings import Pair, pairs
from intaglio.data.json_lines import json_lines
from intaglio.data.labelled_texts import LabelledTexts, load_labelled_texts
from intaglio.data.python_source import source_files
from intaglio.errors import IntaglioError, shorten

QUERIES, POSITIVES, NEGATIVES = ("query", "anchor"), ("positive", "document"), ("negatives", "negative")
"""Accepted names of the parts."""
LABELS = ("task", "instruction")
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
        task: name of the task that the pair belongs to, for batches of one task. Default: none.
        instruction: what is searched for, before the query, for methods with instructions. Default: the method's.
        symmetric: whether the texts get the instruction too; with an instruction only. Default False.
    """

    query: str
    positive: str
    negatives: tuple[str, ...] = ()
    scores: tuple[float, ...] | None = None
    task: str | None = None
    instruction: str | None = None
    symmetric: bool = False

    def row(self) -> dict[str, Any]:
        """Return the pair as plain data, which `as_pair` reads."""
        scores = {} if self.scores is None else {"scores": list(self.scores)}
        labels = {"task": self.task, "instruction": self.instruction, "symmetric": self.symmetric or None}
        given = {name: value for name, value in labels.items() if value is not None}
        return {"query": self.query, "positive": self.positive, "negatives": list(self.negatives), **scores, **given}


def as_pair(value: Any, what: str) -> TextPair:
    """Return a pair from a mapping; `what` names it in error messages.

    Raises:
        IntaglioError: a part is missing, empty or of another type, or the scores do not fit the texts.
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
    task, instruction = (None if value.get(key) is None else _text(value[key], f"{what}: its {key}") for key in LABELS)
    symmetric = value.get("symmetric", False)
    if not isinstance(symmetric, bool) or (symmetric and instruction is None):
        raise IntaglioError(
            f"{what}: its symmetric is {shorten(repr(symmetric))}; true is accepted with an instruction, or false"
        )
    scores = _scores(value.get("scores"), len(negatives), what)
    return TextPair(parts[0], parts[1], negatives, scores, task, instruction, symmetric)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise IntaglioError(f"{what} is {shorten(repr(value))}; only a string is accepted")
    if not value.strip():
        raise IntaglioError(f"{what} is empty; text is needed")
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
            text or a list), a teacher's `scores`, and `task`, `instruction` and `symmetric`. The name `docstrings`
            stands for summaries and the rest of docstrings of Python's standard library. A file whose lines have
            `text` and `label` instead gives `class_pairs`.

    Raises:
        IntaglioError: the file cannot be read or is empty, or a line is malformed (it is named).
    """
    if os.fspath(path) == DOCSTRINGS:
        return [TextPair(pair.query, pair.document) for pair in _docstrings()]
    rows = list(json_lines(path, "pairs", "query and positive"))
    if isinstance(rows[0][1], Mapping) and "label" in rows[0][1]:
        return class_pairs(load_labelled_texts(path))
    return [as_pair(value, place) for place, value in rows]


def class_pairs(labelled: LabelledTexts, negatives: int = 7, seed: int = 0) -> list[TextPair]:
    """Return each text as the query of another text of its class, with texts of other classes as negatives.

    A text that is alone in its class is left out. Within a batch other texts of the class are negatives too, so give
    such pairs a small batch or many classes.

    Args:
        labelled: the texts and their classes.
        negatives: most negatives of a pair. Default 7, as in KaLM-Embedding-V2 (Zhao et al., 2025, arXiv 2506.20923).
        seed: of the draws. Default 0.

    Raises:
        IntaglioError: there is one class, or none has two texts.
    """
    members: dict[str, list[str]] = {}
    for text, label in zip(labelled.texts, labelled.labels, strict=True):
        if text not in members.setdefault(label, []):
            members[label].append(text)
    every = [(label, text) for label, texts in members.items() for text in texts]
    pairs = []
    for number, (label, text) in enumerate(every):
        draws = random.Random(f"{seed}:{number}")
        others = [other for other in members[label] if other != text]
        unlike = [other for another, other in every if another != label and other not in members[label]]
        if others and unlike:
            drawn = draws.sample(unlike, min(negatives, len(unlike)))
            pairs.append(TextPair(text, draws.choice(others), tuple(drawn)))
    if not pairs:
        raise IntaglioError(
            f"the {labelled.name} of labelled texts give no pairs; two classes are needed, and two texts in one of them"
        )
    return pairs


def _docstrings() -> list[Pair]:
    """Return the standard library's pairs, without equal queries or documents, in the order of their hashes."""
    queries: dict[str, Pair] = {}
    documents: set[str] = set()
    for pair in sorted(pairs(source_files(), "text"), key=lambda pair: pair.id):
        if pair.query not in queries and pair.document not in documents:
            queries[pair.query] = pair
        documents.add(pair.document)
    return list(queries.values())
