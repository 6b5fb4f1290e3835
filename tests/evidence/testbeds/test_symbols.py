"""Symbol tasks can be answered from their context, and from nothing else."""

from __future__ import annotations

import torch

from intaglio.evidence.testbeds.symbols import ARROW, COLON, SYMBOLS, SymbolicCode

BED = SymbolicCode()


def test_a_lookup_repeats_one_of_its_pairs() -> None:
    tasks = BED.lookup("evaluation")
    assert tasks.ids.shape == (500, 8 * 4 + 3)
    for ids in tasks.ids[:50].tolist():
        pairs = {ids[place]: ids[place + 2] for place in range(0, 32, 4)}
        assert len(pairs) == 8
        assert ids[-2] == COLON
        assert pairs[ids[-3]] == ids[-1]


def test_a_permutation_reorders_every_word_alike() -> None:
    for ids in BED.permutation("pilot").ids[:50].tolist():
        lines = bytes(ids).decode().split("\n")
        words, reordered = zip(*(line.split(chr(ARROW)) for line in lines), strict=True)
        assert len(lines) == 5
        order = [words[0].index(symbol) for symbol in reordered[0]]
        assert all("".join(word[place] for place in order) == new for word, new in zip(words, reordered, strict=True))


def test_sets_and_bases_have_tasks_of_their_own() -> None:
    one = BED.lookup("evaluation").ids
    assert torch.equal(one, BED.lookup("evaluation").ids)
    assert not torch.equal(one[:200], BED.lookup("pilot").ids)
    assert not torch.equal(one, BED.lookup("evaluation", 1).ids)


def test_an_answer_is_the_likeliest_symbol() -> None:
    """Bytes that are no symbols do not compete; every token of the answer must be right."""
    tasks = BED.permutation("pilot")
    logits = torch.zeros(*tasks.ids.shape, 260)
    logits[:, :-1].scatter_(2, tasks.ids[:, 1:, None], 1.0)
    logits[..., ARROW] = 2.0
    assert tasks.correct(logits).all()
    wrong = next(symbol for symbol in SYMBOLS if symbol != int(tasks.ids[0, -2]))
    logits[0, -3, wrong] = 3.0
    assert tasks.correct(logits).tolist() == [False] + [True] * 199
