"""Approximate search by graphs beside the segments."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from intaglio.errors import IntaglioError
from intaglio.search import Index, ann, dense
from intaglio.search.evaluate import Judged, evaluate, table
from tests.search.fakes import BagOfWords

WORDS = [f"w{number}" for number in range(40)]


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    monkeypatch.setattr(ann, "MIN_ROWS", 200)
    rng = np.random.default_rng(0)
    with Index.create(tmp_path / "index", kind="dense", encoder=BagOfWords()) as result:
        result.add({"id": str(i), "text": " ".join(rng.choice(WORDS, 8)), "half": i % 2} for i in range(300))
        result.compact(graphs=True)
        yield result


def test_a_graph_returns_nearly_the_results_of_exact_search_with_exact_scores(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((3000, 16), np.float32)
    file = tmp_path / "graph.usearch"
    ann.build(vectors, file)
    mask = (rng.random(3000) < 0.6).astype(np.uint8)
    queries = rng.standard_normal((20, 16), np.float32)
    for own in (None, mask):
        exact = dense.search([vectors], [own], queries, 10)
        close = ann.search([(vectors, ann.load(file))], [own], queries, 10)
        shared = np.mean([len(set(e[1]) & set(c[1])) / 10 for e, c in zip(exact, close, strict=True)])
        assert shared > 0.9
        assert all(own is None or own[rows].all() for _, rows in close)
        for query, (scores, rows) in zip(queries, close, strict=True):
            assert scores == pytest.approx(vectors[rows] @ query, abs=1e-5)


def test_an_index_is_searched_by_its_graph_and_by_exact_products_of_new_segments(index: Index) -> None:
    assert index.info()["graphs"] == 1
    exact = {hit.id for hit in index.search("w1 w2 w3", 20)}
    close = {hit.id for hit in index.search("w1 w2 w3", 20, approximate=True)}
    assert len(exact & close) >= 16
    index.add([{"id": "new", "text": "w1 w2 w3"}])
    assert index.search("w1 w2 w3", 1, approximate=True)[0].id == "new"
    index.delete(["new"])
    hits = index.search("w1 w2 w3", 20, approximate=True, filters={"half": 1})
    assert len(hits) == 20
    assert {hit.metadata["half"] for hit in hits} == {1}


def test_graphs_leave_with_their_segments(index: Index) -> None:
    (graph,) = index.path.glob("segments/*.usearch")
    index.delete(["0"])
    assert graph.exists()
    index.compact()
    assert not list(index.path.glob("segments/*.usearch"))


def test_evaluation_measures_the_recall_of_exact_search(index: Index) -> None:
    judged = Judged({"q": "w1 w2 w3"}, {"q": {"0": 1}})
    result = evaluate(index, judged, 10, approximate=True)
    assert 0.7 <= result["approximate"]["recall"] <= 1
    assert f"{result['approximate']['recall']:.3f} of exact search's results" in str(table([result]).caption)
    assert evaluate(index, judged, 10)["approximate"] is None


def test_graphs_are_of_dense_vectors(tmp_path: Path) -> None:
    with Index.create(tmp_path / "index") as index:
        index.add([{"id": "a", "text": "mask"}])
        with pytest.raises(IntaglioError, match="graphs are of dense vectors"):
            index.compact(graphs=True)
        with pytest.raises(IntaglioError, match="approximate search is of dense vectors"):
            index.search("mask", approximate=True)
