"""Readers and chunks."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intaglio.errors import IntaglioError
from intaglio.search import Document, read_documents
from intaglio.search import documents as module
from intaglio.search.documents import chunk_spans, html_text


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_a_folder_is_read_in_order_with_relative_paths_as_ids(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "b.md": "intro\n# The title #\ntext",
            "a/page.html": "<title>A &lt;b&gt;</title><script>x()</script><p>one</p><p>two",
            "code.py": '"""Summary line.\n\nMore."""\n',
            "note.rst": "Heading\n=======\ntext\r\nmore",
            ".hidden/x.md": "no",
            "image.png": b"\x89PNG",
        },
    )
    read = {document.id: document for document in read_documents(tmp_path)}
    assert list(read) == ["b.md", "code.py", "note.rst", "a/page.html"]
    assert [d.title for d in read.values()] == ["The title", "Summary line.", "Heading", "A <b>"]
    assert read["a/page.html"].text == "one\n\ntwo"
    assert read["note.rst"].text.endswith("text\nmore")
    assert read["b.md"].metadata == {"path": "b.md", "type": "md"}


def test_files_that_are_no_text_are_skipped_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    write(tmp_path, {"a.txt": b"ok", "b.txt": b"\0binary", "c.txt": b"caf\xe9", "d.txt": b"x" * 1001})
    skipped: list[str] = []
    assert [d.id for d in read_documents(tmp_path, skipped=skipped)] == ["a.txt"]
    assert "binary (a zero byte at offset 0)" in skipped[0]
    assert "not UTF-8 (byte offset 3)" in skipped[1]
    assert "files up to" in skipped[2]


def test_a_folder_without_documents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IntaglioError, match=r"holds no document; files that are read: .*\.md"):
        list(read_documents(tmp_path))


def test_json_lines_keep_further_fields_as_metadata(tmp_path: Path) -> None:
    rows = [{"id": 7, "text": "one", "title": "T", "year": 2000}, {"_id": "x", "text": "two"}, {"text": "three"}]
    write(tmp_path, {"rows.jsonl": "\n\n".join(map(json.dumps, rows))})
    read = list(read_documents(tmp_path / "rows.jsonl"))
    assert read[0] == Document("7", "one", "T", {"year": 2000})
    assert read[1].id == "x"
    assert read[2].id == next(iter(read_documents([{"text": "three"}]))).id  # by content


def test_csv_columns_are_fields(tmp_path: Path) -> None:
    write(tmp_path, {"rows.csv": 'key,body,lang\n1,"two\nlines, quoted",en\n', "rows.tsv": "id\ttext\n1\ta\n"})
    (row,) = read_documents(tmp_path / "rows.csv", text_field="body", id_field="key")
    assert row == Document("1", "two\nlines, quoted", "", {"lang": "en"})
    assert next(read_documents(tmp_path / "rows.tsv")).text == "a"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", '{"text": "ok"}\n{"text": ', r"line 2 of .*a.jsonl is not JSON"),
        ("a.jsonl", '{"body": "x"}', r"the field 'text' of line 1 .* is missing; it has: body"),
        ("a.jsonl", '{"text": 3}', r"the field 'text' of line 1 .* is not text"),
        ("a.jsonl", "[1]", r"line 1 .* is no object"),
        ("a.jsonl", '{"id": [1], "text": "x"}', r"the field 'id' of line 1 .* is \[1\]"),
        ("a.jsonl", '{"text": "\\ud800"}', r"line 1 .* half a character"),
        ("a.jsonl", b'{"text": "caf\xe9"}', r"line 1 .* is not UTF-8 \(byte offset 13\)"),
        ("a.jsonl", '{"text": "' + "x" * 2000 + '"}', r"line 1 .* is longer than"),
        ("a.csv", "id,text\n1\n", r"line 2 .* does not have the 2 columns"),
        ("a.csv", 'id,text\n1,"x', r"line 2 .* is not CSV: unexpected end"),
        ("a.txt", b"\0", "is binary"),
    ],
)
def test_malformed_rows_are_refused_with_their_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str | bytes, sentence: str
) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    write(tmp_path, {name: content})
    with pytest.raises(IntaglioError, match=sentence):
        list(read_documents(tmp_path / name))


def test_a_source_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IntaglioError, match="do not exist; accepted: a folder"):
        list(read_documents(tmp_path / "nowhere"))


def test_rows_of_a_data_set_are_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str, streaming: bool) -> list[dict[str, Any]]:
        assert (name, split, streaming) == ("user/set", "test", True)
        return [{"text": "one", "label": 1}, {"id": "own", "text": "two"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    read = list(read_documents("user/set:test"))
    assert [d.id for d in read] == ["test/0", "own"]
    assert read[0].metadata == {"label": 1}


def test_hidden_parts_of_a_page_are_left_out() -> None:
    page = "<style>p{}</style><p>a <b>bold</b>\n  word<br>next<noscript>no</noscript><template>t</template>"
    assert html_text(page) == ("", "a bold\nword\nnext")


@given(text=st.text(alphabet="ab .\n", max_size=300), size=st.integers(1, 60), words=st.none() | st.integers(1, 8))
def test_chunks_cover_the_text_in_order(text: str, size: int, words: int | None) -> None:
    too_long = None if words is None else lambda pieces: [len(piece.split()) > words for piece in pieces]
    spans = chunk_spans(text, size, too_long)
    covered = "".join(text[a:b] for a, b in spans)
    assert "".join(covered.split()) == "".join(text.split())
    assert all(b <= c for (_, b), (c, _) in itertools.pairwise(spans))
    assert all(0 < b - a <= size and not text[a].isspace() and not text[b - 1].isspace() for a, b in spans)
    assert words is None or all(len(text[a:b].split()) <= words for a, b in spans)


def test_a_chunk_ends_at_a_blank_line_before_a_sentence_before_a_word() -> None:
    assert next(b for _, b in chunk_spans("one two. three\n\nfour five six", 20)) == 14
    assert next(b for _, b in chunk_spans("one two three. four five six", 20)) == 14
    assert next(b for _, b in chunk_spans("one two three four five six", 20)) == 18
    assert chunk_spans("x" * 50, 20) == [(0, 20), (20, 40), (40, 50)]
    assert chunk_spans("  whole text \n", 0) == [(2, 12)]
