"""The commands `index`, `search` and `evaluate`, with BM25; encoders are tested in `tests/search`."""

from __future__ import annotations

import errno
import http.client
import json
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from intaglio.cli import demo_search
from intaglio.cli.app import app
from intaglio.data.docstrings import Pair
from intaglio.search import Index, documents, serve
from tests.conftest import TinyDir

PAGES = {
    "masks.md": "# Attention masks\n\nA causal mask hides later keys from a query.\n",
    "prune.rst": "Pruning\n=======\n\nPruning removes weights by magnitude.\n",
    "page.html": "<title>Loss &amp; co</title><p>The loss of a <b>masked</b> token.</p>",
    "code.py": '"""Keys and values."""\n\ndef cache(keys): return keys\n',
}


def outcome(*words: str | Path, stdin: str | None = None) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], input=stdin)


def run(*words: str | Path, stdin: str | None = None) -> Any:
    result = outcome(*words, stdin=stdin)
    assert result.exit_code == 0, result.stderr
    return result


def document(*words: str | Path) -> Any:
    return json.loads(run(*words, "--json").stdout)


def refused(*words: str | Path) -> str:
    """Return the sentence of a command that refuses its input."""
    result = outcome(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    sentence = result.stderr.splitlines()[-1]
    assert sentence.startswith("error: ")
    return sentence.removeprefix("error: ")


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    for name, text in PAGES.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def index(tmp_path: Path, docs: Path) -> Path:
    path = tmp_path / "index"
    run("index", docs, "-o", path)
    return path


# --- index -----------------------------------------------------------------------------------------------------------


def test_index_is_built_from_a_folder_and_built_again_changes_nothing(docs: Path, tmp_path: Path) -> None:
    path = tmp_path / "index"
    first = document("index", docs, "-o", path)
    assert {key: first[key] for key in ("added", "updated", "unchanged", "documents")} == {
        "added": 4,
        "updated": 0,
        "unchanged": 0,
        "documents": 4,
    }
    (docs / "masks.md").write_text("# Masks\n\nEvery key is visible.\n", encoding="utf-8")
    shown = run("index", "-o", path, docs).stdout
    assert "0 added, 1 updated, 3 unchanged" in shown
    assert document("search", path, "visible")["hits"][0]["id"] == "masks.md"


def test_add_and_delete(index: Path, tmp_path: Path) -> None:
    rows = [{"id": 7, "body": "a sparse vector", "year": 2024}, {"id": 8, "body": "a dense vector", "year": 2020}]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert document("index", "add", index, file, "--text-field", "body")["documents"] == 6
    assert [hit["id"] for hit in document("search", index, "vector", "--filter", "year>=2022")["hits"]] == ["7"]
    assert "1 deleted, 5 documents" in run("index", "delete", index, "7").stdout
    assert document("index", "delete", index, "--filter", "year=2020")["deleted"] == 1
    assert "which is not in" in refused("index", "delete", index, "7") or "7" in refused("index", "delete", index, "7")
    assert "exactly one of both" in refused("index", "delete", index)


def test_info_and_compact(index: Path) -> None:
    facts = document("index", "info", index, "--verify")
    assert (facts["kind"], facts["documents"], facts["damaged"]) == ("bm25", 4, [])
    shown = run("index", "info", index).stdout
    assert "bytes total" in shown
    assert "bm25 language" in shown
    run("index", "delete", index, "prune.rst")
    assert document("index", "compact", index)["segments"] == 1
    assert "segments became 1" in run("index", "compact", index).stdout


def test_a_folder_named_as_a_command_is_indexed_by_its_path(tmp_path: Path, docs: Path) -> None:
    docs.rename(tmp_path / "add")
    assert document("index", f"{tmp_path}/add", "-o", tmp_path / "index")["documents"] == 4


def test_skipped_files_are_named(docs: Path, tmp_path: Path) -> None:
    (docs / "binary.txt").write_bytes(b"\x00\x01")
    (docs / "latin.txt").write_bytes(b"caf\xe9")
    result = run("index", docs, "-o", tmp_path / "index")
    assert result.stderr.count("skipped: ") == 2
    assert "binary" in result.stderr
    assert "not UTF-8" in result.stderr


def test_nothing_is_left_where_nothing_was_indexed(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no document" in refused("index", tmp_path / "empty", "-o", tmp_path / "index")
    assert "do not exist" in refused("index", tmp_path / "absent", "-o", tmp_path / "index")
    assert not (tmp_path / "index").exists()
    assert "name -o INDEX or --store URL" in refused("index", tmp_path / "empty")


def test_a_failed_update_leaves_the_index(index: Path, tmp_path: Path) -> None:
    refused("index", tmp_path / "absent", "-o", index)
    assert document("index", "info", index)["documents"] == 4


def test_other_settings_are_refused(index: Path, docs: Path) -> None:
    assert "german" in refused("index", docs, "-o", index, "--language", "german")
    assert document("index", "info", index)["documents"] == 4


def test_usage_errors_name_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "intaglio", "index", "compact"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.strip().endswith("index compact --help")
    assert done.stderr.count("\n") == 1


# --- search ----------------------------------------------------------------------------------------------------------


def test_search_prints_ids_titles_and_excerpts(index: Path) -> None:
    shown = run("search", index, "causal mask").stdout
    first, text = shown.splitlines()[:2]
    assert first.startswith(" 1. masks.md  Attention masks")
    assert "A causal mask hides" in text
    explained = run("search", index, "causal mask", "--explain").stdout
    assert "terms: " in explained


def test_search_as_json(index: Path) -> None:
    found = document("search", index, "mask", "-k", "1", "--explain")
    assert {"index", "query", "milliseconds", "damaged", "hits"} == set(found)
    (hit,) = found["hits"]
    assert {"id", "score", "rank", "title", "text", "start", "metadata", "spans", "terms", "parts"} == set(hit)
    assert [hit["text"][a:b] for a, b in hit["spans"]]
    assert hit["terms"]
    assert [hit["id"] for hit in document("search", index, "mask", "--filter", "type=html")["hits"]] == ["page.html"]


def test_the_query_can_come_from_stdin_and_may_match_nothing(index: Path) -> None:
    assert "masks.md" in run("search", index, "-", stdin="causal\n").stdout
    result = run("search", index, "zucchini")
    assert (result.stdout, result.stderr) == ("", "no document matches\n")


def test_control_characters_of_documents_do_not_reach_the_terminal(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"id": "a\x1b[2Jb", "title": "\x1b]0;x\x07", "text": "mask \x1b[31m red\nline"}))
    run("index", file, "-o", tmp_path / "index")
    shown = run("search", tmp_path / "index", "mask", "--explain").stdout
    assert "\x1b" not in shown
    assert "mask \\x1b[31m red line" in shown


def test_bad_searches_are_refused(index: Path, tmp_path: Path) -> None:
    refused("search", index, "")
    refused("search", tmp_path, "mask")
    assert "filter" in refused("search", index, "mask", "--filter", "year")
    assert "search takes a query, or --serve" in refused("search", index)
    assert "search takes a query, or --serve" in refused("search", index, "mask", "--serve")


def test_serve_answers_until_it_is_stopped(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = {
        "id": "<script>x</script>",
        "title": "<b>t",
        "text": "causal mask <script>x</script>",
        "<i>": "<img src=x>",
    }
    file = tmp_path / "hostile.jsonl"
    file.write_text(json.dumps(hostile), encoding="utf-8")
    run("index", "add", index, file)
    answers: list[str] = []
    servers: list[Any] = []
    bound = serve.server

    def kept(*args: Any) -> Any:
        servers.append(bound(*args))
        return servers[-1]

    def client() -> None:
        while not servers:
            time.sleep(0.01)
        for target in ("/?q=causal+mask&k=5", "/?q=mask&filter=%22"):
            connection = http.client.HTTPConnection("127.0.0.1", servers[0].server_address[1], timeout=10)
            connection.request("GET", target)
            answers.append(connection.getresponse().read().decode())
        servers[0].shutdown()

    monkeypatch.setattr(serve, "server", kept)
    thread = threading.Thread(target=client)
    thread.start()
    shown = run("search", index, "--serve", "--port", "0").stdout
    thread.join()
    assert shown.startswith("http://127.0.0.1:")
    assert "<mark>causal</mark> <mark>mask</mark>" in answers[0]
    assert "5 documents · bm25" in answers[0]
    assert "&lt;script&gt;x&lt;/script&gt;" in answers[0]
    assert not any(tag in answers[0] for tag in ("<script", "<b>t", "<img", "<i>"))
    assert "open quotation mark" in answers[1]


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.fixture
def encoder(tiny_dir: TinyDir, tmp_path: Path) -> Path:
    """Copy a small BERT, which a test may change."""
    return Path(shutil.copytree(tiny_dir("bert"), tmp_path / "encoder"))


def rows_file(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_a_line_beyond_the_limit_is_refused_and_the_rest_of_a_folder_is_read(
    index: Path, docs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "MAX_BYTES", 10_000)
    line = rows_file(tmp_path / "long.jsonl", {"id": "long", "text": "word " * 3000})
    assert "line 1 of" in (sentence := refused("index", "add", index, line))
    assert "longer than" in sentence
    (docs / "long.txt").write_text("word " * 3000)
    assert "split it" in run("index", "add", index, docs).stderr
    assert document("index", "info", index)["documents"] == 4


def test_duplicate_ids_are_refused(index: Path, tmp_path: Path) -> None:
    file = rows_file(tmp_path / "rows.jsonl", {"id": "x", "text": "one"}, {"id": "x", "text": "two"})
    assert "the id 'x' is that of two documents" in refused("index", "add", index, file)
    assert document("index", "info", index)["documents"] == 4


def test_an_index_of_another_version_is_refused(index: Path) -> None:
    with sqlite3.connect(index / "index.db") as db:
        db.execute("UPDATE settings SET value = '99' WHERE key = 'version'")
    for words in (("search", index, "mask"), ("index", "info", index), ("index", "delete", index, "code.py")):
        assert "has format 99" in refused(*words)


def test_a_second_writer_is_refused_and_readers_go_on(index: Path, docs: Path) -> None:
    with Index.open(index) as writer, writer._store.writing():
        assert "is being written by another process" in refused("index", "add", index, docs)
        assert document("search", index, "causal")["hits"][0]["id"] == "masks.md"


def test_a_full_disk_is_refused_and_nothing_is_lost(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = rows_file(tmp_path / "rows.jsonl", {"id": "x", "text": "a cake"})
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.numpy.save_file", full)
        assert "is full; what was committed before is kept" in refused("index", "add", index, file)
    assert document("index", "info", index, "--verify")["documents"] == 4
    assert document("index", "add", index, file)["added"] == 1


def test_a_corrupt_segment_is_named_and_the_rest_stays_searchable(index: Path, tmp_path: Path) -> None:
    run("index", "add", index, rows_file(tmp_path / "rows.jsonl", {"id": "x", "text": "a causal cake"}))
    file = min((index / "segments").iterdir())
    file.write_bytes(file.read_bytes()[:-7])
    result = run("search", index, "causal")
    assert f"the segment {file} is damaged" in result.stderr.replace("\n", " ")
    assert result.stdout.startswith(" 1. x")


def test_a_query_beyond_the_context_and_a_changed_encoder_are_refused(
    docs: Path, encoder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "dense"
    run("index", docs, "-o", path, "--encoder", encoder)
    assert "tokens; the encoder" in refused("search", path, "word " * 5000)
    assert document("search", path, "mask")["hits"]
    file = encoder / "model.safetensors"
    tensors = load_file(file)
    name = max(tensors, key=lambda name: tensors[name].numel())
    save_file({**tensors, name: tensors[name] + 1}, file, {"format": "pt"})
    for words in (("search", path, "mask"), ("index", "add", path, docs)):
        assert "vectors of two spaces are never mixed" in refused(*words)


# --- milvus ----------------------------------------------------------------------------------------------------------


def test_a_store_takes_the_place_of_the_index(index: Path, docs: Path) -> None:
    url = "milvus:///x/file.db/texts"
    assert "takes the place of INDEX" in refused("search", index, "mask", "--store", url)
    assert "takes the place of INDEX" in refused("index", "info", index, "--store", url)
    assert "name -o INDEX or --store URL" in refused("index", docs, "-o", index, "--store", url)
    assert "--store has no page" in refused("search", "--serve", "--store", url)
    assert "accepted: milvus://host:port/name" in refused("search", "mask", "--store", "http://x/y")
    assert "the argument DOCS is missing" in refused("index", "add", index)


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["mean", "splade"])
def test_the_commands_work_on_milvus_lite(docs: Path, encoder: Path, tmp_path: Path, pooling: str) -> None:
    pytest.importorskip("milvus_lite")
    url = f"milvus://{tmp_path}/store.db/texts"
    store = ("--store", url)
    assert "does not exist" in refused("search", "mask", *store)
    first = document("index", docs, *store, "--encoder", encoder, "--pooling", pooling)
    assert (first["added"], first["documents"]) == (4, 4)
    assert document("index", docs, *store, "--encoder", encoder, "--pooling", pooling)["unchanged"] == 4
    assert "has chunk 2000 instead of 500" in refused("index", docs, *store, "--chunk", "500")
    assert "has pooling" in refused("index", docs, *store, "--pooling", "cls")
    text = "a sparse vector of words"
    added = document("index", "add", rows_file(tmp_path / "rows.jsonl", {"id": 7, "text": text, "year": 2024}), *store)
    assert (added["added"], added["documents"]) == (1, 5)
    hits = {hit["id"]: hit for hit in document("search", text, "--explain", *store)["hits"]}
    assert set(hits) == {*PAGES, "7"}
    kind = "sparse" if pooling == "splade" else "dense"
    assert (hits["7"]["metadata"], set(hits["7"]["parts"])) == ({"year": 2024}, {kind})
    # Weights of an untrained sparse encoder are no similarity.
    assert hits["7"]["rank"] == 1 or kind == "sparse"
    assert [hit["id"] for hit in document("search", text, "--filter", "type=md", *store)["hits"]] == ["masks.md"]
    pairs = tmp_path / "pairs.csv"
    pairs.write_text(f"query,document\n{text},7\n")
    (result,) = document("evaluate", *store, "--pairs", pairs)
    assert (result["R@10"], result["missing"], result["bytes"]) == (1, 0, None)
    assert "nDCG@10" in run("evaluate", *store, "--pairs", pairs, "-o", tmp_path / "report.html").stdout
    assert document("index", "info", *store)["documents"] == 5
    assert document("index", "delete", "7", *store)["documents"] == 4
    assert "nothing was deleted" in refused("index", "delete", "7", *store)
    assert document("index", "delete", "--filter", "type=md", *store) == {"index": url, "deleted": 1, "documents": 3}


# --- evaluate --------------------------------------------------------------------------------------------------------


def test_evaluate_compares_indexes_and_writes_a_report(index: Path, docs: Path, tmp_path: Path) -> None:
    other = tmp_path / "unstemmed"
    run("index", docs, "-o", other, "--language", "none")
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("query,document\nprune weights,prune.rst\ncausal mask,masks.md\n")
    report = tmp_path / "report.html"
    words = ("evaluate", index, other, "--pairs", pairs, "-o", report)
    results = document(*words)
    assert [result["index"] for result in results] == ["index", "unstemmed"]
    assert results[0]["nDCG@10"] == 1
    assert report.read_text(encoding="utf-8").count("<svg") == 2
    shown = run(*words).stdout
    assert "nDCG@10" in shown
    assert shown.rstrip().endswith("report.html")


def test_evaluate_reads_judgements(index: Path, tmp_path: Path) -> None:
    (tmp_path / "qrels").write_text("1 0 masks.md 1\n")
    (tmp_path / "queries.tsv").write_text("1\tcausal mask\n")
    (result,) = document("evaluate", index, "--qrels", tmp_path / "qrels", "--queries", tmp_path / "queries.tsv")
    assert result["RR@10"] == 1
    for words in (
        (),
        ("--qrels", "x"),
        ("--pairs", "x", "--qrels", "y", "--queries", "z"),
        ("--pairs", "x", "--queries", "y"),
    ):
        assert "evaluate takes --pairs FILE, or --qrels FILE" in refused("evaluate", index, *words)


# --- demo ------------------------------------------------------------------------------------------------------------


def test_the_search_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With BM25 only and three documents; the real one is a slow test."""
    pairs = [
        Pair("stdlib", "m", name, f"{query}, a summary", f"The {query} in the body of a docstring.")
        for name, query in (("a", "apple pie"), ("b", "banana split"), ("b", "cherry cake"))
    ]
    monkeypatch.setattr(demo_search, "distinct_pairs", lambda: pairs)
    monkeypatch.setattr(
        demo_search, "INDEXES", (("bm25", {"kind": "bm25"}), ("plain", {"kind": "bm25", "language": "none"}))
    )
    output = tmp_path / "demo"
    found = demo_search.demo(output)
    assert [result["RR@10"] for result in found["results"]] == [1, 1]
    assert set(found["examples"]) == set(demo_search.QUERIES)
    assert {path.name for path in output.iterdir()} == {"report.json", "report.html", "bm25", "plain"}
    with Index.open(output / "bm25") as index:
        assert len(index) == 3
    console = Console(width=100, record=True)
    for table in demo_search.tables(found):
        console.print(table)
    assert "MRR@10" in console.export_text()
    assert demo_search.demo(output)["results"][0]["RR@10"] == 1  # its own output is replaced


def test_an_unknown_topic_is_refused() -> None:
    assert "the demo has no topic 'serch'; did you mean search?" in refused("demo", "serch")


@pytest.mark.slow
def test_the_search_demo_on_the_standard_library(tmp_path: Path) -> None:
    found = demo_search.demo(tmp_path / "demo")
    scores = {result["index"]: result["RR@10"] for result in found["results"]}
    assert min(scores.values()) > 0.25
    assert scores["minilm"] > scores["splade-tiny"]
    assert all(result["missing"] == 0 for result in found["results"])
