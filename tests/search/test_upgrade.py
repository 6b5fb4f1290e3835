"""Upgrade of an index to another encoder: compatible heads, pieces, resumption, chains, refusals."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intaglio.errors import IntaglioError
from intaglio.search import Index
from intaglio.search import upgrade as upgrade_module
from intaglio.search.encoders import CompatibleEncoder, describe_setting
from intaglio.search.judgements import Judged
from tests.search.fakes import BagOfWords

WORDS = ["mask", "weight", "bread", "flour", "key", "query", "token", "layer"]
WORDS += ["salt", "water", "head", "sun", "fox", "dog", "tree", "stone"]
DOCUMENTS = [
    {"id": f"d{n}", "text": f"{WORDS[n % 16]} {WORDS[(3 * n + 1) % 16]} {WORDS[(7 * n + n // 16) % 16]} n{n}"}
    for n in range(60)
]
JUDGED = Judged(
    {str(n): " ".join(DOCUMENTS[n]["text"].split()[:3]) for n in range(0, 60, 2)},
    {str(n): {f"d{n}": 1, "gone": 1} for n in range(0, 60, 2)},
)
OLD, NEW, NEWER = (
    BagOfWords(name="old", dimensions=24),
    BagOfWords(name="new", dimensions=32),
    BagOfWords(name="newer", dimensions=40),
)
FIELDS: dict[str, Any] = {"extra_dims": 4}


class Interrupted(Exception):
    """Raised by an encoder in the middle of an upgrade."""


class Stopping(BagOfWords):
    """The new encoder, which fails when it has encoded so many texts."""

    def __init__(self, after: int) -> None:
        super().__init__(name="new", dimensions=32)
        self.after = after

    def encode_documents(self, texts: Any) -> Any:
        if len(self.encoded) >= self.after:
            raise Interrupted
        return super().encode_documents(texts)


def make(path: Path, kind: str = "dense", encoder: BagOfWords = OLD, count: int = 60) -> Index:
    index = Index.create(path, kind=kind, encoder=encoder, chunk=0)  # type: ignore[arg-type]
    index.add(DOCUMENTS[:count])
    return index


def upgrade(index: Index, encoder: Any = NEW, **options: Any) -> dict[str, Any]:
    given = {"judged": JUDGED, "steps": 20, "fields": FIELDS, **options}
    return index.upgrade(encoder, **given)


def spaces(index: Index) -> list[int]:
    with index._view() as snapshot:
        return [segment.space for segment in snapshot.segments]


def found(index: Index) -> set[str]:
    return {hit.id for hit in index.search("mask bread fox", k=200)}


@pytest.fixture(autouse=True)
def _pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upgrade_module, "PIECE", 16)


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with make(tmp_path / "index") as made:
        yield made


@pytest.mark.parametrize("method", ["bt2", "bct", "bct_distill", "naive", "procrustes"])
def test_new_queries_search_old_vectors_at_once(index: Index, method: str) -> None:
    before = index._store.segments()
    fields = {"independent_weight": 0.5} if method == "procrustes" else FIELDS
    result = upgrade(index, method=method, reencode=False, fields=fields)
    assert index._store.segments() == before
    assert (result["method"], result["encoded"], result["left"]) == (method, 0, 60)
    assert found(index) == {document["id"] for document in DOCUMENTS}
    assert set(result["report"]["quality"]) == {"old/old", "new/old", "new/new", "re-embedded"}
    with Index.open(index.path, encoder=NEW) as again:
        assert isinstance(again._encoder(), CompatibleEncoder)
        (query,) = again._encoder().encode_queries(["mask bread"])  # type: ignore[union-attr]
        with again._view() as snapshot:
            old = np.concatenate([segment.arrays["dense.vectors"] for segment in snapshot.segments])
        scores = old @ (query[:24] / np.linalg.norm(query[:24]))
        hits = {hit.id: hit.score for hit in again.search("mask bread", k=60)}
        assert [hits[f"d{n}"] for n in range(60)] == pytest.approx(scores.tolist(), abs=1e-5)


def test_an_upgraded_index_is_that_of_the_new_encoder(index: Index) -> None:
    result = upgrade(index)
    assert (result["encoded"], result["left"]) == (60, 0)
    assert set(spaces(index)) == {1}
    encoder = index._encoder()
    assert encoder is not None
    assert encoder.dimensions == 32 + 4
    documents = np.asarray(encoder.encode_documents([d["text"] for d in DOCUMENTS]))
    scores = documents @ np.asarray(encoder.encode_queries(["stone dog"]))[0]
    hits = {hit.id: hit.score for hit in index.search("stone dog", k=60)}
    assert [hits[f"d{n}"] for n in range(60)] == pytest.approx(scores.tolist(), abs=1e-4)
    assert index.info()["version"] == 2
    assert index.info()["upgrade"]["state"] == "done"


def test_info_names_segments_of_both_kinds(tmp_path: Path) -> None:
    with make(tmp_path / "index") as index:
        with pytest.raises(Interrupted):
            upgrade(index, Stopping(60 + 20))
        info = index.info()
        old, new = (describe_setting(info["upgrade"][name]) for name in ("from", "to"))
        assert info["vectors"] == {new: {"segments": 2, "chunks": 32}, old: {"segments": 2, "chunks": 28}}
        assert (info["upgrade"]["state"], info["chunks"]) == ("encoding", 60)


@pytest.mark.parametrize("method", ["bt2", "procrustes", "reembed"])
@pytest.mark.parametrize("kind", ["dense", "hybrid"])
def test_a_stopped_upgrade_stays_searchable_and_goes_on(tmp_path: Path, method: str, kind: str) -> None:
    fields: dict[str, Any] = FIELDS if method == "bt2" else {}
    with make(tmp_path / "index", kind) as index:
        with pytest.raises(Interrupted):
            upgrade(index, Stopping(60 + 20), method=method, fields=fields)
        assert sorted(set(spaces(index))) == [0, 1]
        assert found(index) == {document["id"] for document in DOCUMENTS}
        if kind == "hybrid":
            assert index.search("n7", k=1, mode="bm25")[0].id == "d7"
        fresh = BagOfWords(name="new", dimensions=32)
        index._given, index._loaded = fresh, None
        index.delete(["d3", "d50"])
        new = [{"id": "x", "text": "mask bread fox"}, {"id": "d7", "text": "mask bread fox tree"}]
        assert (index.add(new).added, len(index)) == (1, 59)
        assert {"x", "d7"} <= {hit.id for hit in index.search("mask bread fox", k=6)}
        index.compact()
        assert sorted(set(spaces(index))) == [0, 1]
        result = index.upgrade(fresh)
        assert result["left"] == 0
        assert 20 < result["encoded"] < 60
        assert set(spaces(index)) == {1}
        assert found(index) == {d["id"] for d in DOCUMENTS} - {"d3", "d50"} | {"x"}
        index.compact()
        assert len(spaces(index)) == 1
        assert index.upgrade(fresh)["encoded"] == 0


def test_a_chain_of_three_encoders_is_searched_by_the_last(tmp_path: Path) -> None:
    """Each new encoder is compatible with the one before, and thereby with all earlier ones."""
    with make(tmp_path / "index", count=40) as index:
        with pytest.raises(Interrupted):
            upgrade(index, Stopping(40 + 16))
        index._given, index._loaded = NEW, None
        index.add(DOCUMENTS[40:])
        result = upgrade(index, NEWER, reencode=False)
        assert sorted(set(spaces(index))) == [0, 1]
        assert {hit.id for hit in index.search("stone", k=99)} == {document["id"] for document in DOCUMENTS}
        encoder = index._encoder()
        assert encoder is not None
        assert (encoder.dimensions, result["to"]["dimensions"], result["from"]["dimensions"]) == (44, 44, 36)
        (query,) = np.asarray(encoder.encode_queries(["stone dog"]))
        with index._view() as snapshot:
            vectors = np.concatenate([segment.arrays["dense.vectors"][:, :24] for segment in snapshot.segments])
        expected = vectors @ query[:24] / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query[:24])
        scores = sorted((hit.score for hit in index.search("stone dog", k=60)), reverse=True)
        assert scores == pytest.approx(sorted(expected.tolist(), reverse=True), abs=1e-5)
        assert index.upgrade()["left"] == 0
        assert set(spaces(index)) == {2}


def test_another_process_sees_the_upgrade(index: Index) -> None:
    """An index that was opened before writes and searches with the new encoder from the next call on."""
    with Index.open(index.path, encoder=OLD) as other:
        assert found(other)
        upgrade(index, reencode=False)
        other._given = NEW  # in place of a name, by which it would be loaded
        other.add([{"id": "late", "text": "mask bread fox"}])
        assert other.search("mask bread fox", k=1)[0].id == "late"
        assert sorted(spaces(other)) == [0, 1]


def test_adds_and_searches_run_beside_the_upgrade(tmp_path: Path) -> None:
    with make(tmp_path / "index") as index:
        upgrade(index, reencode=False)
        work = threading.Thread(target=lambda: index.upgrade(NEW, rate=400))
        work.start()
        with Index.open(index.path, encoder=NEW) as other:
            for n in range(6):
                other.add([{"id": f"new{n}", "text": f"mask bread n{n}"}])
                other.delete([f"d{n}"])
                wanted = {f"d{m}" for m in range(n + 1, 60)} | {f"new{m}" for m in range(n + 1)}
                assert found(other) == wanted
                assert found(index) == wanted
        work.join()
        assert set(spaces(index)) == {1}
        assert found(index) == wanted


def test_vectors_are_dropped_if_another_upgrade_begins_while_they_are_made(index: Index) -> None:
    """Vectors of one encoder are never written as those of the next."""
    upgrade(index, reencode=False)
    encoder: Any = index._encoder()

    def late(texts: Any) -> Any:
        del encoder.encode_documents
        with Index.open(index.path, encoder=NEW) as other:
            upgrade(other, NEWER, reencode=False)
        return encoder.encode_documents(texts)

    encoder.encode_documents = late
    with pytest.raises(IntaglioError, match="vectors of two spaces are never mixed"):
        index.upgrade()
    index._given = NEWER
    assert set(spaces(index)) == {0}
    assert index.upgrade()["encoded"] == 60
    assert set(spaces(index)) == {2}


def test_the_rate_is_kept(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sleeps make up for what encoding was faster than the rate."""
    slept: list[float] = []
    monkeypatch.setattr(upgrade_module, "sleep", slept.append)
    upgrade(index, rate=10.0)
    assert sum(slept) == pytest.approx(6.0, rel=0.1)
    assert max(slept) <= 1.0


def test_the_report_is_of_held_out_queries(index: Index) -> None:
    report = upgrade(index, reencode=False)["report"]
    assert report["held_out"]
    assert 0 < report["queries"] < 30
    assert report["documents"] == 60
    assert set(report["quality"]["new/old"]) == {"nDCG@10", "MRR@10"}


def test_a_query_log_is_measured_by_what_reembedding_would_give(index: Index) -> None:
    log = [f"{a} {b}" for a, b in zip(WORDS, WORDS[3:], strict=False)]
    quality = upgrade(index, judged=None, queries=log, reencode=False)["report"]["quality"]
    assert quality["re-embedded"] == {"overlap@10": 1.0}
    assert 0 < quality["new/new"]["overlap@10"] <= 1


def test_without_queries_there_is_no_report(index: Index) -> None:
    assert upgrade(index, judged=None, reencode=False)["report"] is None


def test_sample_steps_and_seed_change_the_head(index: Index) -> None:
    digests = set()
    for options in ({}, {"sample": 40}, {"steps": 3}, {"seed": 1}, {"fields": {"extra_dims": 5}}):
        with make(index.path.with_name(f"copy{len(digests)}")) as copy:
            digests.add(upgrade(copy, reencode=False, **options)["to"]["fingerprint"])
    assert len(digests) == 5


def test_procrustes_keeps_the_ranking_of_the_new_encoder(index: Index) -> None:
    """A rotation leaves new/new untouched."""
    upgrade(index, method="procrustes", fields={}, reencode=False)
    encoder, texts = index._encoder(), [document["text"] for document in DOCUMENTS]
    assert encoder is not None
    rotated, plain = (np.asarray(own.encode_documents(texts)) for own in (encoder, NEW))
    assert np.allclose(rotated @ rotated.T, plain @ plain.T, atol=1e-5)
    assert not np.allclose(rotated, plain, atol=0.1)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "lora"}, "method is 'lora'; accepted: bt2, bct"),
        ({"encoder": BagOfWords("sparse", "words")}, "the new encoder words is sparse; .* holds dense vectors"),
        ({"encoder": OLD}, "holds vectors of old already; name another encoder"),
        ({"rate": 0.0}, "rate is 0.0; a number of chunks a second above 0"),
        ({"rate": float("inf")}, "rate is inf; a number of chunks a second above 0"),
        ({"fields": {"extra_dim": 3}}, "extra_dim: there is no such field here"),
        ({"encoder": BagOfWords(name="small", dimensions=8)}, "at least the 24 of the old vectors are needed"),
        ({"judged": Judged({"1": "mask"}, {"1": {"nowhere": 1}})}, "no document that the pairs name is in"),
        ({"encoder": None}, "no upgrade of .* is under way; name the new encoder"),
        ({"sample": 1}, "sample is 1 and steps is 20; at least 2 and 1"),
        ({"fields": {"old_dims": 7}}, "old_dims is 7; the old vectors have 24 dimensions"),
        ({"fields": {"new_dims": 30}}, "new_dims is 30, and the new vectors have 32 dimensions"),
    ],
)
def test_a_bad_upgrade_is_refused_in_a_sentence(index: Index, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(IntaglioError, match=sentence) as caught:
        upgrade(index, **options)
    assert "\n" not in str(caught.value)
    assert index.info()["upgrade"] is None
    assert found(index) == {document["id"] for document in DOCUMENTS}


def test_indexes_without_dense_vectors_are_refused(tmp_path: Path) -> None:
    with (
        Index.create(tmp_path / "bm25") as index,
        pytest.raises(IntaglioError, match="only dense vectors are upgraded"),
    ):
        index.upgrade(NEW)
    sparse = BagOfWords("sparse")
    with Index.create(tmp_path / "sparse", kind="sparse", encoder=sparse) as index:
        index.add(DOCUMENTS[:3])
        with pytest.raises(IntaglioError, match="holds sparse vectors; only dense vectors are upgraded"):
            index.upgrade(NEW)


def test_an_empty_index_is_refused(tmp_path: Path) -> None:
    with (
        Index.create(tmp_path / "index", kind="dense", encoder=OLD) as index,
        pytest.raises(IntaglioError, match="has no documents, so nothing can be upgraded"),
    ):
        index.upgrade(NEW)


def test_reembedding_is_finished_before_another_upgrade(index: Index) -> None:
    upgrade(index, method="reembed", reencode=False)
    with pytest.raises(IntaglioError, match=r"the upgrade of .* by reembed is not finished; run"):
        upgrade(index, NEWER)


def test_an_encoder_trained_for_a_third_space_is_refused(index: Index) -> None:
    third = BagOfWords(name="third", dimensions=32)
    third.extends = ("other weights", 24)  # type: ignore[attr-defined]
    with pytest.raises(IntaglioError, match="vectors of a third space cannot be compared"):
        upgrade(index, third)


def test_a_compatible_encoder_is_taken_as_it_is(tmp_path: Path) -> None:
    old, new = BagOfWords(name="old", dimensions=24), BagOfWords(name="new", dimensions=32)
    old.weights, new.extends = "w", ("w", 24)  # type: ignore[attr-defined]
    with make(tmp_path / "index", encoder=old) as index:
        assert upgrade(index, new)["to"]["fingerprint"] == new.fingerprint
        assert not (index.path / "encoders").exists()


def test_queries_of_a_third_encoder_are_refused(index: Index) -> None:
    upgrade(index)
    two = {
        32: "vectors of two spaces are never mixed",
        40: "was upgraded to an encoder of 32 dimensions, and third has 40",
    }
    for dimensions, sentence in two.items():
        with pytest.raises(IntaglioError, match=sentence):
            Index.open(index.path, encoder=BagOfWords(name="third", dimensions=dimensions))


def test_approximate_search_waits_for_the_upgrade(index: Index) -> None:
    upgrade(index, reencode=False)
    with pytest.raises(IntaglioError, match="is being upgraded; approximate search is possible when that is done"):
        index.search("mask", approximate=True)


def test_a_damaged_head_is_one_sentence(index: Index) -> None:
    upgrade(index, reencode=False)
    (head,) = (index.path / "encoders").iterdir()
    head.write_bytes(head.read_bytes()[:50])
    with pytest.raises(IntaglioError, match="is missing or damaged"):
        Index.open(index.path, encoder=NEW)


_UPGRADER = """
import sys
from intaglio.search import Index, upgrade
from tests.search.fakes import BagOfWords

upgrade.PIECE = 16
with Index.open(sys.argv[1], encoder=BagOfWords(name="new", dimensions=32)) as index:
    print("ready", flush=True)
    index.upgrade(rate=400.0)
"""
KILLS = 20


@pytest.mark.slow
def test_a_killed_upgrade_loses_nothing_and_goes_on(tmp_path: Path) -> None:
    """Kills at random moments; every document stays searchable, and the upgrade ends as an unbroken one."""
    rng = np.random.default_rng(0)
    with make(tmp_path / "index") as index:
        upgrade(index, reencode=False)
        for kill in range(KILLS):
            worker = subprocess.Popen(
                [sys.executable, "-c", _UPGRADER, str(index.path)], stdout=subprocess.PIPE, text=True
            )
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
            try:
                worker.wait(float(rng.uniform(0, 0.1)))
            except subprocess.TimeoutExpired:
                worker.kill()
            worker.wait()
            assert len(found(index)) == 60 + kill
            index.add([{"id": f"k{kill}", "text": f"mask bread fox {kill}"}])
        index.upgrade()
        assert set(spaces(index)) == {1}
        encoder = index._encoder()
        assert encoder is not None
        with index._view() as snapshot:
            stored = {
                int(chunk): row
                for segment in snapshot.segments
                for chunk, row in zip(segment.arrays["chunks"], segment.arrays["dense.vectors"], strict=True)
            }
        assert len(stored) == 60 + KILLS
        expected = np.asarray(encoder.encode_documents([document["text"] for document in DOCUMENTS]))
        assert np.allclose(np.stack([stored[n + 1] for n in range(60)]), expected, atol=1e-6)
