"""Variational lower bound of the information surplus of a real model, by probes.

    Surplus_j >= CE(q1(w_{t+j} | W_t .. W_{t+j-1})) - CE(q2(w_{t+j} | W_t .. W_{t+j-1}, h_t))      on held-out texts

It is a bound as far as q1 reaches the entropy, so q1 is the best of more candidates: a table of pairs, networks at
several rates, and mixtures of them; both cross-entropies are reported. Tokens beyond the `vocabulary` most frequent are
one outcome, which can only lower the surplus.

Dimension letters: N positions, D hidden width, E embedding width, J known tokens, F features, O outcomes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.methods.base import Progress, no_progress
from intaglio.trainer.rng import generator

RATES = (1e-3, 3e-3, 1e-2)
"""Learning rates of q1; q2 has the first two."""
MIXTURES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
"""Shares of the table in a mixture with the network."""
BATCH = 64
PATIENCE = 2
"""Epochs without a better validation after which a probe stops."""
TABLE_PRIOR = 5.0
"""Draws of the unigram distribution added to each row of the table."""


@dataclass(frozen=True)
class Positions:
    """Hidden states at which a token is predicted, and tokens from there on.

    Args:
        hidden_ND: h_t, from which W_t is predicted.
        tokens_NJ: W_t, W_{t+1}, ..., int64 [N, J + 1].
        part_N: 0 for training, 1 for validation, 2 for the held-out estimate; texts are not divided.
    """

    hidden_ND: Tensor
    tokens_NJ: Tensor
    part_N: Tensor


@dataclass(frozen=True)
class SurplusTerm:
    """A term of the surplus in nats: cross-entropies on held-out texts without and with the hidden state."""

    without_hidden: float
    with_hidden: float
    outcomes: int

    @property
    def surplus(self) -> float:
        """The estimated lower bound; below 0 where the second probe learned nothing from the hidden state."""
        return self.without_hidden - self.with_hidden


def surplus_terms(
    positions: Positions,
    embedding_VE: Tensor,
    *,
    vocabulary: int = 1000,
    width: int = 128,
    epochs: int = 20,
    seed: int = 0,
    progress: Progress = no_progress,
) -> list[SurplusTerm]:
    """Return the terms I(H; W_{t+j} | W_t .. W_{t+j-1}) for each further token that the positions have.

    Args:
        positions: hidden states and tokens.
        embedding_VE: the model's input embedding, read by the probes.
        vocabulary: most frequent tokens that are told apart. Default 1,000.
        width: hidden width of the probes. Default 128.
        epochs: most passes over the training positions; probes stop at the best on validation. Default 20.
        seed: of the probes. Default 0.
        progress: called after each probe.
    """
    hidden_ND = _scaled(positions.hidden_ND, positions.part_N)
    terms = []
    for j in range(1, positions.tokens_NJ.shape[1]):
        outcome_N, outcomes = _outcomes(positions.tokens_NJ[:, j], positions.part_N, vocabulary)
        known_NF = embedding_VE[positions.tokens_NJ[:, :j]].flatten(1).float()
        known_NF = _scaled(known_NF, positions.part_N)
        given = outcome_N, outcomes, positions.part_N, width, epochs
        plain = [_fit(known_NF, *given, rate, seed) for rate in RATES]
        both_NF = torch.cat([known_NF, hidden_ND], dim=1)
        informed = [_fit(both_NF, *given, rate, seed) for rate in RATES[:2]]
        table = _table(positions.tokens_NJ[:, j - 1], outcome_N, outcomes, positions.part_N)
        mixed = [_mixed(network, table, share) for network in plain for share in MIXTURES]
        terms.append(SurplusTerm(_chosen(mixed), _chosen(informed), outcomes))
        progress(j, positions.tokens_NJ.shape[1] - 1, "markov_lm: probes")
    return terms


Scores = tuple[Tensor, Tensor]
"""Probabilities of the observed outcomes on validation and on held-out positions."""


def _chosen(candidates: list[Scores]) -> float:
    """Return the held-out cross-entropy of the candidate with the best validation."""
    best = min(candidates, key=lambda scores: float(-scores[0].log().mean()))
    return float(-best[1].log().mean())


def _mixed(network: Scores, table: Scores, share: float) -> Scores:
    pairs = [(1 - share) * a + share * b for a, b in zip(network, table, strict=True)]
    return pairs[0], pairs[1]


def _outcomes(token_N: Tensor, part_N: Tensor, vocabulary: int) -> tuple[Tensor, int]:
    """Return outcomes from 0: the most frequent training tokens, then all others as one."""
    counts_V = torch.bincount(token_N[part_N == 0], minlength=int(token_N.max()) + 1)
    kept = min(vocabulary, int((counts_V > 0).sum()))
    order_V = counts_V.argsort(descending=True, stable=True)[:kept]
    number_V = torch.full((len(counts_V),), kept)
    number_V[order_V] = torch.arange(kept)
    return number_V[token_N], kept + 1


def _scaled(values_NF: Tensor, part_N: Tensor) -> Tensor:
    """Return features of zero mean and unit variance on the training positions."""
    known_NF = values_NF[part_N == 0]
    return (values_NF - known_NF.mean(0)) / (known_NF.std(0) + 1e-6)


def _fit(
    inputs_NF: Tensor,
    outcome_N: Tensor,
    outcomes: int,
    part_N: Tensor,
    width: int,
    epochs: int,
    rate: float,
    seed: int,
) -> Scores:
    """Train a network of one hidden layer, stopped at its best validation, and return its scores."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(inputs_NF.shape[1], width), nn.GELU(), nn.Linear(width, outcomes))
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.01)
    rows_N = (part_N == 0).nonzero()[:, 0]
    best: tuple[float, Scores] | None = None
    worse = 0
    for epoch in range(epochs):
        order_N = rows_N[torch.randperm(len(rows_N), generator=generator(seed, "surplus", epoch))]
        for rows in order_N.split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(network(inputs_NF[rows]), outcome_N[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            validation, held_out = (
                network(inputs_NF[part_N == part]).softmax(-1).gather(1, outcome_N[part_N == part, None])[:, 0]
                for part in (1, 2)
            )
        loss = float(-validation.log().mean())
        if best is None or loss < best[0]:
            best, worse = (loss, (validation, held_out)), 0
        else:
            worse += 1
            if worse == PATIENCE:
                break
    assert best is not None
    return best[1]


def _table(before_N: Tensor, outcome_N: Tensor, outcomes: int, part_N: Tensor) -> Scores:
    """Return the scores of a table of pairs, each row smoothed by the unigram distribution."""
    train_N = part_N == 0
    unigram_O = torch.bincount(outcome_N[train_N], minlength=outcomes).float() + 0.5
    unigram_O /= unigram_O.sum()
    tokens = int(before_N.max()) + 1
    pairs = torch.bincount(before_N[train_N] * outcomes + outcome_N[train_N], minlength=tokens * outcomes)
    rows = torch.bincount(before_N[train_N], minlength=tokens)
    scores = []
    for part in (1, 2):
        before, outcome = before_N[part_N == part], outcome_N[part_N == part]
        counted = pairs[before * outcomes + outcome] + TABLE_PRIOR * unigram_O[outcome]
        scores.append(counted / (rows[before] + TABLE_PRIOR))
    return scores[0], scores[1]
