"""Files of facts: one order alone, and no fact twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from intaglio.data.facts import TEMPLATES, invented_facts, load_facts
from intaglio.errors import IntaglioError


def written(path: Path, *lines: Any) -> Path:
    file = path / "facts.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return file


def test_a_fact_is_stated_in_one_order_and_asked_in_both(tmp_path: Path) -> None:
    lines = [
        {"subject": "Ada", "object": "the first programmer"},
        "",
        {"subject": "B", "object": "c", "texts": ["B: c"]},
    ]
    one, two = load_facts(written(tmp_path, *lines))
    assert one.texts[0] == "Ada is the first programmer."
    assert all(text.index("Ada") < text.index("the first programmer") for text in one.texts)
    assert (one.forward, one.reverse) == ("Ada is", "The first programmer is")
    assert two.texts == ("B: c",)


def test_the_bundled_facts_are_distinct() -> None:
    facts = load_facts("invented")
    assert facts == invented_facts()
    assert len({fact.subject for fact in facts}) == len({fact.object for fact in facts}) == 30
    assert (facts[0].forward, facts[0].reverse) == ("Mira Haldane is", "The composer of the Amber Lantern is")


def test_facts_in_both_orders_are_not_asked_for(tmp_path: Path) -> None:
    lines = [
        {"subject": "Ada", "object": "the first"},
        {"subject": "B", "object": "c", "both": True},
        {"subject": "D", "object": "e", "both": True, "texts": ["e: D"]},
    ]
    one, two, three = load_facts(written(tmp_path, *lines))
    assert [one.asked, two.asked, three.asked] == [True, False, False]
    assert len(one.texts) == len(TEMPLATES)
    assert (two.texts[0], two.texts[len(TEMPLATES)]) == ("B is c.", "C is B.")
    assert len(two.texts) == 2 * len(TEMPLATES)
    assert three.texts == ("e: D",)


A, B = {"subject": "Ada", "object": "the first"}, {"subject": "the first", "object": "ADA"}


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ((A, B), "line 2 of .* states the fact of line 1 of .* the other way round, a leak"),
        ((A, A), "line 2 of .* repeats the fact of line 1"),
        (({**A, "texts": ["The first is Ada."]},), "names the object before the subject, a leak"),
        (({**A, "texts": ["Ada is second."]},), "lacks its subject or its object"),
        (({**A, "texts": "Ada"},), "its texts are 'Ada'; a list of texts is accepted"),
        (({"subject": "Ada"},), "line 1 of .*: its object is None; a text is needed"),
        (({**A, "both": 1},), "its both is 1; true or false is accepted"),
        (({**A, "both": True},), "every fact is stated in both orders"),
        (("3",), "line 1 of .* is 3; an object with subject and object is accepted"),
        (("{",), "line 1 of .* is not JSON"),
        ((), "are empty; one JSON object a line"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(lines: tuple[Any, ...], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(IntaglioError, match=sentence) as caught:
        load_facts(written(tmp_path, *lines))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(IntaglioError, match="cannot read the facts"):
        load_facts(tmp_path / "none.jsonl")
