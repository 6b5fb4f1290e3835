"""A draft's law as tokens are taken out of it one by one.

Drawing without replacement is a race: give each token t the arrival time E_t / D(t) with E_t ~ Exp(1). The first to
arrive has the law D, and each next one has the law of what is left. So one vector of draws orders all siblings of a
node, and no residual is ever copied: the base law, the tokens taken and their mass say everything.

Dimension letters: V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 8
"""Tokens ordered at first; four times as many each time they run out."""


class Residual:
    """What is left of a law.

    Args:
        law_V: the base law, float, summing to 1.
        drawn: whether tokens are drawn; otherwise the most likely comes first.
        generator: what they are drawn from; None for torch's global generator.
    """

    def __init__(self, law_V: Tensor, drawn: bool, generator: torch.Generator | None) -> None:
        self.law_V = law_V
        self._drawn = drawn
        self._generator = generator
        self._speed_V: Tensor | None = None  # the inverse of the arrival times; -1 once a token has been ordered
        self._taken = 0.0
        self._ordered: list[tuple[int, float]] = []  # the next token last
        self._chunk = _CHUNK

    @property
    def empty(self) -> bool:
        """Whether no token with any probability is left. Nothing is drawn to say so of a law that is whole."""
        return self._speed_V is not None and self.peek() is None

    def peek(self) -> tuple[int, float] | None:
        """The next token and its probability in what is left; None where nothing is left."""
        if not self._ordered:
            self._order()
        if not self._ordered:
            return None
        token, share = self._ordered[-1]
        # The mass left is a difference, and may round below what the token itself has.
        return token, share / max(1.0 - self._taken, share)

    def take(self) -> tuple[int, float]:
        """The same, and take it out; something has to be left."""
        found = self.peek()
        assert found is not None
        self._taken += self._ordered.pop()[1]
        return found

    def _order(self) -> None:
        if self._speed_V is None:
            # Only now: nothing is drawn at a node that never gets a child.
            self._speed_V = self.law_V.clone()
            if self._drawn:
                self._speed_V /= torch.empty_like(self.law_V).exponential_(generator=self._generator)
        found = self._speed_V.topk(min(self._chunk, len(self._speed_V)))
        tokens = found.indices[found.values > 0]
        self._speed_V[tokens] = -1.0
        shares = self.law_V[tokens].tolist()
        self._ordered = list(zip(tokens.tolist(), shares, strict=True))[::-1]
        self._chunk *= 4
