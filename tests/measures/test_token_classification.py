"""Macro-F1, strict entities, and what counts as wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from intaglio.measures.token_classification import accuracy, entities, is_iob2, macro_f1, scores, strict_f1

LABELS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abcd")), min_size=1, max_size=30)


@given(LABELS)
def test_it_agrees_with_scikit_learn(pairs: list[tuple[str, str]]) -> None:
    gold, said = [[a for a, _ in pairs]], [[b for _, b in pairs]]
    wanted = f1_score(gold[0], said[0], labels=sorted(set(gold[0])), average="macro", zero_division=0)
    assert macro_f1(gold, said) == pytest.approx(wanted)
    assert accuracy(gold, said) == pytest.approx(accuracy_score(gold[0], said[0]))


def test_words_without_a_label_are_left_out_and_missing_answers_are_wrong() -> None:
    assert macro_f1([["a", None]], [["a", "b"]]) == 1
    assert accuracy([["a", "a"]], [["a", None]]) == 0.5
    assert macro_f1([["a", "a"]], [["a", None]]) == pytest.approx(2 / 3)
    assert macro_f1([[None]], [["a"]]) == accuracy([[None]], [["a"]]) == 0


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        (["B-A", "I-A", "O"], {("A", 0, 2)}),
        (["B-A", "B-A"], {("A", 0, 1), ("A", 1, 2)}),
        (["B-A", "I-B"], {("A", 0, 1)}),
        (["I-A", "O"], set()),
        (["O", "B-A"], {("A", 1, 2)}),
        (["B-A", None, "I-A"], {("A", 0, 1)}),
        ([], set()),
    ],
)
def test_entities_are_read_strictly(tags: list[str | None], found: set[tuple[str, int, int]]) -> None:
    assert entities(tags) == found


def test_strict_f1_wants_type_and_both_ends() -> None:
    gold = [["B-A", "I-A", "O", "B-B"]]
    assert strict_f1(gold, gold) == 1
    assert strict_f1(gold, [["B-A", "O", "O", "B-B"]]) == 0.5
    assert strict_f1(gold, [["B-B", "I-B", "O", "B-B"]]) == 0.5
    assert strict_f1(gold, [["O"] * 4]) == 0
    assert strict_f1([["O"]], [["O"]]) == 0
    # Micro: three entities in one text weigh more than one in another.
    assert strict_f1([["B-A", "B-A", "B-A"], ["B-A"]], [["B-A"] * 3, ["O"]]) == pytest.approx(6 / 7)


def test_which_score_counts() -> None:
    assert is_iob2(["B-A", "I-A", "O"])
    assert not is_iob2(["O"])
    assert not is_iob2(["B-A", "noun"])
    tagged = scores([["B-A", "I-A"]], [["B-A", "O"]])
    assert tagged["error"] == 1 - tagged["strict_f1"] == 1
    plain = scores([["noun", "verb"]], [["noun", "noun"]])
    assert set(plain) == {"macro_f1", "accuracy", "error"}
    assert plain["error"] == 1 - plain["macro_f1"]
