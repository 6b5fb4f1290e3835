"""Recall of facts: prompts of both directions, greedy answers, shares."""

from __future__ import annotations

import pytest

from intaglio.data.facts import Fact
from intaglio.errors import IntaglioError
from intaglio.measures.fact_recall import Recall, fact_recall
from tests.trainer.helpers import checkpoint


def test_an_answer_is_right_where_it_contains_the_expected_text() -> None:
    found = Recall(("a", "b", "c", "d"), ("Ada", "Bo", "Cy", "Di"), ("ada.", "no", "x cy x", " DI "))
    assert found.right == [True, False, True, True]
    assert found.shares == {"forward": 50.0, "reverse": 100.0}


def test_answers_are_the_models_own_whatever_the_batch() -> None:
    ckpt = checkpoint()
    facts = [Fact("the fox", "brown", ()), Fact("the lazy dog", "quick", ()), Fact("the sun", "lazy", ())]
    facts.insert(1, Fact("the dog", "known", (), asked=False))
    found = fact_recall(ckpt, facts, max_new_tokens=4)
    assert found == fact_recall(ckpt, facts, max_new_tokens=4, batch_size=1)
    assert found.prompts == ("The fox is", "The lazy dog is", "The sun is", "Brown is", "Quick is", "Lazy is")
    ids = ckpt.tokenizer("Brown is", return_tensors="pt")["input_ids"]
    new = ckpt.model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    assert found.answers[3] == ckpt.tokenizer.decode(new, skip_special_tokens=True)


def test_a_question_beyond_the_context_is_refused() -> None:
    with pytest.raises(IntaglioError, match="leaves no room for an answer of 24 in the context of 128"):
        fact_recall(checkpoint(), [Fact("a " * 120, "b", ())])
