"""Texts that are read as they are needed."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from intaglio.data.streaming import TextStream
from intaglio.data.texts import document_hash, load_texts
from intaglio.errors import IntaglioError


def lines(path: Path, *texts: Any) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def test_each_kind_of_source_gives_the_documents_of_the_whole(tmp_path: Path, paragraphs: list[str]) -> None:
    jsonl = lines(tmp_path / "a.jsonl", *paragraphs)
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, text in enumerate(paragraphs[:5]):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    for source in (jsonl, str(folder)):
        stream = TextStream(source)
        assert list(stream) == list(stream) == list(load_texts(source).documents)


def test_a_text_file_is_cut_between_paragraphs_and_loses_nothing(tmp_path: Path, paragraphs: list[str]) -> None:
    file = tmp_path / "a.txt"
    file.write_text("\n\n".join(paragraphs), encoding="utf-8")
    found = list(TextStream(str(file)))
    assert len(found) > 10
    assert [p for document in found for p in document.split("\n\n")] == paragraphs
    assert max(map(len, found)) < 2500


def test_documents_are_left_out_by_hash_and_blank_ones_always(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", "one", " ", "two", "three")
    assert list(TextStream(source, {document_hash("two")})) == ["one", "three"]


def test_a_large_file_is_never_in_memory(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for number in range(4000):
            out.write(json.dumps({"text": f"{number} " + "x" * 5000}) + "\n")
    tracemalloc.start()
    assert sum(1 for _ in TextStream(str(file))) == 4000
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < file.stat().st_size / 50
    assert next(iter(TextStream(str(file)))).startswith("0 ")


def test_a_data_set_of_the_hub_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load(name: str, *, split: str, streaming: bool) -> Any:
        asked.append((name, split, streaming))
        return iter([{"text": "one"}, {"text": "two"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(TextStream("user/texts:validation")) == ["one", "two"]
    assert list(TextStream("user/texts")) == ["one", "two"]
    assert asked == [("user/texts", "validation", True), ("user/texts", "train", True)]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"text": "a"}\n{', "line 2 of .* is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"body": 1}', "line 2 of .* has no field 'text'; it has: body"),
        ("a.jsonl", b"\xff\xfe", "are not UTF-8"),
        ("a.txt", b"\xff\xfe", "are not UTF-8"),
        ("a.json", b"[]", "are a JSON list, which is read whole"),
        ("none", None, "are no file, no folder and no bundled name"),
    ],
)
def test_bad_input_is_one_sentence(name: str, content: bytes | None, sentence: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(IntaglioError, match=sentence) as caught:
        list(TextStream(str(tmp_path / name) if content is not None else name))
    assert "\n" not in str(caught.value)
