"""A draft's distribution as tokens are taken out of it one by one.

Drawing without replacement is a race: give each token t the arrival time E_t / D(t) with E_t ~ Exp(1). The first to
arrive has the distribution D, and each next one that of the remaining tokens. So one vector of draws orders all
siblings of a node, and no residual is ever copied: the base distribution, the tokens taken and their mass suffice.

Dimension letters: V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 8
"""Tokens ordered at first; four times as many each time they run out."""


class Residual:
    """The rest of a distribution.

    Args:
        probs_V: the base distribution, float, summing to 1.
        drawn: whether tokens are drawn; otherwise the most likely comes first.
        generator: source of the draws; None for torch's global generator.
    """

    def __init__(self, probs_V: Tensor, drawn: bool, generator: torch.Generator | None) -> None:
        self.probs_V = probs_V
        self._drawn = drawn
        self._generator = generator
        self._speed_V: Tensor | None = None  # the inverse of the arrival times; -1 once a token has been ordered
        self._taken = 0.0
        self._ordered: list[tuple[int, float]] = []  # the next token last
        self._chunk = _CHUNK

    @property
    def empty(self) -> bool:
        """Whether no token with any probability is left. Nothing is drawn for a complete distribution."""
        return self._speed_V is not None and self.peek() is None

    def peek(self) -> tuple[int, float] | None:
        """Return the next token and its probability in the rest; None if nothing is left."""
        if not self._ordered:
            self._order()
        if not self._ordered:
            return None
        token, share = self._ordered[-1]
        # The mass left is a difference, and may round below the token's own.
        return token, share / max(1.0 - self._taken, share)

    def take(self) -> tuple[int, float]:
        """Remove and return the next token and its probability; the rest must not be empty."""
        following = self.peek()
        assert following is not None
        self._taken += self._ordered.pop()[1]
        return following

    def _order(self) -> None:
        if self._speed_V is None:
            # Only now: nothing is drawn at a node that never gets a child.
            self._speed_V = self.probs_V.clone()
            if self._drawn:
                self._speed_V /= torch.empty_like(self.probs_V).exponential_(generator=self._generator)
        fastest = self._speed_V.topk(min(self._chunk, len(self._speed_V)))
        tokens = fastest.indices[fastest.values > 0]
        self._speed_V[tokens] = -1.0
        self._ordered = list(zip(tokens.tolist(), self.probs_V[tokens].tolist(), strict=True))[::-1]
        self._chunk *= 4
