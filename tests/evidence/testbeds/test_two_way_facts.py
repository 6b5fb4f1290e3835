"""Facts in one order and in both: no reverse document of a new fact, no token that gives one away."""

from __future__ import annotations

import torch

from intaglio.evidence.testbeds.two_way_facts import ANSWER, IS, TwoWayFacts, recalled

BED = TwoWayFacts()


def test_no_document_states_a_new_fact_in_reverse() -> None:
    both, new = BED.facts(3)
    rows = {tuple(row) for row in BED.training(3, 60).ids_NT.tolist()}
    assert not rows & {tuple(row) for row in BED.questions(new, True).tolist()}
    assert {tuple(row) for row in BED.questions(new, False).tolist()} <= rows
    assert {tuple(row) for row in BED.questions(both, True).tolist()} <= rows


def test_facts_share_symbols_but_neither_names_nor_descriptions() -> None:
    both, new = BED.facts(0)
    every = [*both, *new]
    assert len({fact[:2] for fact in every}) == len({fact[2:] for fact in every}) == 360
    for place in range(4):
        known = {fact[place] for fact in both}
        assert sum(fact[place] in known for fact in new) > 50
    assert BED.facts(0) == (both, new)
    assert BED.facts(1)[0] != both


def test_documents_are_words_of_the_language() -> None:
    document = BED.document((7, 3, 1, 9), 2, True)
    words = [BED.vocabulary[token] for token in document]
    assert words == ["<s>", "r2", "c1", "d9", "is", "a7", "b3", "</s>"]
    assert document[ANSWER.start - 1] == IS
    assert [BED.vocabulary[token] for token in BED.document((7, 3, 1, 9), 0, False)][ANSWER] == ["c1", "d9"]
    assert BED.new(0).tokenizer("a7 b3")["input_ids"] == document[5:7]


def test_fewer_steps_are_the_first_of_more() -> None:
    assert torch.equal(BED.training(0, 3).ids_NT, BED.training(0, 40).ids_NT[: 3 * 64])


def test_recall_is_greedy_decoding_of_the_answer() -> None:
    bed = BED.toy()
    model = bed.new(0).model
    questions = bed.questions(bed.facts(0)[1], True)
    right, scores = recalled(model, questions)
    for row, correct, score in zip(questions, right.tolist(), scores.tolist(), strict=True):
        new = model.generate(row[None, : ANSWER.start], max_new_tokens=2, do_sample=False, eos_token_id=None)[0]
        assert (new[ANSWER].tolist() == row[ANSWER].tolist()) == correct
        assert score < 0
