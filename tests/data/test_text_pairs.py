"""Pairs of texts: accepted forms, and one sentence for each malformed line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from intaglio.data.text_pairs import TextPair, as_pair, load_text_pairs
from intaglio.errors import IntaglioError


@pytest.mark.parametrize(
    ("given", "pair"),
    [
        ({"query": "q", "positive": "p"}, TextPair("q", "p")),
        ({"anchor": "q", "document": "p", "negative": "n"}, TextPair("q", "p", ("n",))),
        ({"query": "q", "positive": "p", "negatives": ["n", "m"], "id": 3}, TextPair("q", "p", ("n", "m"))),
        ({"query": "q", "positive": "p", "negatives": None}, TextPair("q", "p")),
        ({"query": "q", "positive": "p", "negatives": ["n"], "scores": [2, 1.5]}, TextPair("q", "p", ("n",), (2, 1.5))),
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
    ],
)
def test_a_malformed_pair_is_named(given: Any, says: str, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"query": "q", "positive": "p"}) + "\n" + json.dumps(given) + "\n")
    with pytest.raises(IntaglioError, match=says) as caught:
        load_text_pairs(file)
    assert str(caught.value).startswith(f"line 2 of {file}")
    assert "\n" not in str(caught.value)


def test_a_file_is_read_in_order(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"query": f"q{n}", "positive": "p"}) + "\n" for n in range(3)))
    assert [pair.query for pair in load_text_pairs(file)] == ["q0", "q1", "q2"]


@pytest.mark.slow
def test_the_bundled_pairs_are_distinct() -> None:
    pairs = load_text_pairs("docstrings")
    assert len(pairs) > 1000
    assert len({pair.query for pair in pairs}) == len({pair.positive for pair in pairs}) == len(pairs)
