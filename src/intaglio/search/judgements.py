"""Queries with relevance judgements, from pairs or from TREC's files."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intaglio.errors import IntaglioError, first_line, shorten

_COLUMNS = ("query", "document")


@dataclass(frozen=True)
class Judged:
    """Queries with relevance judgements.

    Args:
        queries: text by query id.
        relevant: grade by document id, by query id; a grade of 0 is "not relevant".
    """

    queries: dict[str, str]
    relevant: dict[str, dict[str, int]]


def read_pairs(path: str | os.PathLike[str]) -> Judged:
    """Read queries with the ids of their documents: JSON lines or a CSV with `query` and `document`.

    A `document` of JSON may be a list of ids; equal queries are one query with several documents.

    Raises:
        IntaglioError: a line is malformed, or there is none.
    """
    judged = Judged({}, {})
    ids: dict[str, str] = {}
    for number, row in _rows(Path(path)):
        query, documents = (row.get(column) for column in _COLUMNS)
        documents = [documents] if isinstance(documents, (str, int)) else documents
        if not (isinstance(query, str) and query.strip() and isinstance(documents, list) and documents):
            raise IntaglioError(f"{path}, line {number}: a query and the id of its document are expected")
        id = ids.setdefault(query, str(len(ids)))
        judged.queries[id] = query
        judged.relevant.setdefault(id, {}).update({str(document): 1 for document in documents})
    return _checked(judged, path)


def read_qrels(qrels: str | os.PathLike[str], queries: str | os.PathLike[str]) -> Judged:
    """Read relevance judgements in TREC format (query id, an ignored field, document id, grade) and their queries.

    Queries are JSON lines with `id` (or `_id`) and `text`, or lines of id, tab and text. Only judged queries are kept.

    Raises:
        IntaglioError: a line is malformed, or a judged query has no text.
    """
    relevant: dict[str, dict[str, int]] = {}
    for number, line in _lines(Path(qrels)):
        parts = line.split()
        if len(parts) != 4 or not parts[3].lstrip("-").isdecimal():
            raise IntaglioError(
                f"{qrels}, line {number}: {shorten(line)!r} is not a judgement; accepted: query-id 0 document-id grade"
            )
        relevant.setdefault(parts[0], {})[parts[2]] = int(parts[3])
    texts: dict[str, str] = {}
    if Path(queries).suffix == ".jsonl":
        for number, row in _rows(Path(queries)):
            id, text = row.get("id", row.get("_id")), row.get("text")
            if id is None or not isinstance(text, str):
                raise IntaglioError(f"{queries}, line {number}: a query has an id and a text")
            texts[str(id)] = text
    else:
        for number, line in _lines(Path(queries)):
            id, tab, text = line.partition("\t")
            if not (tab and text.strip()):
                raise IntaglioError(f"{queries}, line {number}: accepted is an id, a tab and the query")
            texts[id] = text.strip()
    missing = next((id for id in relevant if id not in texts), None)
    if missing is not None:
        raise IntaglioError(f"{queries} has no query {missing!r}, which {qrels} judges")
    return _checked(Judged({id: texts[id] for id in relevant}, relevant), qrels)


def _checked(judged: Judged, path: str | os.PathLike[str]) -> Judged:
    if not any(grade > 0 for grades in judged.relevant.values() for grade in grades.values()):
        raise IntaglioError(f"{path} names no relevant document")
    return judged


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank, with their numbers."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise IntaglioError(f"{path} is not UTF-8 text") from error
    except OSError as error:
        raise IntaglioError(f"{path} cannot be read: {error.strerror}") from error


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the records of JSON lines or of a CSV with a header, with their line numbers."""
    lines = _lines(path)
    if path.suffix == ".csv":
        reader = csv.DictReader(line for _, line in lines)
        if not set(_COLUMNS) <= set(reader.fieldnames or ()):
            raise IntaglioError(
                f"{path} has the columns {', '.join(reader.fieldnames or ())}; query, document expected"
            )
        yield from ((reader.line_num, row) for row in reader)
        return
    for number, line in lines:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise IntaglioError(f"{path}, line {number} is not JSON: {first_line(error)}") from error
        if not isinstance(row, dict):
            raise IntaglioError(f"{path}, line {number} is not a JSON object")
        yield number, row
