"""Symbol tasks can be answered from their context, and from nothing else."""

from __future__ import annotations

import torch

from intaglio.evidence.testbeds.symbols import ARROW, BAR, FREE, SPECIAL, SYMBOLS, SymbolLanguage

BED = SymbolLanguage()


def test_a_lookup_repeats_one_of_its_pairs() -> None:
    tasks = BED.lookup("evaluation")
    assert tasks.ids.shape == (500, 8 * 2 + 2)
    for ids in tasks.ids[:50].tolist():
        assert len(set(ids)) == 16
        pairs = {ids[place]: ids[place + 1] for place in range(0, 16, 2)}
        assert pairs[ids[-2]] == ids[-1]


def test_a_permutation_reorders_every_word_alike() -> None:
    for ids in BED.permutation("pilot").ids[:50].tolist():
        lines = [ids[start : start + 7] for start in range(0, 40, 8)]
        assert ids[7::8] == [BAR] * 4
        assert all(line[3] == ARROW for line in lines)
        order = [lines[0][:3].index(symbol) for symbol in lines[0][4:]]
        assert all([line[place] for place in order] == line[4:] for line in lines)


def test_every_training_reads_the_same_chain() -> None:
    """A symbol has few likely successors, the same for all seeds and sets."""
    one, two = (BED.training(seed, 40).ids_NT for seed in (0, 1))
    assert one.shape == (640, 128)
    assert not torch.equal(one, two)
    assert torch.equal(BED.training(0, 10).ids_NT, one[:160])
    counts = [
        torch.zeros(34, 34).index_put_((x[:, :-1].flatten(), x[:, 1:].flatten()), torch.ones(()), True)
        for x in (one, two)
    ]
    shares = [count / count.sum(1, keepdim=True).clamp(min=1) for count in counts]
    assert torch.allclose(*shares, atol=0.1)
    assert float(shares[0][2:].topk(4).values.sum(1).mean()) > 0.7


def test_sets_and_bases_have_tasks_of_their_own() -> None:
    one = BED.lookup("evaluation").ids
    assert torch.equal(one, BED.lookup("evaluation").ids)
    assert not torch.equal(one[:200], BED.lookup("pilot").ids)
    assert not torch.equal(one, BED.lookup("evaluation", 1).ids)


def test_an_answer_is_the_likeliest_symbol() -> None:
    """Signs do not compete; every token of the answer must be right."""
    tasks = BED.permutation("pilot")
    logits = torch.zeros(*tasks.ids.shape, len(SPECIAL) + SYMBOLS)
    logits[:, :-1].scatter_(2, tasks.ids[:, 1:, None], 1.0)
    logits[..., ARROW] = 2.0
    assert tasks.correct(logits).all()
    wrong = next(symbol for symbol in FREE.tolist() if symbol != int(tasks.ids[0, -2]))
    logits[0, -3, wrong] = 3.0
    assert tasks.correct(logits).tolist() == [False] + [True] * 199
