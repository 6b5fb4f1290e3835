"""Pairs of texts: accepted forms, and one sentence for each malformed line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from intaglio.data.labelled_texts import LabelledTexts
from intaglio.data.text_pairs import TextPair, as_pair, class_pairs, load_text_pairs
from intaglio.errors import IntaglioError


@pytest.mark.parametrize(
    ("given", "pair"),
    [
        ({"query": "q", "positive": "p"}, TextPair("q", "p")),
        ({"anchor": "q", "document": "p", "negative": "n"}, TextPair("q", "p", ("n",))),
        ({"query": "q", "positive": "p", "negatives": ["n", "m"], "id": 3}, TextPair("q", "p", ("n", "m"))),
        ({"query": "q", "positive": "p", "negatives": None}, TextPair("q", "p")),
        ({"query": "q", "positive": "p", "negatives": ["n"], "scores": [2, 1.5]}, TextPair("q", "p", ("n",), (2, 1.5))),
        (
            {"query": "q", "positive": "p", "task": "t", "instruction": "i", "symmetric": True},
            TextPair("q", "p", task="t", instruction="i", symmetric=True),
        ),
        ({"query": "q", "positive": "p", "task": "t", "symmetric": False}, TextPair("q", "p", task="t")),
        ({"query": "q", "positive": "p", "task": None, "instruction": "i"}, TextPair("q", "p", instruction="i")),
    ],
)
def test_accepted_forms(given: dict[str, Any], pair: TextPair) -> None:
    assert as_pair(given, "a pair") == pair
    assert as_pair(pair.row(), "a pair") == pair


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("text", "an object with query and positive"),
        ({"positive": "p"}, "has no query .nor anchor.; it has: positive"),
        ({"query": "q"}, "has no positive"),
        ({"query": " ", "positive": "p"}, "its query is empty"),
        ({"query": "q", "positive": ""}, "its positive is empty"),
        ({"query": "q", "positive": 3}, "its positive is 3"),
        ({"query": "q", "positive": "p", "negatives": ["n", ""]}, "one of its negatives is empty"),
        ({"query": "q", "positive": "p", "negatives": 4}, "a text or a list"),
        ({"query": "q", "positive": "p", "negatives": ["n"], "scores": [1]}, "2 numbers"),
        ({"query": "q", "positive": "p", "scores": [True]}, "1 numbers"),
        ({"query": "q", "positive": "p", "task": 3}, "its task is 3; only a string is accepted"),
        ({"query": "q", "positive": "p", "instruction": " "}, "its instruction is empty"),
        ({"query": "q", "positive": "p", "instruction": "i", "symmetric": 1}, "its symmetric is 1"),
        ({"query": "q", "positive": "p", "symmetric": True}, "true is accepted with an instruction"),
    ],
)
def test_a_malformed_pair_is_named(given: Any, says: str, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"query": "q", "positive": "p"}) + "\n" + json.dumps(given) + "\n")
    with pytest.raises(IntaglioError, match=says) as caught:
        load_text_pairs(file)
    assert str(caught.value).startswith(f"line 2 of {file}")
    assert "\n" not in str(caught.value)


def test_classes_become_pairs(tmp_path: Path) -> None:
    """Class label data become query/positive-example/negative-example triples (positives = text of same class)."""
    labelled = LabelledTexts(tuple("abcdefg"), ("x", "x", "x", "y", "y", "z", "y"))
    label = dict(zip(labelled.texts, labelled.labels, strict=True))
    pairs = class_pairs(labelled, negatives=3)
    assert sorted(pair.query for pair in pairs) == list("abcdeg")  # f is alone
    for pair in pairs:
        assert label[pair.positive] == label[pair.query] != label[pair.negatives[0]]
        assert pair.positive != pair.query
        assert len(set(pair.negatives)) == 3
        assert label[pair.query] not in {label[text] for text in pair.negatives}
    assert pairs == class_pairs(labelled, negatives=3) != class_pairs(labelled, negatives=3, seed=1)
    assert [len(pair.negatives) for pair in class_pairs(labelled)] == [4, 4, 4, 4, 4, 4]
    file = tmp_path / "classes.jsonl"
    file.write_text("".join(json.dumps({"text": text, "label": label[text]}) + "\n" for text in "abcdefg"))
    assert load_text_pairs(file) == class_pairs(labelled)
    with pytest.raises(IntaglioError, match="two classes are needed, and two texts in one of them"):
        class_pairs(LabelledTexts(("a", "b"), ("x", "x")))


def test_a_file_is_read_in_order(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"query": f"q{n}", "positive": "p"}) + "\n" for n in range(3)))
    assert [pair.query for pair in load_text_pairs(file)] == ["q0", "q1", "q2"]


@pytest.mark.slow
def test_the_bundled_pairs_are_distinct() -> None:
    pairs = load_text_pairs("docstrings")
    assert len(pairs) > 1000
    assert len({pair.query for pair in pairs}) == len({pair.positive for pair in pairs}) == len(pairs)
