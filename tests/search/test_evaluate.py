"""Metrics of indexes on judged queries, the files they are read from, and the report."""

from __future__ import annotations

import io
import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from intaglio.errors import IntaglioError
from intaglio.report import svg
from intaglio.search import Document, Index
from intaglio.search.evaluate import METRICS, Judged, cells, evaluate, plots, read_pairs, read_qrels, report_page, table

TEXTS = {"a": "apple banana cherry", "b": "banana", "c": "cherry durian", "d": "elder fig"}


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with Index.create(tmp_path / "fruit", kind="bm25") as made:
        made.add(Document(id, text) for id, text in TEXTS.items())
        yield made


def write(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def result(name: str = "fruit", **values: Any) -> dict[str, Any]:
    some = {"kind": "bm25", "encoder": None, "documents": 4, "queries": 2, "missing": 0, "milliseconds": 0.5}
    some |= {"milliseconds_95": 0.9, "bytes": 40_000, "bytes_text": 20_000}
    return {"index": name, **some, **dict.fromkeys(METRICS, 0.5), **values}


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_follow_from_ranks(index: Index) -> None:
    """For the query "banana" b is first (it is shorter) and a second; a query without hits counts as 0."""
    assert [hit.id for hit in index.search("banana")] == ["b", "a"]
    first = evaluate(index, Judged({"q": "banana"}, {"q": {"b": 1}}))
    second = evaluate(index, Judged({"q": "banana"}, {"q": {"a": 1}}))
    assert [first[metric] for metric in METRICS] == [1, 1, 1, 1]
    assert second["RR@10"] == 0.5
    assert second["nDCG@10"] == pytest.approx(0.6309, abs=1e-4)  # 1 / log2(3)
    both = evaluate(index, Judged({"q": "banana", "r": "zucchini"}, {"q": {"a": 1}, "r": {"b": 1}}))
    assert both["RR@10"] == 0.25
    assert both["R@100"] == 0.5


def test_grades_weigh_in_ndcg_and_zero_is_not_relevant(index: Index) -> None:
    graded = evaluate(index, Judged({"q": "banana"}, {"q": {"a": 2, "b": 0}}))
    assert graded["RR@10"] == 0.5
    ordered = evaluate(index, Judged({"q": "banana"}, {"q": {"a": 1, "b": 2}}))
    assert ordered["nDCG@10"] == 1


def test_cost_and_missing_documents_are_reported(index: Index) -> None:
    found = evaluate(index, Judged({"q": "cherry"}, {"q": {"c": 1, "nowhere": 1}}))
    assert found["missing"] == 1
    assert found["bytes"] == index.info()["bytes"]["total"]
    assert found["bytes_text"] == sum(len(text) for text in TEXTS.values())
    assert 0 < found["milliseconds"] <= found["milliseconds_95"]
    assert (found["index"], found["kind"], found["encoder"], found["documents"]) == ("fruit", "bm25", None, 4)


def test_an_index_is_opened_by_its_directory(index: Index) -> None:
    calls: list[tuple[int, int, str]] = []
    judged = Judged({"q": "fig"}, {"q": {"d": 1}})
    assert evaluate(index.path, judged, progress=lambda *call: calls.append(call))["RR@10"] == 1
    assert calls == [(1, 1, "evaluate: fruit")]


# --- files -----------------------------------------------------------------------------------------------------------


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


# --- table and report ------------------------------------------------------------------------------------------------


def test_the_table_fits_80_columns() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table([result("splade-tiny", missing=3), result("bm25")]))
    shown = console.export_text()
    assert "splade-tiny" in shown
    assert "MRR@10" in shown
    assert "3 relevant documents are not in an index" in " ".join(shown.split())
    assert "2.00" in shown  # bytes over the text's
    assert len(cells(result())) == 10


def test_the_report_escapes_names_and_has_two_plots() -> None:
    name = "<script>x</script>"
    results = [result(name), result("b", milliseconds=20.0, encoder="minilm", kind="dense")]
    page = report_page(results, [(name, {name: [name], "b": ["d1", "d2"]})])
    assert page.count("<svg") == 2
    assert "<script" not in page
    assert page.count("<td>d2</td>") == 1
    pictures = [ET.fromstring(picture) for picture in plots(results)]
    assert [len(picture.findall("circle")) for picture in pictures] == [2, 2]


def test_a_scatter_plot_orders_its_points() -> None:
    points = [svg.Point("cheap", 1.0, 0.2), svg.Point("dear", 100.0, 0.8)]
    root = ET.fromstring(svg.scatter("t", "d", points, x_axis="ms", y_axis="nDCG"))
    places = {
        (dot.findtext("title") or "").partition(":")[0]: (float(dot.attrib["cx"]), float(dot.attrib["cy"]))
        for dot in root.findall("circle")
    }
    assert places["cheap"][0] < places["dear"][0]
    assert places["cheap"][1] > places["dear"][1]
    same = ET.fromstring(svg.scatter("t", "d", [svg.Point("a", 5, 0.0)] * 3, x_axis="ms", y_axis="nDCG"))
    labels = [text.attrib["y"] for text in same.findall("text") if text.text == "a"]
    assert len(set(labels)) == 3
