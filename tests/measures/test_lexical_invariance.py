"""Ciphers, their keys, and the exact lexinvariant mixture."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intaglio.errors import IntaglioError
from intaglio.measures.lexical_invariance import encipher, key_recovery, mixture_log_probs


def test_the_mixture_of_the_card() -> None:
    """d=2, p(0)=.9: p'(0,0) = .41, p'(next=0 | 0) = .82; p'(0,0,1) = .045. Regret bound log 2."""
    p = torch.tensor([0.9, 0.1])
    probs = mixture_log_probs(p, p.expand(2, 2), torch.tensor([0, 0, 1])).exp()
    assert float(probs[0]) == pytest.approx(0.5)
    assert float(probs[:2].prod()) == pytest.approx(0.41, abs=1e-6)
    assert float(probs[1]) == pytest.approx(0.82, abs=1e-6)
    assert float(probs.prod()) == pytest.approx(0.045, abs=1e-6)
    with pytest.raises(IntaglioError, match="has 9 tokens; up to 8"):
        mixture_log_probs(torch.ones(9) / 9, torch.ones(9, 9) / 9, torch.tensor([0]))


@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(1, 12))
def test_the_regret_is_at_most_the_log_of_the_relabellings(seed: int, symbols: int, length: int) -> None:
    """-log p'(x) <= -log p(x) + log d! for every x; p' is the same for every relabelling of x."""
    rng = torch.Generator().manual_seed(seed)
    step = torch.rand(symbols, symbols, generator=rng).double() + 0.01
    step = step / step.sum(1, keepdim=True)
    first, ids = step[0], torch.randint(symbols, (length,), generator=rng)
    own = first[ids[0]].log() + step[ids[:-1], ids[1:]].log().sum()
    mixture = mixture_log_probs(first, step, ids).sum()
    assert -mixture <= -own + math.lgamma(symbols + 1) + 1e-9
    relabelled = mixture_log_probs(first, step, torch.randperm(symbols, generator=rng)[ids]).sum()
    assert float(relabelled) == pytest.approx(float(mixture), abs=1e-9)


def test_a_cipher_is_a_permutation_of_its_own_for_each_sequence() -> None:
    plain = torch.arange(8).repeat(4, 2)
    cipher = encipher(plain, 8, 0, kept=(3,))
    assert all(sorted(ids[:8].tolist()) == list(range(8)) for ids in cipher)
    assert torch.equal(cipher[:, :8], cipher[:, 8:])
    assert (cipher[:, 3] == 3).all()
    assert len({tuple(ids.tolist()) for ids in cipher}) == 4
    assert torch.equal(cipher, encipher(plain, 8, 0, kept=(3,)))


def test_a_probe_recovers_keys_that_the_states_hold_and_no_others() -> None:
    plain = torch.randint(5, (40, 16), generator=torch.Generator().manual_seed(0))
    train, test = plain[:30], plain[30:]
    table = torch.eye(5)
    known = {len(train): train, len(test): test}
    oracle = key_recovery(lambda cipher: table[known[len(cipher)]], train, test, 5, steps=100, learning_rate=1e-2)
    assert oracle.key == 1
    assert oracle.by_position.tolist() == [1.0] * 16
    blind = key_recovery(lambda cipher: table[cipher], train, test, 5, steps=100, learning_rate=1e-2)
    assert blind.key < 0.6
