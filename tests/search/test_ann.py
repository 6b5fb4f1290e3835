"""Approximate search by indexes beside the segments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intaglio.errors import IntaglioError
from intaglio.search import Index, ann
from intaglio.search.evaluate import evaluate, table
from intaglio.search.judgements import Judged
from intaglio.search.lexical import Postings
from tests.search.fakes import BagOfWords

WORDS = [f"w{number}" for number in range(40)]
KINDS = [
    pytest.param("dense", marks=pytest.mark.skipif(find_spec("usearch") is None, reason="usearch is not installed")),
    pytest.param("sparse", marks=pytest.mark.skipif(find_spec("seismic") is None, reason="seismic is not installed")),
]


@pytest.fixture(params=KINDS)
def index(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    monkeypatch.setattr(ann, "MIN_ROWS", 200)
    rng = np.random.default_rng(0)
    with Index.create(tmp_path / "index", kind=request.param, encoder=BagOfWords(request.param)) as result:
        result.add({"id": str(i), "text": " ".join(rng.choice(WORDS, 8)), "half": i % 2} for i in range(300))
        assert result.compact(approximate=True)["approximate"] == 1
        yield result


def dense_vectors(rng: np.random.Generator) -> tuple[dict[str, Any], list[Any]]:
    vectors = rng.standard_normal((3020, 16), np.float32)
    return {"dense.vectors": vectors[:3000]}, list(vectors[3000:])


def sparse_vectors(rng: np.random.Generator) -> tuple[dict[str, Any], list[Any]]:
    terms = [np.sort(rng.choice(60, 8 if row else 0, replace=False)) for row in range(3000)]
    ptr, flat = np.cumsum([0, *map(len, terms)]), np.concatenate(terms)
    postings = Postings.from_vectors(ptr, 7 * flat, rng.exponential(1, len(flat)).astype(np.float32))
    queries = [{7 * int(term): rng.exponential() for term in rng.choice(70, 6, replace=False)} for _ in range(20)]
    return {"chunks": np.arange(3000), **postings.arrays("sparse")}, queries


@pytest.mark.parametrize(
    ("kind", "draw"), [pytest.param(*KINDS[0].values, dense_vectors, marks=KINDS[0].marks),
                       pytest.param(*KINDS[1].values, sparse_vectors, marks=KINDS[1].marks)],
)  # fmt: skip
def test_an_approximate_index_returns_nearly_the_results_of_exact_search_with_exact_scores(
    kind: str, draw: Callable[[np.random.Generator], tuple[dict[str, Any], list[Any]]], tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rng = np.random.default_rng(0)
    arrays, queries = draw(rng)
    file = tmp_path / "1.ann"
    ann.build(arrays, file)
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == [file]
    rows = ann.load(arrays, file)
    mask = (rng.random(3000) < 0.6).astype(np.uint8)
    for own in (None, mask):
        exact = [rows.exact(query, 10, own) for query in queries]
        close = ann.search([rows], [own], queries, 10)
        shared = np.mean([len(set(e[1]) & set(c[1])) / 10 for e, c in zip(exact, close, strict=True)])
        assert shared > 0.9
        assert all(own is None or own[found].all() for _, found in close)
        for query, (scores, found) in zip(queries, close, strict=True):
            assert scores == pytest.approx(rows.scores(query, found), abs=1e-5)
        for query, (scores, found) in zip(queries, exact, strict=True):
            assert scores == pytest.approx(rows.scores(query, found), abs=1e-5)


def test_an_index_is_searched_approximately_and_exactly_in_new_segments(index: Index) -> None:
    assert index.info()["approximate"] == 1
    exact = {hit.id for hit in index.search("w1 w2 w3", 20)}
    close = {hit.id for hit in index.search("w1 w2 w3", 20, approximate=True)}
    assert len(exact & close) >= 16
    index.add([{"id": "new", "text": "w1 w2 w3 w1 w2 w3"}])
    assert "new" in {hit.id for hit in index.search("w1 w2 w3", 3, approximate=True)}
    index.delete(["new"])
    hits = index.search("w1 w2 w3", 20, approximate=True, filters={"half": 1})
    assert len(hits) == 20
    assert {hit.metadata["half"] for hit in hits} == {1}


def test_an_approximate_index_leaves_with_its_segment(index: Index) -> None:
    (file,) = index.path.glob("segments/*.ann")
    index.delete(["0"])
    assert file.exists()
    index.compact()
    assert not list(index.path.glob("segments/*.ann"))


def test_a_truncated_approximate_index_is_named_and_exact_search_remains(index: Index) -> None:
    (file,) = index.path.glob("segments/*.ann")
    file.write_bytes(file.read_bytes()[:100])
    assert index.search("w1 w2 w3", 5)
    with Index.open(index.path, encoder=BagOfWords(index.kind)) as opened:
        with pytest.raises(IntaglioError, match=r"\.ann cannot be read; delete it"):
            opened.search("w1 w2 w3", 5, approximate=True)
        assert opened.search("w1 w2 w3", 5)


def test_evaluation_measures_the_recall_of_exact_search(index: Index) -> None:
    judged = Judged({"q": "w1 w2 w3"}, {"q": {"0": 1}})
    result = evaluate(index, judged, 10, approximate=True)
    assert 0.7 <= result["approximate"]["recall"] <= 1
    assert f"{result['approximate']['recall']:.3f} of exact search's results" in str(table([result]).caption)
    assert evaluate(index, judged, 10)["approximate"] is None


def test_approximate_search_is_of_vectors(tmp_path: Path) -> None:
    with Index.create(tmp_path / "index") as index:
        index.add([{"id": "a", "text": "mask"}])
        with pytest.raises(IntaglioError, match="approximate indexes are of dense or sparse vectors"):
            index.compact(approximate=True)
        with pytest.raises(IntaglioError, match="approximate search is of dense or sparse vectors"):
            index.search("mask", approximate=True)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_a_missing_package_is_one_sentence(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ann, "find_spec", lambda name: None)
    with pytest.raises(IntaglioError, match=r"needs \w+: pip install 'intaglio\[(ann|seismic)\]'"):
        ann.check_installed(kind)
