"""What the kernels of numba share about threads."""

from __future__ import annotations

from functools import lru_cache

import numba


@lru_cache(maxsize=1)
def may_share() -> bool:
    """Whether threads may be used at all: numba's own pool, its last choice, ends the process if two launches meet."""
    numba.get_num_threads()  # makes numba choose
    chosen: str = numba.threading_layer()
    return chosen != "workqueue"


__all__ = ["may_share"]
