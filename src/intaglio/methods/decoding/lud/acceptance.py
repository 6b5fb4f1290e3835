"""Acceptance of the tokens that a pass predicts: the beta rule, and the guard against repetition."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from intaglio.methods.decoding.lud.statistics import UnitStatistics

Repeats = Callable[[int, int], bool]
"""Whether a token repeats its predecessor: `repeats(previous, token)`."""


def accept_confident(slots: Iterable[tuple[int, float]], beta: float, repeats: Repeats) -> Iterator[int]:
    """Yield the tokens that a pass emits: l = max(1, m), m the most with conf_1 .. conf_m all at least beta.

    The first is the ordinary next token and always taken. Each later slot is read after the token before it has been
    taken, so that `slots` may depend on the text as it grows.

    Args:
        slots: token and confidence of each slot, the ordinary one first.
        beta: least confidence.
        repeats: a token for which `repeats(previous, token)` holds is not taken, nor any after it.
    """
    previous = -1
    for number, (token, confidence) in enumerate(slots):
        if number and (confidence < beta or repeats(previous, token)):
            return
        yield token
        if confidence < beta:
            return
        previous = token


def repeats_id(previous: int, token: int) -> bool:
    """Return whether a token equals its predecessor."""
    return previous == token


class RepeatsText:
    """Predicate: a token equals its predecessor, has the same text, or continues its text (`return`, `returns`).

    Spaces around the text do not count, and a single character is too short to be continued.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._tokenizer.decode([token]).strip()
        return self._texts[token]

    def __call__(self, previous: int, token: int) -> bool:
        """See `repeats_id`."""
        if previous == token:
            return True
        before, text = self._text(previous), self._text(token)
        return bool(before) and (text == before or (len(before) > 1 and text.startswith(before)))


class RepetitionGuard:
    """Rejects a token that repeats its predecessor, and counts the repetitions.

    Args:
        repeats: the definition of a repetition.
        stops: False only counts.
        counts: receives the numbers.
    """

    def __init__(self, repeats: Repeats, stops: bool, counts: UnitStatistics) -> None:
        self._repeats, self._stops, self._counts = repeats, stops, counts

    def __call__(self, previous: int, token: int) -> bool:
        """Return whether to stop before a confident token; see `repeats_id`."""
        repeated = self._repeats(previous, token)
        self._counts.confident += 1
        self._counts.repeated += repeated
        return repeated and self._stops
