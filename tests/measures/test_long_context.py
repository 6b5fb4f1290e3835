"""Long-context tasks: gold answers score 1, broken ones 0, contexts have the requested length."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from intaglio.errors import IntaglioError
from intaglio.measures.long_context import (
    PAPER,
    SMALL,
    MultipleChoice,
    OpenQuestion,
    QuestionedDocument,
    StoryFiltering,
    StoryMultiHop,
    VariableTracking,
    extracted,
    items,
    normal,
    numbered,
    overlap,
    read_documents,
    tasks,
    word_f1,
)

DOCUMENTS = (
    QuestionedDocument("Anna lives in Rome and keeps bees.", "Where does Anna live?", ("Rome",)),
    QuestionedDocument("Bert lives in Oslo and mends clocks.", "What does Bert mend?", ("clocks", "the clocks")),
    QuestionedDocument("Carl sells fish.", "What does Carl sell?", ("B",), ("meat", "fish", "bread")),
    QuestionedDocument("Dora paints and sings.", "What does Dora do?", ("AC",), ("paints", "runs", "sings")),
)
ALL = [*SMALL, *PAPER, OpenQuestion(DOCUMENTS), MultipleChoice(DOCUMENTS)]


def count(text: str) -> int:
    return len(text.split())


def sample(task: Any, seed: int = 0, tokens: int = 2000) -> Any:
    return task.sample(Random(seed), tokens, count)


def gold(task: Any, one: Any) -> str:
    if task.name in ("niah", "retrieval", "cwe"):
        text = "\n".join(f"{i}. {value}" for i, value in enumerate(one.gold, 1))
    else:
        text = {"vt": " ", "filtering": ", "}.get(task.name, "").join(one.gold[: 1 if task.name == "qa" else None])
    return f"I looked.\n<answer>{text}</answer>"


IDS = [f"{task.name}-{index}" for index, task in enumerate(ALL)]


@pytest.mark.parametrize("task", ALL, ids=IDS)
def test_the_gold_answer_scores_one_and_no_answer_scores_zero(task: Any) -> None:
    """An empty or unparsable answer is wrong (the official scorers skip some)."""
    for seed in range(4):
        one = sample(task, seed)
        assert one.score(gold(task, one)) == 1
        for broken in ("", "<answer></answer>", "I do not know.", gold(task, one).replace("<answer>", "")):
            assert one.score(broken) == 0


@pytest.mark.parametrize("task", ALL[:12], ids=IDS[:12])
def test_contexts_fill_the_length_and_hold_the_answer(task: Any) -> None:
    for tokens in (1500, 2200):
        one = sample(task, tokens=tokens)
        most_chapters = task.name in ("retrieval", "multi_hop", "filtering")
        assert count(one.context) <= tokens
        assert count(one.context) >= tokens * 0.9 - 60 or most_chapters
        assert all(answer in one.context for answer in one.gold)
    assert sample(task, 1) == sample(task, 1) or sample(task, 1).context == sample(task, 1).context
    assert sample(task, 1).context != sample(task, 2).context


@pytest.mark.parametrize("task", ALL[:12], ids=IDS[:12])
def test_a_short_context_is_refused(task: Any) -> None:
    with pytest.raises(IntaglioError, match="a context of 5 tokens"):
        sample(task, tokens=5)


def test_the_sizes_of_the_paper() -> None:
    niah, vt, cwe, retrieval, _, filtering = (sample(task, tokens=6000) for task in PAPER)
    assert len(niah.gold) == 4
    assert all(len(value) == 4 * 8 + 3 for value in niah.gold)
    assert (vt.context.count("= VAR"), len(vt.gold)) == (8 * 4, 5)
    words = [line.split(". ")[1] for line in cwe.context.splitlines()]
    assert sorted({words.count(word) for word in words}) == [3, 30]
    assert {word for word in words if words.count(word) == 30} == set(cwe.gold)
    assert len(cwe.gold) == 10
    assert len(retrieval.gold) == 16
    assert len(filtering.gold) == 3


def test_variables_follow_the_chain() -> None:
    one = sample(VariableTracking(chains=3, hops=2))
    value = one.question.split("value ")[1].split(",")[0]
    holds = {value}
    lines = dict(
        part.split(" = ")
        for part in one.context.replace(". ", "").replace("VAR", "\nVAR").splitlines()
        if " = " in part
    )
    assert value in one.context
    assert len(one.gold) == 3
    for name in one.gold:
        assert f"VAR {name} = " in one.context
    assert f"VAR {one.gold[0]} = {value}" in one.context
    assert f"VAR {one.gold[1]} = VAR {one.gold[0]}" in one.context
    assert f"VAR {one.gold[2]} = VAR {one.gold[1]}" in one.context
    assert holds
    assert lines is not None


def test_stories() -> None:
    one = sample(StoryMultiHop(), 3)
    later = one.question.split("before the ")[1][:-1]
    bought = [part.split(".")[0] for part in one.context.split("Arion bought the ")[1:]]
    assert bought[bought.index(later) - 1] == one.gold[0]
    one = sample(StoryFiltering(), 3)
    chapters = one.context.split("Chapter ")[1:]
    assert [c.split(".")[0] for c in chapters if "bought nothing" in c] == list(one.gold)
    assert one.score(f"<answer>{one.gold[0]}</answer>") == pytest.approx(1 / 3)
    assert one.score(f"<answer>{', '.join(one.gold)}, 999</answer>") == pytest.approx(3 / 4)


def test_both_places_of_the_question() -> None:
    one = sample(SMALL[0])
    before, after = one.parts("before and after", explain=False)
    assert before.count(one.question) == 1
    assert before.index(one.question) < before.index("<context>")
    assert after.count(one.question) == 1
    before, again = one.parts("after", explain=True)
    assert one.question not in before
    assert one.question in again
    assert "First explain" in again
    assert "First explain" not in after


def test_answers_are_read_leniently_and_scored_strictly() -> None:
    assert extracted("x <ANSWER>\n 12 </answer> y") == "12"
    assert extracted("x <answer>12") == "12"
    assert extracted("12") == ""
    assert items("1. bako\n2) Dilo, mesu") == {"bako", "dilo", "mesu"}
    assert overlap({"a", "b"}, {"b", "c"}) == pytest.approx(1 / 3)
    assert overlap(set(), set()) == 0
    assert numbered("1. x y\n2) z\n1. other") == {1: "x y", 2: "z"}
    assert numbered("only") == {1: "only"}
    assert numbered(" ") == {}
    assert normal("The  Old harbour.") == "old harbour"
    assert word_f1("the red house", "a red car") == pytest.approx(0.5)
    assert word_f1("", "x") == 0


def test_choices_are_sets_of_letters() -> None:
    one = MultipleChoice(DOCUMENTS[3:] + DOCUMENTS[:1]).sample(Random(0), 100, count)
    assert one.gold == ("AC",)
    assert "A. paints\nB. runs\nC. sings" in one.question
    assert [one.score(f"<answer>{text}</answer>") for text in ("AC", "C, A", "c and a", "A", "ABC")] == [1, 1, 1, 0, 0]
    assert OpenQuestion(DOCUMENTS[:2]).sample(Random(1), 100, count).context.count("Document ") == 2


def test_documents_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    rows = [
        {"context": "x y", "question": "q?", "answer": "y"},
        {"context": "z", "question": "q?", "answer": ["a", "b"], "choices": ["m", "n"]},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    documents = read_documents(file)
    assert documents == [QuestionedDocument("x y", "q?", ("y",)), QuestionedDocument("z", "q?", ("a", "b"), ("m", "n"))]
    assert [task.name for task in tasks(True, documents)][6:] == ["qa", "choice"]
    assert tasks(True)[:6] == list(SMALL)
    assert tasks(False)[:6] == list(PAPER)
    for row, match in (
        ({"context": "x", "question": "q"}, "is no document with a question"),
        (
            {"context": "x", "question": "q", "answer": "C", "choices": ["m", "n"]},
            "the answer 'C' is none of the letters AB",
        ),
        (rows[0], "holds one context"),
    ):
        file.write_text(json.dumps(row))
        with pytest.raises(IntaglioError, match=match):
            read_documents(file)
