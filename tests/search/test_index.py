"""The index: documents, updates, filters, commits, damage, refusals."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.errors import IntaglioError
from intaglio.search import Document, Index
from intaglio.search import index as index_module
from tests.search.fakes import BagOfWords

TEXTS = {
    "a": "the mask hides weights",
    "b": "attention reads a mask of keys",
    "c": "bread needs flour and water",
    "d": "weights of a bread recipe",
}


def documents(texts: dict[str, str] = TEXTS) -> list[dict[str, Any]]:
    return [{"id": key, "text": text, "year": 2000 + i, "lang": "en"} for i, (key, text) in enumerate(texts.items())]


def ids(index: Index, query: str, **options: Any) -> list[str]:
    return [hit.id for hit in index.search(query, **options)]


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with Index.create(tmp_path / "index") as result:
        result.add(documents())
        yield result


def make(path: Path, kind: str, **options: Any) -> Index:
    encoder = None if kind == "bm25" else BagOfWords("sparse" if kind == "sparse" else "dense")
    return Index.create(path, kind=kind, encoder=encoder, **options)


@pytest.mark.parametrize("kind", ["bm25", "dense", "sparse", "hybrid"])
def test_every_kind_finds_the_document_of_the_words(tmp_path: Path, kind: str) -> None:
    with make(tmp_path / "index", kind) as index:
        index.add(documents())
        (best, *_) = index.search("bread flour", k=2, explain=True)
        assert (best.id, best.rank, best.text, best.metadata) == ("c", 1, TEXTS["c"], {"year": 2002, "lang": "en"})
        assert bool(best.terms) == (kind != "dense")
        assert set(best.parts) == {"hybrid": {"bm25", "dense"}}.get(kind, {kind})


def test_an_index_is_the_same_when_it_is_opened_again(index: Index) -> None:
    hits = index.search("weights mask")
    with Index.open(index.path) as again:
        assert again.search("weights mask") == hits
        assert len(again) == 4


def test_the_same_id_again_is_an_update(index: Index) -> None:
    report = index.add([{"id": "c", "text": "a cake"}, *documents()[:2]])
    assert (report.added, report.updated, report.unchanged) == (0, 1, 2)
    assert ids(index, "flour") == []
    assert ids(index, "cake") == ["c"]
    assert len(index) == 4


def test_changed_metadata_alone_is_an_update(index: Index) -> None:
    assert index.add([{**documents()[0], "year": 1999}]).updated == 1
    assert ids(index, "mask", filters=["year<2000"]) == ["a"]


def test_deleted_documents_are_not_found(index: Index) -> None:
    assert index.delete(["a", "a"]) == 1
    assert ids(index, "mask") == ["b"]
    assert index.delete(filters={"year": 2002}) == 1
    assert ids(index, "bread") == ["d"]
    assert index.get("a") is None


def test_nothing_is_deleted_if_an_id_is_unknown(index: Index) -> None:
    with pytest.raises(IntaglioError, match="has the id 'zz'; nothing was deleted"):
        index.delete(["a", "zz"])
    assert len(index) == 4


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"year": 2000}, {"a"}),
        (["year>=2001", "lang=en"], {"b"}),
        (["year!=2000"], {"b"}),
        (["id~=A"], {"a"}),
        (["lang=de"], set()),
        (["nothing!=x"], {"a", "b"}),
        (["year>1999.5", "year<2000.5"], {"a"}),
        ({"lang": "en", "year": 2001}, {"b"}),
    ],
)
def test_filters(index: Index, filters: Any, expected: set[str]) -> None:
    assert set(ids(index, "mask", filters=filters)) == expected


def test_a_filter_that_is_no_condition_is_refused(index: Index) -> None:
    with pytest.raises(IntaglioError, match="the filter 'year' is no condition"):
        index.search("mask", filters=["year"])


@settings(max_examples=25)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from("aaadc"), st.lists(st.sampled_from("pqrstuv"), min_size=1, max_size=5), st.integers(0, 5)
        ),
        min_size=1,
        max_size=12,
    )
)
def test_any_adds_deletes_and_compactions_equal_a_new_index(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, list[str], int]]
) -> None:
    folder = tmp_path_factory.mktemp("index")
    model: dict[str, str] = {}
    with make(folder / "one", "hybrid") as index, make(folder / "new", "hybrid") as new:
        for step, letters, number in steps:
            key = f"doc{number}"
            if step == "a":
                text = " ".join(letter * 3 for letter in letters)
                index.add([{"id": key, "text": text}])
                if model.get(key) != text:
                    model.pop(key, None)  # an update moves a document to the end
                    model[key] = text
            elif step == "d" and key in model:
                index.delete([key])
                del model[key]
            else:
                index.compact()
        if model:
            new.add([{"id": key, "text": text} for key, text in model.items()])
        for mode in ("bm25", "dense"):
            got, expected = (each.search("ppp qqq rrr", k=10, mode=mode) for each in (index, new))
            assert [hit.id for hit in got] == [hit.id for hit in expected] or mode == "dense"
            assert [hit.score for hit in got] == pytest.approx([hit.score for hit in expected], rel=1e-5)
        assert len(index) == len(model)


def test_long_documents_are_cut_into_chunks_and_the_best_is_returned(tmp_path: Path) -> None:
    text = "\n\n".join(f"paragraph {i} " + "filler " * 20 for i in range(30)) + "\n\nthe needle is here"
    with Index.create(tmp_path / "index", chunk=300) as index:
        assert index.add([Document("long", text), Document("other", "nothing")]).chunks > 10
        (hit,) = index.search("needle")
        assert "needle" in hit.text
        assert len(hit.text) <= 300
        assert text[hit.start :].startswith(hit.text)
        assert [hit.text[a:b] for a, b in hit.spans] == ["needle"]
        assert ids(index, "filler", k=2) == ["long"]


def test_chunks_beyond_the_encoders_context_are_cut_again(tmp_path: Path) -> None:
    encoder = BagOfWords()
    with Index.create(tmp_path / "index", kind="dense", encoder=encoder, chunk=0) as index:
        index.add([Document("long", "word " * 500)])
    assert max(encoder.count_tokens(encoder.encoded)) <= encoder.max_tokens
    assert sum(encoder.count_tokens(encoder.encoded)) == 500


def test_passages_are_read_one_document_at_a_time(tmp_path: Path) -> None:
    with Index.create(tmp_path / "index", chunk=200) as index:
        text = " ".join(f"word{n}" for n in range(100))
        index.add({"id": id, "text": text, "title": id.upper()} for id in "abc")
        passages = index.passages()
        first = next(passages)
        assert (first.id, first.title, first.start, first.text) == ("a", "A", 0, text[: len(first.text)])
        index.delete(["b"])
        rest = list(passages)
        assert {hit.id for hit in rest} == {"a", "c"}
        assert [hit.start for hit in rest if hit.id == "c"] == [0, *(hit.start for hit in rest if hit.id == "a")]
        assert all(hit.text == text[hit.start :][: len(hit.text)] for hit in rest)


def test_a_query_beyond_the_encoders_context_is_refused(tmp_path: Path) -> None:
    with make(tmp_path / "index", "dense") as index:
        index.add(documents())
        with pytest.raises(IntaglioError, match="has 51 tokens; the encoder bag reads 50"):
            index.search("word " * 51)


def test_vectors_of_another_space_are_refused_by_name(tmp_path: Path) -> None:
    with make(tmp_path / "index", "dense") as index:
        index.add(documents())
    with pytest.raises(IntaglioError, match=r"holds vectors of bag \(dense, 32 .*not of other \(dense, 32"):
        Index.open(tmp_path / "index", encoder=BagOfWords(name="other"))
    with Index.open(tmp_path / "index", encoder=BagOfWords()) as index:
        assert ids(index, TEXTS["c"], k=1) == ["c"]


def test_creating_again_resumes_only_with_the_same_settings(tmp_path: Path) -> None:
    make(tmp_path / "index", "dense").close()
    make(tmp_path / "index", "dense", exist_ok=True).close()
    with pytest.raises(IntaglioError, match="has chunk 2000 instead of 500"):
        make(tmp_path / "index", "dense", chunk=500, exist_ok=True)
    with pytest.raises(IntaglioError, match="is not empty"):
        make(tmp_path / "index", "dense")


def test_many_small_adds_are_merged(tmp_path: Path) -> None:
    with Index.create(tmp_path / "index") as index:
        for number in range(40):
            index.add([{"id": str(number), "text": f"mask number {number}"}])
        assert index.info()["segments"] < 16
        assert len(index.search("mask", k=50)) == 40
        assert index.compact()["segments"] == 1
        assert ids(index, "mask", k=50) == [str(number) for number in range(40)]
        assert len(list((index.path / "segments").iterdir())) == 1


def test_a_second_writer_is_refused_in_a_sentence(index: Index) -> None:
    with Index.open(index.path) as other, index._store.writing():
        with pytest.raises(IntaglioError, match="is being written by another process"):
            other.add([{"id": "x", "text": "new"}])
        assert ids(other, "flour") == ["c"]  # readers go on


def test_a_reader_sees_the_commits_of_a_writer(index: Index) -> None:
    with Index.open(index.path) as reader:
        assert ids(reader, "cake") == []
        index.add([{"id": "x", "text": "a cake"}])
        assert ids(reader, "cake") == ["x"]
        index.delete(["x"])
        index.compact()
        assert ids(reader, "cake") == []
        assert ids(reader, "flour") == ["c"]


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_corrupt_segment_is_named_and_the_rest_stays_searchable(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "index"
    with Index.create(path) as index:
        index.add(documents()[:2])
        index.add(documents()[2:])
    file = min((path / "segments").iterdir())
    content = bytearray(file.read_bytes())
    content[-3] ^= 255
    file.write_bytes(content[:-7] if damage == "truncated" else content)
    if damage == "missing":
        file.unlink()
    with Index.open(path) as index:
        with pytest.warns(UserWarning, match=f"the segment .*{file.name} is damaged"):
            assert ids(index, "bread") == ["c", "d"] or ids(index, "bread") == ["d", "c"]
        assert ids(index, "mask") == []
        assert len(index.damaged) == 1
        assert len(index) == 4
        assert index.get("a") is not None
        # Adding the documents again repairs the index; compaction drops what is left.
        report = index.add(documents())
        assert (report.updated, report.unchanged) == (2, 2)
        assert set(ids(index, "mask")) == {"a", "b"}
        index.compact()
        assert index.damaged == []


def test_an_unchanged_file_is_trusted_and_verified_on_request(index: Index) -> None:
    file = next((index.path / "segments").iterdir())
    stat, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with Index.open(index.path) as again:
        assert again.info()["damaged"] == []
        assert len(again.info(verify=True)["damaged"]) == 1


def test_a_full_disk_is_a_sentence_and_loses_nothing(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(IntaglioError, match="is full; what was committed before is kept"):
        index.add([{"id": "x", "text": "a cake"}])
    monkeypatch.undo()
    assert len(index) == 4
    assert len(list((index.path / "segments").iterdir())) == 1
    assert index.add([{"id": "x", "text": "a cake"}]).added == 1


def test_an_interrupted_add_keeps_its_commits_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "BATCH_CHARACTERS", 60)

    def source() -> Iterator[dict[str, Any]]:
        yield from documents()
        raise KeyboardInterrupt

    with Index.create(tmp_path / "index") as index:
        with pytest.raises(KeyboardInterrupt):
            index.add(source())
        committed = len(index)
        assert 0 < committed < 4
        report = index.add(documents())
        assert (report.unchanged, report.added) == (committed, 4 - committed)


def test_files_of_a_killed_writer_are_removed(index: Index) -> None:
    (index.path / "segments" / "77.safetensors").write_bytes(b"half")
    index.delete(["a"])
    assert len(list((index.path / "segments").iterdir())) == 1


def test_an_index_of_another_version_is_refused(index: Index) -> None:
    with sqlite3.connect(index.path / "index.db") as db:
        db.execute("UPDATE settings SET value = '99' WHERE key = 'version'")
    with pytest.raises(IntaglioError, match="has format 99, this version of intaglio reads 1"):
        Index.open(index.path)


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_what_is_no_index_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(IntaglioError, match="does not exist: `intaglio index" if name == "nowhere" else "is no index"):
        Index.open(tmp_path / name)


def test_a_database_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "index.db").write_bytes(b"not a database, but long enough to be looked at " * 40)
    with pytest.raises(IntaglioError, match="cannot be used: file is not a database"):
        Index.open(tmp_path)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kind": "colbert"}, "kind is 'colbert'; accepted: bm25, dense, sparse, hybrid"),
        ({"chunk": 3}, "chunk is 3; accepted: 0"),
        ({"b": 2.0}, "b between 0 and 1"),
        ({"language": "klingon"}, "has no stemmer"),
        ({"encoder": "minilm"}, "a bm25 index has no encoder"),
        ({"kind": "dense", "encoder": BagOfWords("sparse")}, "'bag' is sparse, but the index is to be dense"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(IntaglioError, match=sentence):
        Index.create(tmp_path / "index", **options)
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(("query", "k", "sentence"), [("  ", 3, "the query is empty"), ("mask", 0, "k is 0")])
def test_queries_that_are_none_are_refused(index: Index, query: str, k: int, sentence: str) -> None:
    with pytest.raises(IntaglioError, match=sentence):
        index.search(query, k)


def test_duplicate_ids_are_refused_unless_the_documents_are_the_same(index: Index) -> None:
    with pytest.raises(IntaglioError, match="the id 'x' is that of two documents"):
        index.add([{"id": "x", "text": "one"}, {"id": "x", "text": "two"}])
    assert index.add([{"text": "one"}, {"text": "one"}]).added == 1


def test_an_empty_source_is_refused_and_empty_documents_are_reported(index: Index) -> None:
    with pytest.raises(IntaglioError, match="there is no document to index"):
        index.add([])
    assert index.add([{"id": "x", "text": " \n"}]).skipped == ["the document 'x' is empty"]


def test_an_encoder_with_vectors_that_are_not_finite_is_refused(tmp_path: Path) -> None:
    class Broken(BagOfWords):
        def encode_documents(self, texts: Any) -> Any:
            return np.full((len(texts), self.dimensions), np.nan, np.float32)

    with Index.create(tmp_path / "index", kind="dense", encoder=Broken()) as index:
        with pytest.raises(IntaglioError, match="finite numbers"):
            index.add(documents())
        assert len(index) == 0


def test_search_many_equals_single_searches(tmp_path: Path) -> None:
    with make(tmp_path / "index", "hybrid") as index:
        index.add(documents())
        queries = ["bread", "mask weights", "keys"]
        together = [[hit.id for hit in hits] for hits in index.search_many(queries, 3)]
        assert together == [ids(index, query, k=3) for query in queries]


KILLS = 100
_WRITER = """
import random, sys, warnings
from intaglio.search import Index
from intaglio.search import index as module
module.BATCH_CHARACTERS = 2000
rng = random.Random(int(sys.argv[2]))
with Index.open(sys.argv[1]) as index:
    print("ready", flush=True)
    for round in range(10**9):
        words = ["w%d " % rng.randrange(99) for _ in range(30)]
        texts = [{"id": f"{sys.argv[2]}-{round}-{i}", "text": "mask " + word * 20} for i, word in enumerate(words)]
        index.add(texts)
        for row in texts:
            print("added", row["id"], flush=True)
        gone = [row["id"] for row in rng.sample(texts, 5)]
        for name in gone:
            print("deleting", name, flush=True)
        index.delete(gone)
        if round % 3 == 2:
            index.compact()
"""


@pytest.mark.slow
def test_a_killed_writer_loses_no_committed_document(tmp_path: Path) -> None:
    """100 kills at random moments of adds, deletes and compactions."""
    path, rng = tmp_path / "index", np.random.default_rng(0)
    Index.create(path).close()
    present: set[str] = set()
    for kill in range(KILLS):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(path), str(kill)], stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        try:
            writer.wait(float(rng.uniform(0, 0.4)))
        except subprocess.TimeoutExpired:
            writer.kill()
        maybe: set[str] = set()
        for line in writer.stdout.read().splitlines(keepends=True):
            if line.endswith("\n"):  # else the kill fell into the write of this line
                what, _, name = line.rstrip("\n").partition(" ")
                (present.add if what == "added" else maybe.add)(name)
        writer.wait()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a damaged segment
            with Index.open(path) as index:
                known = {row[0] for row in index._store.db.execute("SELECT id FROM documents")}
                assert present - maybe <= known
                hits = index.search("mask", k=max(len(known), 1)) if known else []
                assert {hit.id for hit in hits} == known
                present = known
                if kill % 10 == 9:
                    index.delete(sorted(known))
                    index.compact()
                    present = set()


def test_metadata_must_be_json(index: Index) -> None:
    with pytest.raises(IntaglioError, match="the metadata of document 'x' cannot be stored"):
        index.add([Document("x", "text", metadata={"when": object()})])


def test_info_describes_the_index(index: Index) -> None:
    info = json.loads(json.dumps(index.info(verify=True)))
    assert (info["documents"], info["chunks"], info["deleted"], info["kind"]) == (4, 4, 0, "bm25")
    assert info["bytes"]["text"] == sum(map(len, TEXTS.values()))
    assert info["bytes"]["total"] == info["bytes"]["database"] + info["bytes"]["segments"]
