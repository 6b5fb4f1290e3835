"""Choices between implementations, made by measurement on the machine at hand and kept in the user's cache.

    name = tuner().choose("linear 576x1536 float32 rows 4", {"stock": call, "prepacked": other})
    tuner().save()

The first candidate is the stock one. Another is chosen only if it was measured to be faster by `MARGIN`; what has not
been measured, or no longer fits in `LIMIT` seconds of a process, stays stock. Times are the least of alternated calls,
which other processes affect least; where these held up the measuring itself, they are used in this process only. Others
are kept in `tuning/NAME.json` of the cache directory, a file for each processor, version of torch and set of vector
instructions, under keys that name shape, dtype, rows and torch threads.

`INTAGLIO_TUNING` selects the mode: `on` (default); `off`, the built-in choices (every kernel that works, pass costs of
`speculative.pass_cost`), which do not depend on the machine; or the path of a table that `intaglio tune --json` has
written, whose times are used and nothing is measured. Tests and proofs run with `off`.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from intaglio import atomic_io
from intaglio.environment import cache_dir, processor, versions
from intaglio.errors import IntaglioError

VARIABLE = "INTAGLIO_TUNING"
LIMIT = 2.0
"""Seconds of measuring in a process; what has to be compiled is compiled before."""
SHARE = 0.03
"""Seconds of measuring for a choice, unless `ROUNDS` take longer."""
ROUNDS, MAX_ROUNDS = 3, 40
"""Fewest and most calls of a candidate."""
BUSY = 0.2
"""Share of a measurement that the thread did not run, from which on the machine was too busy to keep the times."""
_SHORTEST = 0.005
"""Seconds of a measurement for which that share means something."""
MARGIN = 0.03
"""A candidate is chosen if it takes at least this share less time than the stock one."""

Calls = Mapping[str, Callable[[], Any]]
Times = dict[str, float]
"""Seconds of each candidate, the stock one first."""


def fastest(times: Mapping[str, float]) -> str:
    """Return the fastest candidate, or the first where none is faster by `MARGIN`."""
    stock = next(iter(times))
    best = min(times, key=times.__getitem__)
    return best if times[best] <= (1 - MARGIN) * times[stock] else stock


@lru_cache(maxsize=1)
def machine() -> dict[str, str]:
    """Return what times depend on: the processor, torch, numba, and the vector instructions in use."""
    import torch

    packages = versions(["numba"])
    capability = torch.backends.cpu.get_cpu_capability()
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA", "all")
    return {
        "processor": processor(),
        "torch": packages["torch"],
        "numba": packages["numba"],
        "instructions": f"{capability}, oneDNN {isa}",
    }


class Tuner:
    """Table of measured times, and the measuring.

    Args:
        path: file of the table. Default: none, so that nothing is kept.
        measured: whether unknown choices are measured; without, candidates that the table does not know stay stock.
        limit: seconds of measuring. Default `LIMIT`.
        clock: seconds, increasing. Default: the thread's CPU time with one torch thread, which other processes hardly
            affect, else wall time.

    Attributes:
        left: seconds of measuring that are left.
        used: the times of every choice that was looked up, by key.
        skipped: whether a choice stayed stock because no time was left.
        busy: whether times are not kept because other processes held up the measuring.
        chosen: choices by a key of the caller's, for calls too short to format one.
    """

    def __init__(
        self,
        path: Path | None = None,
        measured: bool = True,
        limit: float = LIMIT,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.left = limit
        self.used: dict[str, Times] = {}
        self.skipped = self.busy = False
        self.chosen: dict[Any, str] = {}
        self._path, self._measured, self._clock = path, measured, clock or _seconds
        self._times = {} if path is None else _read(path, strict=not measured)
        self._new: dict[str, Times] = {}

    def choose(self, key: str, candidates: Calls, compiles: bool = False, reserve: float = 0.0) -> str:
        """Return the name of the candidate to use; the first is the stock one. Arguments as `times`."""
        times = self.times(key, candidates, compiles, reserve)
        return fastest(times) if times else next(iter(candidates))

    def times(self, key: str, candidates: Calls, compiles: bool = False, reserve: float = 0.0) -> Times:
        """Return the seconds of each candidate, measured if they are not known; empty if there is no time left.

        Args:
            key: names what the times depend on, the machine aside.
            candidates: calls by name, the stock one first.
            compiles: whether the first call of a candidate compiles, which is then not counted. Default False.
            reserve: seconds that are left for other choices. Default 0.
        """
        known = self._times.get(key, {})
        if known.keys() != dict(candidates).keys():
            if not self._measured or self.left <= reserve:
                self.skipped = True
                return {}
            for call in candidates.values() if compiles else ():
                call()
            left, own = self.left, time.thread_time()
            known = self._times[key] = self._measure(candidates)
            spent, own = left - self.left, time.thread_time() - own
            if self._clock is _seconds and spent > _SHORTEST and own < (1 - BUSY) * spent:
                self.busy = True
            else:
                self._new[key] = known
        self.used[key] = known
        return known

    def known(self, key: str) -> Times:
        """Return the seconds of each candidate of a choice, the stock one first; empty if they are not known."""
        return self._times.get(key, {})

    def keep(self, key: str, times: Times) -> None:
        """Add times that a caller has measured; a fixed table stays as it is."""
        if self._measured:
            self._times[key] = self._new[key] = self.used[key] = times

    def _measure(self, candidates: Calls) -> Times:
        start = self._clock()
        for call in candidates.values():
            call()  # allocates and warms up
        times: dict[str, list[float]] = {name: [] for name in candidates}
        now = self._clock()
        for turn in range(MAX_ROUNDS):
            if turn and now - start >= (SHARE if turn >= ROUNDS else self.left):
                break
            for name, call in candidates.items():
                call()
                before, now = now, self._clock()
                times[name].append(now - before)
        self.left -= now - start
        return {name: min(values) for name, values in times.items()}

    def save(self) -> None:
        """Add the new times to the file, which other processes may have written since it was read."""
        if self._path is None or not self._new:
            return
        try:
            written = _read(self._path, quiet=True)  # a damaged table has been reported when it was first read
            atomic_io.write_json(self._path, {"machine": machine(), "times": written | self._new})
        except IntaglioError as error:
            warnings.warn(f"measured again in the next process: {error}", stacklevel=2)
            self._path = None  # so that it is reported once
        self._new = {}

    def document(self) -> dict[str, Any]:
        """Return the choices looked up as plain data, in the format of the file."""
        return {"machine": machine(), "times": self.used}


def _seconds() -> float:
    import torch

    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _read(path: Path, strict: bool = False, quiet: bool = False) -> dict[str, Times]:
    """Return the table of a file: empty for no file, for another machine's, and for a damaged one, with a warning.

    Raises:
        IntaglioError: (strict) the file cannot be read or is damaged.
    """
    if not strict and not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        times = {
            str(key): {str(name): float(seconds) for name, seconds in entry.items()}
            for key, entry in document["times"].items()
        }
        if not all(entry and min(entry.values()) > 0 for entry in times.values()):
            raise ValueError("times must be above 0")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if strict:
            raise IntaglioError(
                f"{VARIABLE} is {str(path)!r}, which is no tuning table; on, off or a file that `intaglio tune --json` "
                "wrote are accepted"
            ) from error
        if not quiet:
            warnings.warn(f"the tuning table {path} is damaged, so its choices are measured again", stacklevel=2)
        return {}
    return times if strict or document.get("machine") == machine() else {}


def default_path() -> Path:
    """Return the file of this machine's table."""
    digest = hashlib.sha256(json.dumps(machine(), sort_keys=True).encode()).hexdigest()
    return cache_dir() / "tuning" / f"{digest[:16]}.json"


_OPEN: Any = object()
_current: Tuner | None = None
_given: Any = _OPEN


def tuner() -> Tuner | None:
    """Return the tuner of this process; None where the built-in choices hold.

    Raises:
        IntaglioError: `INTAGLIO_TUNING` names a file that is no tuning table.
    """
    global _current
    if _given is not _OPEN:
        given: Tuner | None = _given
        return given
    mode = os.environ.get(VARIABLE) or "on"
    if mode == "off":
        return None
    if _current is None:
        _current = Tuner(default_path()) if mode == "on" else Tuner(Path(mode), measured=False)
    return _current


@contextmanager
def using(given: Tuner | None) -> Iterator[None]:
    """Use this tuner in the whole process while the block runs; None: the built-in choices."""
    global _given
    before, _given = _given, given
    try:
        yield
    finally:
        _given = before
