"""Drafting judged by measured times: seconds of passes with and without drafts, and the end of drafts that lose.

    session = on_trial(session, run, key, "nodes=N drafts all the same")

What heads add to a pass (their layers and rows, and the Python around them) differs between processors, and how much of
it is accepted between texts; neither follows from the cost of the target's passes. So the first run on a machine begins
with a few passes without drafts, and every run drafts as long as, over its last `PASSES` passes with drafts,

    mean tokens of a row and pass >= median seconds of a pass with drafts / median seconds of one without

Seconds are from one `observe` to the next: a pass, its drafting and the loop. The tuner's table keeps them, unless
other processes held up the passes, so that later runs know them before they draft.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from statistics import mean, median

from torch import Tensor

from intaglio.environment import tuning
from intaglio.speculative.protocols import DecodingRun, ForwardSession, Session, Step, TreePass
from intaglio.speculative.tree import TokenTree, root_only

PLAIN, PASSES = 3, 16
"""Passes without drafts at the beginning, and with drafts, before the two are compared."""
_STOCK, _DRAFTED = "no drafts", "drafts"
Clock = Callable[[], tuple[float, float]]


def _clock() -> tuple[float, float]:
    return time.perf_counter(), time.thread_time()


def pass_ratio(key: str) -> float | None:
    """Return the seconds of a pass with drafts over those of one without, if a run has measured them."""
    tuner = tuning.tuner()
    times = tuner.known(key) if tuner is not None else {}
    return times[_DRAFTED] / times[_STOCK] if times.keys() == {_STOCK, _DRAFTED} else None


class _Trial:
    """A session whose drafts end where they are measured to lose; arguments as `on_trial`."""

    def __init__(self, session: Session, run: DecodingRun, key: str, remedy: str, clock: Clock = _clock) -> None:
        self._session, self._run, self._key, self._remedy, self._clock = session, run, key, remedy, clock
        self._ratio = pass_ratio(key)
        self._seconds: dict[str, list[float]] = {_STOCK: [], _DRAFTED: []}
        self._tokens: deque[float] = deque(maxlen=PASSES)
        self._last: dict[int, int] = {}
        self._first = self._before = (0.0, 0.0)
        self._passes = 0
        self._ended = self._drafting = False

    def propose(self, rows: Sequence[int], room: Sequence[int]) -> Sequence[TokenTree]:
        """Return drafts, or roots alone in passes without."""
        self._drafting = not self._ended and (self._ratio is not None or self._passes >= PLAIN)
        if self._drafting:
            return self._session.propose(rows, room)
        return [root_only(self._last[row]) for row in rows]

    def observe(self, steps: Sequence[Step]) -> None:
        """Take in a pass and its seconds, and compare."""
        now = self._clock()
        self._last |= {step.row: step.tokens[-1] for step in steps}
        if not self._ended:
            self._session.observe(steps)
            if steps[0].tree is None:
                self._first = now
            else:
                self._count(now, steps)
        self._before = now

    def _count(self, now: tuple[float, float], steps: Sequence[Step]) -> None:
        self._passes += 1
        if len(steps) == len(self._run.prompts):  # a pass over fewer rows takes less
            self._seconds[_DRAFTED if self._drafting else _STOCK].append(now[0] - self._before[0])
        if not self._drafting:
            return
        self._tokens.append(mean(len(step.tokens) for step in steps))
        if self._ratio is None and min(map(len, self._seconds.values())) >= PLAIN and len(self._tokens) == PASSES:
            self._ratio = self._measured(now)
        if self._ratio is not None and len(self._tokens) == PASSES and (speed := mean(self._tokens) / self._ratio) < 1:
            self._ended = True
            self._run.statistics.note = (
                f"drafting ended after {self._passes} passes, of which the last {PASSES} ran at {speed:.2f} times the "
                f"speed of passes without drafts ({self._remedy})"
            )

    def _measured(self, now: tuple[float, float]) -> float:
        """Return the ratio of the medians, and keep these in the tuner's table."""
        times = {name: median(seconds) for name, seconds in self._seconds.items()}
        wall, own = (after - before for after, before in zip(now, self._first, strict=True))
        tuner = tuning.tuner()
        if tuner is not None and own < (1 - tuning.BUSY) * wall:
            tuner.busy = True
        elif tuner is not None:
            tuner.keep(self._key, times)
            tuner.save()
        return times[_DRAFTED] / times[_STOCK]


class _ForwardTrial(_Trial):
    """The same for a session that makes the target's passes; those without drafts are the target's own."""

    def forward(self, call: TreePass) -> Tensor:
        """See `ForwardSession.forward`."""
        if self._drafting:
            assert isinstance(self._session, ForwardSession)
            return self._session.forward(call)
        return call.cached.forward(call.inputs)


def on_trial(session: Session, run: DecodingRun, key: str, remedy: str, clock: Clock = _clock) -> Session:
    """Return a session whose drafts end where they are measured to lose.

    Args:
        session: drafts; without an acceptance policy of its own.
        run: the run.
        key: names drafts, model, rows and threads in the tuner's table.
        remedy: says in the note how to draft all the same.
        clock: seconds, increasing, and those of them in which the thread ran. Default: as measured.
    """
    kind = _ForwardTrial if isinstance(session, ForwardSession) else _Trial
    return kind(session, run, key, remedy, clock)


__all__ = ["PASSES", "PLAIN", "on_trial", "pass_ratio"]
