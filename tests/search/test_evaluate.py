"""Metrics of indexes on judged queries, and the report."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from intaglio.report import svg
from intaglio.search import Document, Index
from intaglio.search.evaluate import METRICS, cells, evaluate, plots, report_page, table
from intaglio.search.judgements import Judged

TEXTS = {"a": "apple banana cherry", "b": "banana", "c": "cherry durian", "d": "elder fig"}


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with Index.create(tmp_path / "fruit", kind="bm25") as made:
        made.add(Document(id, text) for id, text in TEXTS.items())
        yield made


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
