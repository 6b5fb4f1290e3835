"""Texts with a class each: files of one JSON object a line with `text` and `label`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intaglio.data import assets
from intaglio.data.json_lines import json_lines
from intaglio.errors import IntaglioError, shorten

NEEDED = "text and label, both strings"


@dataclass(frozen=True)
class LabelledTexts:
    """Texts and the class of each, in order.

    `name` is their origin, for messages; `index` the name of each text, where the examples have one.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    name: str = "list of examples"
    index: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.texts)

    @property
    def classes(self) -> tuple[str, ...]:
        """The different labels, sorted."""
        return tuple(sorted(set(self.labels)))


def load_labelled_texts(source: str | os.PathLike[str] | Iterable[Mapping[str, Any]] | LabelledTexts) -> LabelledTexts:
    """Return texts with their classes.

    Args:
        source: `newsgroups` (its training texts), a file of one JSON object a line with `text` and `label`
            (perhaps `index`, the text's own name), such objects themselves, or `LabelledTexts`, returned unchanged.

    Raises:
        IntaglioError: the file cannot be read, a line or an object is malformed (it is named), or there is none.
    """
    if isinstance(source, LabelledTexts):
        return source
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        bundled = name in assets.ASSETS and assets.find(name).kind == "labelled texts"
        path = assets.path(name) / "train.jsonl" if bundled else Path(name).expanduser()
        rows: Iterable[tuple[str, Any]] = json_lines(path, "labelled texts", NEEDED)
    else:
        name, rows = "list of examples", ((f"example {number}", item) for number, item in enumerate(source))
    texts: list[Any] = []
    labels: list[Any] = []
    index: list[str] = []
    for place, value in rows:
        fields = [value.get(field) if isinstance(value, Mapping) else None for field in ("text", "label")]
        if not all(isinstance(field, str) and field.strip() for field in fields):
            raise IntaglioError(f"{place} is {shorten(json.dumps(value, default=repr))}; it needs {NEEDED}")
        texts.append(fields[0])
        labels.append(fields[1])
        index.append(str(value.get("index", len(index))))
    if not texts:
        raise IntaglioError(f"the {name} of labelled texts is empty; objects with {NEEDED} are needed")
    return LabelledTexts(tuple(texts), tuple(labels), name, tuple(index))
