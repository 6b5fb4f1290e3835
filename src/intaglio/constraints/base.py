"""Constraints and their conjunction.

A constraint is a set of strings. `start(vocabulary)` returns the state of the empty prefix; `state.extended(token)`
returns a new state, so that the nodes of a draft tree and resampled particles hold states of their own.

Dimension letters: V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from intaglio.constraints.vocabulary import Vocabulary
from intaglio.errors import shorten


class State(ABC):
    """A prefix of an output under a constraint."""

    exact: bool = False
    """Whether `mask` alone decides which tokens may follow."""

    def mask(self) -> np.ndarray | None:
        """Return which tokens may follow, bool [V], end tokens left out; None if it is not known cheaply.

        Where the state is not `exact`, tokens of the mask may still be rejected by `allows`.
        """
        return None

    @abstractmethod
    def allows(self, token: int) -> bool:
        """Return whether the prefix may continue with a token that is no end token."""

    @abstractmethod
    def complete(self) -> bool:
        """Return whether the prefix is a whole output."""

    @abstractmethod
    def extended(self, token: int) -> State:
        """Return the state after one more token, which `allows` accepts."""


class Constraint(ABC):
    """A set of strings; `a & b` is the intersection."""

    @abstractmethod
    def start(self, vocabulary: Vocabulary) -> State:
        """Return the state of the empty prefix.

        Raises:
            IntaglioError: a constraint that cannot be compiled, or that no string meets as far as that is known.
        """

    def __and__(self, other: Constraint) -> Constraint:
        return Intersection((*_parts(self), *_parts(other)))


def _parts(constraint: Constraint) -> tuple[Constraint, ...]:
    return constraint.parts if isinstance(constraint, Intersection) else (constraint,)


class Intersection(Constraint):
    """The strings that meet every one of several constraints."""

    def __init__(self, parts: Sequence[Constraint]) -> None:
        self.parts = tuple(parts)

    def start(self, vocabulary: Vocabulary) -> State:
        """Return the joint state of the empty prefix."""
        return _Joint([part.start(vocabulary) for part in self.parts])

    def __repr__(self) -> str:
        return " & ".join(map(repr, self.parts))


class _Joint(State):
    """States of several constraints; those that decide by a mask come first."""

    def __init__(self, states: list[State]) -> None:
        self._states = sorted(states, key=lambda state: not state.exact)
        self.exact = all(state.exact for state in states)

    def mask(self) -> np.ndarray | None:
        """Return the conjunction of the masks that are known."""
        masks = [mask for state in self._states if (mask := state.mask()) is not None]
        return np.logical_and.reduce(masks) if masks else None

    def allows(self, token: int) -> bool:
        """Return whether all allow a token."""
        return all(state.allows(token) for state in self._states)

    def complete(self) -> bool:
        """Return whether the prefix is complete for all."""
        return all(state.complete() for state in self._states)

    def extended(self, token: int) -> State:
        """Return the joint state after a token."""
        return _Joint([state.extended(token) for state in self._states])


class Prefix:
    """An output under a constraint, with its end: the state that samplers and processors step through.

    Args:
        vocabulary: tokens and end tokens.
        state: of the constraint.
        data: bytes of the output so far.
        ended: whether an end token was appended.
    """

    def __init__(self, vocabulary: Vocabulary, state: State, data: bytes = b"", ended: bool = False) -> None:
        self.vocabulary = vocabulary
        self.state = state
        self.data = data
        self.ended = ended
        self._complete: bool | None = None
        self._mask: np.ndarray | None = None

    @classmethod
    def empty(cls, constraint: Constraint, vocabulary: Vocabulary) -> Prefix:
        """Return the empty output under a constraint."""
        return cls(vocabulary, constraint.start(vocabulary))

    @property
    def text(self) -> str:
        """The output so far; half a character at the end is shown as U+FFFD."""
        return self.data.decode(errors="replace")

    @property
    def shown(self) -> str:
        """End of the output, quoted for a message."""
        return repr(self.text if len(self.text) <= 60 else "..." + self.text[-57:])

    def complete(self) -> bool:
        """Return whether the output may end here."""
        if self._complete is None:
            self._complete = self.state.complete()
        return self._complete

    def mask(self) -> np.ndarray:
        """Return the tokens that may follow as far as masks know, end tokens included, bool [V]."""
        if self._mask is None:
            mask = self.state.mask()
            self._mask = self.vocabulary.usable_V.copy() if mask is None else mask & self.vocabulary.usable_V
            # Where masks do not decide, `complete` may be expensive: `allows` calls it once the end is drawn.
            self._mask[list(self.vocabulary.stops)] = not self.state.exact or self.complete()
        return self._mask

    def allows(self, token: int) -> bool:
        """Return whether a token, or the end, may follow."""
        if token in self.vocabulary.stops:
            return self.complete()
        if self.state.exact:
            return bool(self.mask()[token])
        return bool(self.vocabulary.usable_V[token]) and self.state.allows(token)

    def extended(self, token: int) -> Prefix:
        """Return the output after an allowed token."""
        if token in self.vocabulary.stops:
            return Prefix(self.vocabulary, self.state, self.data, True)
        return Prefix(self.vocabulary, self.state.extended(token), self.data + self.vocabulary.forms[token])


def dead_end(prefix: Prefix) -> str:
    """Return the sentence for a prefix that no token continues."""
    if not prefix.data:
        return "the constraint cannot be satisfied: no token of the vocabulary may begin an output"
    return f"the constraint cannot be satisfied: no token may follow {shorten(prefix.shown, 70)}"
