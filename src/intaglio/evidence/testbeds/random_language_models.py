"""Random small language models under random regular constraints, with their exact posteriors.

A model draws letters with probabilities that depend on the last letter; a constraint is a random automaton. Every
string within the limit is enumerated, so that the constrained distribution is exact.

Dimension letters: R histories, V letters and the end, S states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from intaglio.constraints import Predicate, Prefix, Vocabulary

Table = Callable[[tuple[int, ...]], Sequence[float] | np.ndarray]
"""Weights of the next token after each history."""


class TableModel:
    """A language model given by a table, as `AWRS.sample` runs it.

    Attributes:
        rows: present histories [R].
        calls: number of histories of each call.
    """

    def __init__(self, table: Table) -> None:
        self._table = table
        self.rows: list[tuple[int, ...]] = []
        self.calls: list[int] = []

    def start(self) -> np.ndarray:
        """Return the log-weights [1, V] of the first token."""
        self.rows = [()]
        return self._log_weights()

    def extend(self, parents: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """Return the log-weights [R, V] after continued histories."""
        self.rows = [(*self.rows[parent], token) for parent, token in zip(parents, tokens, strict=True)]
        return self._log_weights()

    def _log_weights(self) -> np.ndarray:
        self.calls.append(len(self.rows))
        with np.errstate(divide="ignore"):
            log_weights_RV: np.ndarray = np.log(np.array([self._table(row) for row in self.rows], dtype=np.float64))
        return log_weights_RV


@dataclass(frozen=True)
class Unit:
    """A model, its constraint, and the distribution given it.

    Args:
        probs_VV: next-token probabilities after the end (at the start) and after each letter.
        next_SV: next state of the automaton by state and letter, -1 where it stops; column 0 is unused.
        final_S: whether a string may end in a state.
        limit: most tokens, the end included.
    """

    probs_VV: np.ndarray
    next_SV: np.ndarray
    final_S: np.ndarray
    limit: int

    @property
    def vocabulary(self) -> Vocabulary:
        """Token 0 ends a string; the others are letters."""
        return Vocabulary([b"", *(bytes([97 + letter]) for letter in range(self.probs_VV.shape[0] - 1))], [0])

    def table(self, row: tuple[int, ...]) -> np.ndarray:
        """Return the next-token probabilities [V] after a history."""
        probs_V: np.ndarray = self.probs_VV[row[-1] if row else 0]
        return probs_V

    def state(self, text: str) -> int:
        """Return the automaton's state after a string, -1 if it has stopped."""
        state = 0
        for letter in text:
            state = -1 if state < 0 else int(self.next_SV[state, ord(letter) - 96])
        return state

    def start(self) -> Prefix:
        """Return the empty string under the constraint."""
        constraint = Predicate(lambda text: self.state(text) >= 0, lambda text: bool(self.final_S[self.state(text)]))
        return Prefix.empty(constraint, self.vocabulary)

    @cached_property
    def joint(self) -> dict[tuple[int, ...], float]:
        """Probability of each accepted string within the limit, as tokens with the end."""
        joint: dict[tuple[int, ...], float] = {}
        waiting: list[tuple[tuple[int, ...], int, float]] = [((), 0, 1.0)]
        while waiting:
            tokens, state, probability = waiting.pop()
            probs_V = self.table(tokens)
            if self.final_S[state]:
                joint[*tokens, 0] = probability * float(probs_V[0])
            if len(tokens) + 1 < self.limit:
                waiting += [
                    ((*tokens, letter), int(after), probability * float(probs_V[letter]))
                    for letter, after in enumerate(self.next_SV[state])
                    if letter and after >= 0
                ]
        return joint

    @cached_property
    def posterior(self) -> dict[tuple[int, ...], float]:
        """Distribution of accepted strings."""
        total = sum(self.joint.values())
        return {tokens: probability / total for tokens, probability in self.joint.items()}


@dataclass(frozen=True)
class RandomLanguageModels:
    """Random models and constraints by seed.

    Args:
        letters: size of the alphabet. Default 4.
        states: of the automaton. Default 5.
        legal: share of a state's letters that it accepts. Default 0.5.
        spread: standard deviation of the logits. Default 2.
        limit: most tokens, the end included. Default 7.
    """

    letters: int = 4
    states: int = 5
    legal: float = 0.5
    spread: float = 2.0
    limit: int = 7

    def unit(self, seed: int) -> Unit:
        """Return the first of a seed's random units that at least four strings satisfy."""
        rng, size = np.random.default_rng(seed), self.letters + 1
        while True:
            logits_VV = rng.normal(0, self.spread, (size, size))
            probs_VV = np.exp(logits_VV) / np.exp(logits_VV).sum(-1, keepdims=True)
            next_SV = rng.integers(0, self.states, (self.states, size))
            next_SV[rng.random((self.states, size)) > self.legal] = -1
            unit = Unit(probs_VV, next_SV, rng.random(self.states) < 0.5, self.limit)
            if len(unit.joint) >= 4:
                return unit

    def toy(self, **changes: int) -> RandomLanguageModels:
        """Return the test bed in miniature."""
        return RandomLanguageModels(**{"letters": 2, "states": 3, "limit": 4, **changes})
