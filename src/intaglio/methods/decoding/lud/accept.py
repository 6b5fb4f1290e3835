"""How many of the tokens that a pass predicts are taken: the beta rule, and the guard against repetition."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from intaglio.methods.decoding.lud.statistics import UnitStatistics

Repeats = Callable[[int, int], bool]
"""Whether a token repeats its predecessor: `repeats(previous, token)`."""


def accepted(slots: Iterable[tuple[int, float]], beta: float, stop: Repeats) -> Iterator[int]:
    """Yield the tokens that a pass emits: l = max(1, m), m the most with conf_1 .. conf_m all at least beta.

    The first is the ordinary next token and always taken. Each later one is asked for when the one before it has been
    taken, so that `slots` may look at the text as it grows.

    Args:
        slots: token and confidence of each slot, the ordinary one first.
        beta: least confidence.
        stop: a token for which `stop(previous, token)` holds is not taken, nor any after it.
    """
    previous = -1
    for number, (token, confidence) in enumerate(slots):
        if number and (confidence < beta or stop(previous, token)):
            return
        yield token
        if confidence < beta:
            return
        previous = token


def repeats_id(previous: int, token: int) -> bool:
    """Whether a token is its predecessor again.

    Args:
        previous: id of the token before.
        token: id.
    """
    return previous == token


class RepeatsText:
    """Whether a token is its predecessor again, has the same text, or goes on from its text (`return`, `returns`).

    Spaces round the text do not count, and one character is too little to be gone on from.

    Args:
        tokenizer: gives the text of a token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._tokenizer.decode([token]).strip()
        return self._texts[token]

    def __call__(self, previous: int, token: int) -> bool:
        """As `repeats_id`."""
        if previous == token:
            return True
        before, text = self._text(previous), self._text(token)
        return bool(before) and (text == before or (len(before) > 1 and text.startswith(before)))


class Guard:
    """Stops before a token that repeats its predecessor, and counts how often there was one.

    Args:
        repeats: what counts as a repetition.
        stops: False only counts.
        counts: gets the numbers.
    """

    def __init__(self, repeats: Repeats, stops: bool, counts: UnitStatistics) -> None:
        self._repeats, self._stops, self._counts = repeats, stops, counts

    def __call__(self, previous: int, token: int) -> bool:
        """Whether to stop before a token that was confident enough; arguments as of `repeats_id`."""
        found = self._repeats(previous, token)
        self._counts.confident += 1
        self._counts.repeated += found
        return found and self._stops
