"""A tuner whose times are given, for tests of what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from intaglio.environment.tuning import Calls, Times, Tuner


class GivenTimes(Tuner):
    """Times given instead of measured; each candidate is called once.

    Args:
        winner: the candidate that takes half as long as the others. Default: none.
        passes: seconds of a pass by its tokens. Default: a second for each.
    """

    def __init__(self, winner: str = "", passes: Mapping[int, float] | None = None) -> None:
        super().__init__()
        self._winner, self._passes = winner, passes or {}

    def times(self, key: str, candidates: Calls, *_: Any) -> Times:
        for call in candidates.values():
            call()
        if key.startswith("pass "):
            self.used[key] = {name: self._passes.get(int(name), float(name)) for name in candidates}
        else:
            self.used[key] = {name: 0.5 if name == self._winner else 1.0 for name in candidates}
        return self.used[key]
