"""A constraint given by Python functions."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from intaglio.constraints.base import Constraint, State
from intaglio.constraints.vocabulary import Vocabulary
from intaglio.errors import IntaglioError, first_line, shorten

TICKS = 4
"""Parts of a time limit; a process that is stopped in the meantime misses at most one of them."""


class _Overdue(BaseException):
    """Raised inside a function that has used up its time; no `except Exception` of its own catches it."""


def timed_call(function: Callable[[str], Any], text: str, seconds: float) -> Any:
    """Return `function(text)`, within a time limit.

    In the main thread a timer interrupts the call; elsewhere the call runs in a thread that is abandoned when overdue.

    Raises:
        TimeoutError: it takes longer.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        return _threaded_call(function, text, seconds)

    ticks, running = 0, True

    def interrupt(*_: Any) -> None:
        nonlocal ticks
        ticks += 1
        if ticks == TICKS and running:
            raise _Overdue

    before = signal.signal(signal.SIGALRM, interrupt)
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds / TICKS, seconds / TICKS)
    try:
        try:
            return function(text)
        finally:
            running = False  # a tick after the call must not raise outside of this block
    except _Overdue:
        raise TimeoutError from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, remaining, interval)
        signal.signal(signal.SIGALRM, before)


def _threaded_call(function: Callable[[str], Any], text: str, seconds: float) -> Any:
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.extend((function(text), None))
        except BaseException as error:  # handed to the caller below
            outcome.extend((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    for _ in range(TICKS):
        thread.join(seconds / TICKS)
    if not outcome:
        raise TimeoutError
    value, error = outcome
    if error is not None:
        raise error
    return value


class Predicate(Constraint):
    """The strings that a Python function accepts.

        Predicate(prefix=lambda text: text.count("(") >= text.count(")"), complete=balanced)

    Args:
        prefix: whether a string can be the beginning of an output. It must be monotone: false for all continuations of
            a string for which it is false.
        complete: whether a string is a whole output. Default: every accepted prefix is.
        time_limit: most seconds of a call, above 0. Default 1.
        check_monotone: whether every character of an emitted token is checked, not only its end. Default True.

    Raises:
        IntaglioError: (while generating) a function that raises, takes too long, returns something else than a truth
            value or is seen not to be monotone; the message has the prefix it was called with.
    """

    def __init__(
        self,
        prefix: Callable[[str], Any],
        complete: Callable[[str], Any] | None = None,
        *,
        time_limit: float = 1.0,
        check_monotone: bool = True,
    ) -> None:
        if not (time_limit > 0 and np.isfinite(time_limit)):
            raise IntaglioError(f"time_limit is {time_limit}; it must be above 0 seconds")
        for name, function in (("prefix", prefix), ("complete", complete)):
            if not (callable(function) or (name == "complete" and function is None)):
                raise IntaglioError(f"{name} is {shorten(repr(function))}; a function of a string is accepted")
        self.prefix = prefix
        self.complete = complete
        self.time_limit = time_limit
        self.check_monotone = check_monotone

    def start(self, vocabulary: Vocabulary) -> State:
        """Return the state of the empty prefix.

        Raises:
            IntaglioError: the empty prefix is rejected, so that no string meets the constraint.
        """
        if not self.accepts("prefix", ""):
            raise IntaglioError("the constraint cannot be satisfied: the predicate rejects the empty prefix")
        return _PredicateState(self, vocabulary, b"")

    def accepts(self, name: str, text: str) -> bool:
        """Call `prefix` or `complete`."""
        function = self.prefix if name == "prefix" else self.complete
        assert function is not None
        at = f"the predicate ({name}) for the prefix {shorten(repr(text), 80)}"
        try:
            value = timed_call(function, text, self.time_limit)
        except TimeoutError:
            raise IntaglioError(f"{at} took longer than time_limit = {self.time_limit:g} s") from None
        except Exception as error:
            raise IntaglioError(f"{at} raised {type(error).__name__}: {first_line(error)}") from error
        if not isinstance(value, bool | np.bool_):
            raise IntaglioError(f"{at} returned {shorten(repr(value))}; True or False is accepted")
        return bool(value)


class _PredicateState(State):
    def __init__(self, constraint: Predicate, vocabulary: Vocabulary, data: bytes) -> None:
        self._constraint = constraint
        self._vocabulary = vocabulary
        self._data = data

    def allows(self, token: int) -> bool:
        """Return whether the predicate accepts the text with a token; half a character waits for its other half."""
        text = self._vocabulary.text(self._data + self._vocabulary.forms[token])
        return text is not None and self._constraint.accepts("prefix", text)

    def complete(self) -> bool:
        """Return whether the text is complete and ends in a whole character."""
        text = self._vocabulary.text(self._data)
        if text is None or len(text.encode()) < len(self._data):
            return False
        if self._constraint.complete is None:
            return True
        complete = self._constraint.accepts("complete", text)
        if complete and self._constraint.check_monotone and not self._constraint.accepts("prefix", text):
            raise IntaglioError(
                f"the predicate is not monotone: {shorten(repr(text), 80)} is complete, but rejected as a prefix"
            )
        return complete

    def extended(self, token: int) -> State:
        """Return the state after a token, each of its characters checked."""
        after = self._data + self._vocabulary.forms[token]
        if self._constraint.check_monotone:
            before, text = (self._vocabulary.text(data) or "" for data in (self._data, after))
            for end in range(len(before) + 1, len(text)):
                if not self._constraint.accepts("prefix", text[:end]):
                    raise IntaglioError(
                        f"the predicate is not monotone: it rejects {shorten(repr(text[:end]), 80)} and accepts its "
                        f"continuation {shorten(repr(text), 80)}"
                    )
        return _PredicateState(self._constraint, self._vocabulary, after)


class Length(Constraint):
    """Strings with a number of characters or tokens in a range.

    Args:
        minimum: fewest, at least 0. Default 0.
        maximum: most. Default: no limit.
        unit: `characters` (Unicode code points) or `tokens` (the end token not counted). Default `characters`.

    Raises:
        IntaglioError: a range without a number.
    """

    def __init__(self, minimum: int = 0, maximum: int | None = None, unit: str = "characters") -> None:
        if minimum < 0 or (maximum is not None and maximum < minimum):
            raise IntaglioError(f"the length is {minimum} to {maximum}; 0 <= minimum <= maximum is accepted")
        if unit not in ("characters", "tokens"):
            raise IntaglioError(f"unit is {unit!r}; accepted: characters, tokens")
        self.minimum = minimum
        self.maximum = maximum
        self.unit = unit

    def start(self, vocabulary: Vocabulary) -> State:
        """Return the state of the empty prefix."""
        sizes_V = vocabulary.characters_V if self.unit == "characters" else np.ones(len(vocabulary), dtype=np.int64)
        return _LengthState(self, sizes_V, 0)


class _LengthState(State):
    exact = True

    def __init__(self, constraint: Length, sizes_V: np.ndarray, length: int) -> None:
        self._constraint = constraint
        self._sizes_V = sizes_V
        self._length = length

    def mask(self) -> np.ndarray:
        """Return the tokens that still fit."""
        most = self._constraint.maximum
        fits_V: np.ndarray = self._sizes_V <= (np.inf if most is None else most - self._length)
        return fits_V

    def allows(self, token: int) -> bool:
        """Return whether a token still fits."""
        most = self._constraint.maximum
        return most is None or self._length + int(self._sizes_V[token]) <= most

    def complete(self) -> bool:
        """Return whether it is long enough."""
        return self._length >= self._constraint.minimum

    def extended(self, token: int) -> State:
        """Return the state after a token."""
        return _LengthState(self._constraint, self._sizes_V, self._length + int(self._sizes_V[token]))
