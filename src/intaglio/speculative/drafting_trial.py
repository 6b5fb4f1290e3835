"""Drafting judged by measured times: seconds of passes with and without drafts, and the end of drafts that lose.

    session = on_trial(session, run, key, "nodes=N drafts all the same")

What heads add to a pass (their layers and rows, and the Python around them) differs between processors, and how much of
it is accepted between texts; neither follows from the cost of the target's passes. So a run begins with a few passes
without drafts, repeats one now and then, and drafts as long as

    mean tokens of a row and pass with drafts >= median seconds with drafts / median seconds without

for the last `PASSES` of both kinds. Seconds are from one `observe` to the next: a pass, its drafting and the loop. The
tuner's table keeps them, so that the next run knows them before it drafts.
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
EVERY = 32
"""Passes with drafts after which one without is measured again."""
_STOCK, _DRAFTED = "no drafts", "drafts"


def pass_ratio(key: str) -> float | None:
    """Return the seconds of a pass with drafts over those of one without, if a run has measured them."""
    tuner = tuning.tuner()
    times = tuner.known(key) if tuner is not None else {}
    return times[_DRAFTED] / times[_STOCK] if times.keys() == {_STOCK, _DRAFTED} else None


class _Trial:
    """A session whose drafts end where they are measured to lose; arguments as `on_trial`."""

    def __init__(self, session: Session, run: DecodingRun, key: str, remedy: str, clock: Callable[[], float]) -> None:
        self._session, self._run, self._key, self._remedy, self._clock = session, run, key, remedy, clock
        self._plain: deque[float] = deque(maxlen=PASSES)
        self._drafted: deque[tuple[float, float]] = deque(maxlen=PASSES)  # seconds, tokens
        self._last: dict[int, int] = {}
        self._began = 0.0
        self._due = PLAIN  # passes without drafts to make
        self._since = 0  # passes with drafts
        self._ended = False
        self._drafting = False

    def propose(self, rows: Sequence[int], room: Sequence[int]) -> Sequence[TokenTree]:
        """Return drafts, or roots alone where a pass without drafts is due."""
        self._drafting = not self._ended and not self._due
        if self._drafting:
            return self._session.propose(rows, room)
        return [root_only(self._last[row]) for row in rows]

    def observe(self, steps: Sequence[Step]) -> None:
        """Take in a pass and its seconds, and compare."""
        now = self._clock()
        self._last |= {step.row: step.tokens[-1] for step in steps}
        if not self._ended:
            self._session.observe(steps)
            if steps[0].tree is not None:
                self._count(now - self._began, steps)
        self._began = now

    def _count(self, seconds: float, steps: Sequence[Step]) -> None:
        whole = len(steps) == len(self._run.prompts)  # a pass over fewer rows takes less
        if not self._drafting:
            self._due -= 1
            if whole:
                self._plain.append(seconds)
            return
        self._since += 1
        if self._since % EVERY == 0:
            self._due = 1
        if not whole:
            return
        self._drafted.append((seconds, mean(len(step.tokens) for step in steps)))
        if len(self._drafted) == PASSES and len(self._plain) >= PLAIN:
            self._judge()

    def _judge(self) -> None:
        """Keep the times in the tuner's table, and end the drafts if they lose."""
        times = {_STOCK: median(self._plain), _DRAFTED: median(seconds for seconds, _ in self._drafted)}
        tuner = tuning.tuner()
        if tuner is not None and not tuner.known(self._key):
            tuner.keep(self._key, times)
            tuner.save()
        speed = mean(tokens for _, tokens in self._drafted) * times[_STOCK] / times[_DRAFTED]
        if speed < 1:
            self._ended = True
            self._run.statistics.note = (
                f"drafting ended after {self._since} passes, which were measured at {speed:.2f} times the speed of "
                f"passes without drafts ({self._remedy})"
            )


class _ForwardTrial(_Trial):
    """The same for a session that makes the target's passes; those without drafts are the target's own."""

    def forward(self, call: TreePass) -> Tensor:
        """See `ForwardSession.forward`."""
        if self._drafting:
            assert isinstance(self._session, ForwardSession)
            return self._session.forward(call)
        return call.cached.forward(call.inputs)


def on_trial(
    session: Session, run: DecodingRun, key: str, remedy: str, clock: Callable[[], float] = time.perf_counter
) -> Session:
    """Return a session whose drafts end where they are measured to lose.

    Args:
        session: drafts; without an acceptance policy of its own.
        run: the run.
        key: names drafts, model, rows and threads in the tuner's table.
        remedy: says in the note how to draft all the same.
        clock: seconds, increasing. Default: wall time.
    """
    kind = _ForwardTrial if isinstance(session, ForwardSession) else _Trial
    return kind(session, run, key, remedy, clock)


__all__ = ["EVERY", "PASSES", "PLAIN", "on_trial", "pass_ratio"]
