from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intaglio.data import assets
from intaglio.data.texts import Corpus, calibration_and_held_out, cut_at_blank_lines, document_hash, load_texts
from intaglio.errors import IntaglioError

DOCUMENTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), max_size=30)


def many(n: int, offset: int = 0) -> Corpus:
    return Corpus("many", tuple(f"document number {i + offset}" for i in range(n)))


def test_a_hash_is_of_the_words_not_of_the_white_space() -> None:
    # The value is SHA-256 of "a b", computed with coreutils.
    assert document_hash("  a\n\t b ") == "c8687a08aa5d6ed2044328fa6a697ab8e96dc34291e8c2034ae8c38e6fcc6d65"
    assert document_hash("  a\n\t b ") == document_hash("a b")
    assert document_hash("ab") != document_hash("a b")


def test_blank_and_repeated_documents_are_dropped_and_the_first_stays() -> None:
    corpus = Corpus("c", ("b", "a", " \n", "", "a ", "b", "c"))
    assert corpus.documents == ("b", "a", "c")
    assert corpus.hashes == tuple(map(document_hash, "bac"))


def test_the_digest_does_not_depend_on_the_order() -> None:
    assert Corpus("x", ("a", "b")).digest == Corpus("y", ("b", "a", "a")).digest
    assert Corpus("x", ("a", "b")).digest != Corpus("x", ("a", "c")).digest


def test_half_a_character_is_refused() -> None:
    with pytest.raises(IntaglioError, match=r"document 2 .* lone surrogate"):
        Corpus("c", ("fine", "\ud800"))


@given(DOCUMENTS, st.floats(0.01, 0.99), st.randoms(use_true_random=False))
def test_a_split_is_a_partition_that_order_and_company_do_not_change(
    documents: list[str], share: float, shuffler: random.Random
) -> None:
    corpus = Corpus("c", tuple(documents))
    train, held_out = corpus.split(share)
    assert not set(train.hashes) & set(held_out.hashes)
    assert sorted(train.documents + held_out.documents) == sorted(corpus.documents)
    mixed = [*corpus.documents, "one more", "and another"]
    shuffler.shuffle(mixed)
    train_2, held_out_2 = Corpus("c", tuple(mixed)).split(share)
    assert set(train.hashes) <= set(train_2.hashes)
    assert set(held_out.hashes) <= set(held_out_2.hashes)


def test_the_split_follows_the_hash_and_keeps_the_share() -> None:
    train, held_out = many(5000).split()
    assert all(int(h[:8], 16) % 1000 < 200 for h in held_out.hashes)
    assert all(int(h[:8], 16) % 1000 >= 200 for h in train.hashes)
    # 5,000 draws with probability 0.2 have a standard deviation of 28.
    assert abs(len(held_out) - 1000) < 140


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_a_share_outside_of_the_unit_interval_is_refused(share: float) -> None:
    with pytest.raises(IntaglioError, match="share_held_out"):
        many(3).split(share)


def test_without_drops_by_hash() -> None:
    assert many(4).without([document_hash("document number 1"), "unknown"]).documents == (
        "document number 0",
        "document number 2",
        "document number 3",
    )


@given(DOCUMENTS, DOCUMENTS)
def test_calibration_and_held_out_never_overlap(first: list[str], second: list[str]) -> None:
    calibration, evaluation = Corpus("a", tuple(first)), Corpus("b", tuple(second))
    try:
        left, right = calibration_and_held_out(calibration, evaluation)
    except IntaglioError:
        # Only these may be refused: nothing to calibrate on, nothing left to measure on, or one set too small to split.
        same = set(calibration.hashes) == set(evaluation.hashes)
        assert not len(calibration) or set(evaluation.hashes) <= set(calibration.hashes)
        assert not same or not all(map(len, calibration.split()))
        return
    assert len(left)
    assert len(right)
    assert not set(left.hashes) & set(right.hashes)
    assert set(left.hashes) <= set(calibration.hashes)
    assert set(right.hashes) <= set(evaluation.hashes)


def test_the_same_texts_are_split_and_others_lose_what_is_shared() -> None:
    corpus = many(100)
    shuffled = Corpus("other name", corpus.documents[::-1])
    assert calibration_and_held_out(corpus, shuffled) == corpus.split()
    calibration, held_out = calibration_and_held_out(corpus, many(100, offset=90))
    assert calibration == corpus
    assert held_out.documents == tuple(f"document number {i}" for i in range(100, 190))


def test_texts_that_cannot_be_kept_apart_are_refused() -> None:
    with pytest.raises(IntaglioError, match="too few documents"):
        calibration_and_held_out(many(1), many(1))
    with pytest.raises(IntaglioError, match="also in the calibration"):
        calibration_and_held_out(many(10), many(5))
    with pytest.raises(IntaglioError, match="are empty"):
        calibration_and_held_out(many(0), many(5))


def test_a_list_of_strings_and_a_corpus_come_back() -> None:
    corpus = load_texts(["one", "two", "one"])
    assert corpus.documents == ("one", "two")
    assert load_texts(corpus) is corpus


@given(st.lists(st.text(st.sampled_from("ab \n"), min_size=1, max_size=40), max_size=12), st.integers(1, 60))
def test_pieces_are_whole_paragraphs_in_order(parts: list[str], characters: int) -> None:
    text = "\n\n".join(parts)

    def paragraphs(piece: str) -> list[str]:
        found: list[list[str]] = [[]]
        for line in piece.split("\n"):
            if line.strip():
                found[-1].append(line)
            elif found[-1]:
                found.append([])
        return ["\n".join(lines) for lines in found if lines]

    pieces = list(cut_at_blank_lines(text, characters))
    assert [p for piece in pieces for p in paragraphs(piece)] == paragraphs(text)
    assert all(len(piece) <= characters or len(paragraphs(piece)) <= 1 for piece in pieces)


def test_a_text_file_is_cut_near_two_thousand_characters(tmp_path: Path) -> None:
    paragraph = "word " * 99 + "end."  # 499 characters: with its gap 501, so three fit and four do not.
    file = tmp_path / "book.txt"
    file.write_bytes(
        b"\xef\xbb\xbf" + "\r\n\r\n".join(f"{i}{paragraph}" for i in range(9)).encode() + b"\r\n \r\n" + b"x" * 5000
    )
    corpus = load_texts(file)
    assert [len(d) for d in corpus.documents] == [1504, 1504, 1504, 5000]
    assert corpus.documents[0].startswith("0word")
    assert "\r" not in "".join(corpus.documents)


def test_code_keeps_its_indentation(tmp_path: Path) -> None:
    file = tmp_path / "code.py"
    file.write_text("class A:\n    x = 1\n\n\n    def f(self):\n        return 2\n")
    assert load_texts(str(file)).documents == ("class A:\n    x = 1\n\n\n    def f(self):\n        return 2",)


def test_a_folder_is_read_in_sorted_order_without_hidden_and_binary_files(tmp_path: Path) -> None:
    for name, content in {
        "b.txt": b"second",
        "a/z.md": b"first\n\nstill first",
        "c.bin": b"\0\1",
        "d.txt": "caf\xe9".encode("latin-1"),
        ".hidden": b"no",
        ".git/config": b"no",
        "e.txt": b"second",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert load_texts(tmp_path).documents == ("first\n\nstill first", "second")


def test_json_and_jsonl(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    # U+2028 is legal inside a JSON string, and is no line end here.
    lines.write_text('{"text": "one\u2028more", "n": 1}\n\n{"text": "two"}\n', encoding="utf-8")
    assert load_texts(lines).documents == ("one\u2028more", "two")
    listed = tmp_path / "a.json"
    listed.write_text(json.dumps(["one", {"body": "two"}]))
    assert load_texts(listed, field="body").documents == ("one", "two")


BAD_FILES = {
    "binary.txt": (b"ab\0c", "binary .*offset 2"),
    "latin.txt": ("ab\xe9c".encode("latin-1"), "not UTF-8 .*byte offset 2"),
    "empty.txt": (b"", "hold no document"),
    "blank.md": (b" \n\n \n", "hold no document"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": ', "line 2 of .* is not JSON"),
    "field.jsonl": (b'{"text": "a"}\n{"body": "b", "id": 1}', "line 2 of .* no field 'text'; it has: body, id"),
    "number.jsonl": (b'{"text": 1}', "'text' of line 1 of .* is a number"),
    "null.jsonl": (b'{"text": null}', "is null; only a string"),
    "string.jsonl": (b'"a"', "line 1 of .* is a string; an object"),
    "object.json": (b'{"text": "a"}', "are an object; a list"),
    "item.json": (b'["a", ["b"]]', "item 1 of .* is a list"),
    "broken.json": (b"[", "are not JSON"),
    "surrogate.json": (b'["\\ud800"]', "lone surrogate"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_answered_by_one_sentence(name: str, tmp_path: Path) -> None:
    content, sentence = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(IntaglioError, match=sentence) as caught:
        load_texts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_other_bad_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hollow").mkdir()
    for source, sentence in [
        ("wikipdia", "did you mean wikipedia"),
        ("data/file.txt", "no file, no folder"),
        ("./some/place", "no file, no folder"),
        ("a/b/c", "no file, no folder"),
        ("", "is empty"),
        ("hollow", "hold no document"),
        ([], "hold no document"),
        (["a", 3], r"texts\[1\] is int"),
        (7, "texts is int"),
    ]:
        with pytest.raises(IntaglioError, match=sentence):
            load_texts(source)  # type: ignore[arg-type]


def test_the_bundled_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTAGLIO_HOME", str(tmp_path))
    with pytest.raises(IntaglioError, match="run `intaglio assets`"):
        load_texts("wikipedia")
    (tmp_path / "texts.jsonl").write_text('{"title": "A", "text": "About A."}\n')
    monkeypatch.setattr(assets, "path", lambda name: tmp_path)
    corpus = load_texts("wikipedia")
    assert (corpus.name, corpus.documents) == ("wikipedia", ("About A.",))


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows(list[dict[str, object]]):
        column_names = ("text", "n")

    def load_dataset(name: str, split: str, streaming: bool) -> Rows:
        assert not streaming
        if name == "no/net":
            raise ConnectionError("cannot reach the hub\nlong trace")
        return Rows([{"text": f"{name} {split}", "n": 1}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_texts("user/name").documents == ("user/name train",)
    assert load_texts("user/name:test[:5%]").documents == ("user/name test[:5%]",)
    with pytest.raises(IntaglioError, match="no field 'body'; it has: text, n"):
        load_texts("user/name", field="body")
    with pytest.raises(IntaglioError, match="is a number; only a string"):
        load_texts("user/name", field="n")
    with pytest.raises(IntaglioError, match=r"cannot be loaded: cannot reach the hub$"):
        load_texts("no/net")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(IntaglioError, match=r"pip install 'intaglio\[datasets\]'"):
        load_texts("user/name")
