"""Substitution ciphers, the recovery of their keys from hidden states, and the exact lexinvariant mixture.

Dimension letters: N sequences, T tokens of a sequence, D width, V vocabulary, P permutations.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.errors import IntaglioError

MOST_SYMBOLS = 8
"""Largest vocabulary of `mixture_log_probs`, which sums over all V! relabellings."""


def encipher(ids_NT: Tensor, vocabulary: int, seed: int, kept: Sequence[int] = ()) -> Tensor:
    """Return sequences in which each has its tokens replaced by a random permutation of its own, int64 [N, T].

    Args:
        ids_NT: the plain tokens, int64.
        vocabulary: number of token ids.
        seed: of the permutations.
        kept: tokens that stay as they are, such as padding. Default: none.
    """
    rng = torch.Generator().manual_seed(seed)
    moved = torch.tensor([token for token in range(vocabulary) if token not in set(kept)])
    rows = []
    for ids_T in ids_NT:
        key_V = torch.arange(vocabulary)
        key_V[moved] = moved[torch.randperm(len(moved), generator=rng)]
        rows.append(key_V[ids_T])
    return torch.stack(rows)


def mixture_log_probs(first_V: Tensor, step_VV: Tensor, ids_T: Tensor) -> Tensor:
    """Return log p'(w_t | w_<t) of the lexinvariant mixture of a Markov chain, float64 [T].

        p'(w) = (1 / V!) sum_pi p(pi^-1 w),        -log p'(w) <= -log p(w) + log V!

    Args:
        first_V: probabilities of the first token.
        step_VV: probabilities of each token's successors; rows sum to 1.
        ids_T: the sequence, int64.

    Raises:
        IntaglioError: the vocabulary has more than 8 tokens.
    """
    if len(first_V) > MOST_SYMBOLS:
        raise IntaglioError(f"the vocabulary has {len(first_V)} tokens; up to {MOST_SYMBOLS} are accepted")
    plain_PT = torch.tensor(list(itertools.permutations(range(len(first_V)))))[:, ids_T]
    first_P1, steps_PT = first_V.double()[plain_PT[:, :1]], step_VV.double()[plain_PT[:, :-1], plain_PT[:, 1:]]
    total_T = torch.cat([first_P1, steps_PT], 1).log().cumsum(1).logsumexp(0)
    return total_T - F.pad(total_T[:-1], (1, 0), value=torch.tensor(float(len(plain_PT))).log().item())


@dataclass(frozen=True)
class KeyRecovery:
    """Accuracy of a probe that reads a cipher's key.

    Args:
        by_position: share of sequences in which the plain token at a position is recovered, float64 [T].
        key: share of a sequence's symbols that are recovered where they occur last.
    """

    by_position: Tensor
    key: float


def key_recovery(
    hidden: Callable[[Tensor], Tensor],
    train_NT: Tensor,
    test_NT: Tensor,
    vocabulary: int,
    *,
    kept: Sequence[int] = (),
    width: int = 256,
    steps: int = 500,
    batch_size: int = 1024,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> KeyRecovery:
    """Train a two-layer MLP that reads the plain token from the hidden state at its enciphered one, and measure it.

    Args:
        hidden: returns the hidden states [N, T, D] of enciphered tokens [N, T].
        train_NT: plain sequences that the probe is trained on, int64; each has a key of its own.
        test_NT: plain sequences that it is measured on, under new keys.
        vocabulary: number of token ids.
        kept: tokens that are not enciphered. Default: none.
        width: hidden units of the probe. Default 256.
        steps: of AdamW. Default 500.
        batch_size: positions of a step. Default 1,024.
        learning_rate: of AdamW. Default 1e-3.
        seed: of keys, weights and batches. Default 0.
    """
    with torch.no_grad():
        train_MD = hidden(encipher(train_NT, vocabulary, 2 * seed, kept)).flatten(0, 1).float()
        test_cipher_NT = encipher(test_NT, vocabulary, 2 * seed + 1, kept)
        test_NTD = hidden(test_cipher_NT).float()
    mean_D, std_D = train_MD.mean(0), train_MD.std(0) + 1e-6
    rng, plain_M = torch.Generator().manual_seed(seed), train_NT.flatten().to(train_MD.device)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        probe = nn.Sequential(nn.Linear(train_MD.shape[1], width), nn.ReLU(), nn.Linear(width, vocabulary))
        probe.to(train_MD.device)
        optimizer = torch.optim.AdamW(probe.parameters(), learning_rate)
        for _ in range(steps):
            chosen = torch.randint(len(plain_M), (batch_size,), generator=rng).to(train_MD.device)
            loss = F.cross_entropy(probe((train_MD[chosen] - mean_D) / std_D), plain_M[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        correct_NT = probe((test_NTD - mean_D) / std_D).argmax(-1).cpu() == test_NT
    after_NTT = (test_NT[:, :, None] == test_NT[:, None]).triu(1)
    last_NT = ~after_NTT.any(-1)
    return KeyRecovery(correct_NT.double().mean(0), float(correct_NT[last_NT].double().mean()))
