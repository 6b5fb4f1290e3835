"""Labelled words: read from files, put on tokens by their places, cut into rows between words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intaglio.data.token_classification import Labelled, as_labelled, found_labels, read_labelled, rows
from intaglio.errors import IntaglioError
from tests.families import BOS, EOS, tiny_tokenizer

PLAIN, ENCODER = tiny_tokenizer("llama"), tiny_tokenizer("bert")


def test_both_forms_are_one() -> None:
    joined = as_labelled({"words": ["EU", "rejects"], "labels": ["B-ORG", "O"]}, "it")
    assert joined == Labelled("EU rejects", ((0, 2), (3, 10)), ("B-ORG", "O"))
    placed = {"passage": "EU rejects", "spans": [[0, 2], [3, 10]], "labels": ["B-ORG", "O"]}
    assert as_labelled(placed, "it") == joined
    assert as_labelled({"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]}, "it") == joined
    assert as_labelled({"words": ["a"], "labels": [3]}, "it").labels == ("3",)
    assert as_labelled({"words": ["a"], "labels": [None]}, "it").labels == (None,)


@pytest.mark.parametrize(
    ("example", "words"),
    [
        ({"words": ["a"]}, "it has no labels; .* not words"),
        ({}, "not nothing"),
        ({"labels": ["x"]}, "it has no words"),
        ({"words": ["a", "b"], "labels": ["x"]}, "it has 1 labels for 2 words"),
        ({"words": ["a", " "], "labels": ["x", "y"]}, "it: word 1 is ' '; at least one letter"),
        ({"words": [3], "labels": ["x"]}, "it: word 0 is 3"),
        ({"passage": "abc", "spans": [[0, 4]], "labels": ["x"]}, r"the span \[0, 4\]; start and end inside its 3"),
        ({"passage": "abc", "spans": [[1, 1]], "labels": ["x"]}, r"the span \[1, 1\]"),
        ({"passage": "abc", "spans": [[0, 2], [1, 3]], "labels": ["x", "y"]}, "in order and not overlapping"),
        ({"passage": "abc", "spans": [["0", 1]], "labels": ["x"]}, "the span"),
        ({"passage": "abc", "labels": ["x"]}, "it has 1 labels for 0 words"),
    ],
)
def test_malformed_examples_are_refused(example: dict[str, Any], words: str) -> None:
    with pytest.raises(IntaglioError, match=words):
        as_labelled(example, "it")


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [{"words": ["a"], "labels": ["x"]}, {"text": "b c", "spans": [[2, 3]], "labels": ["y"]}]
    path.write_text("\n\n".join(map(json.dumps, lines)), encoding="utf-8")
    found = read_labelled(path)
    assert [as_labelled(example, "it").labels for example in found] == [("x",), ("y",)]
    assert found_labels([as_labelled(example, "it") for example in found]) == ("x", "y")
    for content, words in (
        ("", "has no labelled examples"),
        ("[1]", "line 1 of .* is not a JSON object"),
        ('{"words": ["a"], "labels": ["x"]}\n{', "line 2 of .* is not a JSON object"),
        ('{"words": ["a"]}', "line 1 of .* has no labels"),
    ):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(IntaglioError, match=words):
            read_labelled(path)
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(IntaglioError, match="it is not UTF-8"):
        read_labelled(path)
    with pytest.raises(IntaglioError, match="No such file"):
        read_labelled(tmp_path / "none")
    with pytest.raises(IntaglioError, match="have 1 different labels; at least two"):
        found_labels([as_labelled({"words": ["a"], "labels": ["x"]}, "it")])


@given(st.lists(st.text("abcdefgh xyz,é", min_size=1).filter(str.strip), min_size=1, max_size=12), st.integers(3, 20))
def test_every_word_bears_its_label_once_on_a_token_of_its_own(words: list[str], length: int) -> None:
    words = ["".join(word.split()) for word in words]
    example = as_labelled({"words": words, "labels": ["x"] * len(words)}, "it")
    whole = PLAIN(example.text, add_special_tokens=False, return_offsets_mapping=True)
    first, last = list(rows(PLAIN, example, length, "first")), list(rows(PLAIN, example, length, "last"))
    for cut in (first, last):
        assert torch.cat([row.ids_T for row in cut]).tolist() == whole["input_ids"]
        assert all(len(row.ids_T) == len(row.word_T) <= length for row in cut)
        borne = torch.cat([row.word_T for row in cut])
        assert borne[borne >= 0].tolist() == list(range(len(words)))
        for token in (borne >= 0).nonzero().flatten().tolist():
            start, end = example.spans[int(borne[token])]
            offset = whole["offset_mapping"][token]
            assert offset[0] < end
            assert offset[1] > start
    places = [(torch.cat([row.word_T for row in cut]) >= 0).nonzero().flatten() for cut in (first, last)]
    assert (places[0] <= places[1]).all()


def test_the_first_and_the_last_token_of_a_word() -> None:
    example = as_labelled({"words": ["a", "zqzq", "b"], "labels": ["x", "y", "z"]}, "it")
    (first,), (last,) = (list(rows(PLAIN, example, 50, place)) for place in ("first", "last"))  # type: ignore[arg-type]
    inside = [n for n, (start, end) in enumerate(PLAIN(example.text, return_offsets_mapping=True)["offset_mapping"])
              if start < 6 and end > 2]  # fmt: skip
    assert len(inside) > 1
    assert first.word_T.tolist().index(1) == inside[0]
    assert last.word_T.tolist().index(1) == inside[-1]


def test_rows_are_cut_between_words_and_special_tokens_go_around_each() -> None:
    example = as_labelled({"words": ["zqzq", "zqzq", "zqzq"], "labels": ["x", "y", "z"]}, "it")
    found = list(rows(ENCODER, example, 8, "last"))
    assert len(found) > 1
    for row in found:
        assert (int(row.ids_T[0]), int(row.ids_T[-1])) == (BOS, EOS)
        assert (int(row.word_T[0]), int(row.word_T[-1])) == (-1, -1)
        assert (row.word_T >= 0).sum() <= 1
    # A word that is longer than a row is cut all the same, and has one label.
    cut = list(rows(ENCODER, example, 4, "last"))
    assert sorted(word for row in cut for word in row.word_T.tolist() if word >= 0) == [0, 1, 2]
    with pytest.raises(IntaglioError, match="length is 2; rows need room"):
        list(rows(ENCODER, example, 2, "last"))


def test_a_word_without_a_token_of_its_own_has_no_label() -> None:
    (row,) = rows(
        PLAIN, as_labelled({"passage": "the", "spans": [[0, 1], [1, 3]], "labels": ["x", "y"]}, "it"), 9, "first"
    )
    ids = PLAIN("the")["input_ids"]
    assert row.word_T.tolist() == ([0] if len(ids) == 1 else [0, *row.word_T.tolist()[1:]])


def test_a_tokenizer_that_tells_no_places_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(IntaglioError, match="needs a fast tokenizer"):
        list(rows(Slow(), Labelled("a", ((0, 1),), ("x",)), 9, "first"))
