"""Relevance judgements read from files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from intaglio.errors import IntaglioError
from intaglio.search.judgements import Judged, read_pairs, read_qrels


def write(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_pairs(tmp_path: Path) -> None:
    lines = [{"query": "x y", "document": "a"}, {"query": "z", "document": ["b", 7]}, {"query": "x y", "document": "c"}]
    path = write(tmp_path, "pairs.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    judged = read_pairs(path)
    assert judged == Judged({"0": "x y", "1": "z"}, {"0": {"a": 1, "c": 1}, "1": {"b": 1, "7": 1}})
    table = write(tmp_path, "pairs.csv", 'document,query,note\na,"x, y",\nb,z,n\n')
    assert read_pairs(table) == Judged({"0": "x, y", "1": "z"}, {"0": {"a": 1}, "1": {"b": 1}})


@pytest.mark.parametrize("name", ["queries.jsonl", "queries.tsv"])
def test_qrels(tmp_path: Path, name: str) -> None:
    qrels = write(tmp_path, "qrels", "1 0 a 1\n1 0 b 0\n2\tQ0\tc\t2\n")
    rows = {"1": "first words", "2": "second", "3": "not judged"}
    text = "".join(
        json.dumps({"_id": id, "text": query}) + "\n" if name.endswith("jsonl") else f"{id}\t{query}\n"
        for id, query in rows.items()
    )
    judged = read_qrels(qrels, write(tmp_path, name, text))
    assert judged == Judged({"1": "first words", "2": "second"}, {"1": {"a": 1, "b": 0}, "2": {"c": 2}})


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("p.jsonl", "{", "p.jsonl, line 1 is not JSON"),
        ("p.jsonl", '{"query": "x", "document": "a"}\n[1]', "p.jsonl, line 2 is not a JSON object"),
        ("p.jsonl", '{"query": "x"}', "line 1: a query and the id of its document are expected"),
        ("p.jsonl", '{"query": " ", "document": "a"}', "line 1: a query and the id of its document are expected"),
        ("p.jsonl", "", "p.jsonl names no relevant document"),
        ("p.csv", "query,id\nx,a\n", "p.csv has the columns query, id; query, document expected"),
        ("p.csv", "", "p.csv has the columns ; query, document expected"),
    ],
)
def test_malformed_pairs_are_refused(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    with pytest.raises(IntaglioError) as caught:
        read_pairs(write(tmp_path, name, text))
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("qrels", "queries", "sentence"),
    [
        ("1 a 1", "1\tx", "'1 a 1' is not a judgement; accepted: query-id 0 document-id grade"),
        ("1 0 a high", "1\tx", "is not a judgement"),
        ("1 0 a 1", "1 x", "line 1: accepted is an id, a tab and the query"),
        ("1 0 a 1", "2\tx", "has no query '1'"),
        ("1 0 a 0", "1\tx", "names no relevant document"),
    ],
)
def test_malformed_judgements_are_refused(tmp_path: Path, qrels: str, queries: str, sentence: str) -> None:
    with pytest.raises(IntaglioError) as caught:
        read_qrels(write(tmp_path, "qrels", qrels), write(tmp_path, "queries.tsv", queries))
    assert sentence in str(caught.value)


def test_files_that_are_not_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(IntaglioError, match="not UTF-8"):
        read_pairs(tmp_path / "p.jsonl")
    with pytest.raises(IntaglioError, match="cannot be read: No such file"):
        read_pairs(tmp_path / "absent.jsonl")
