"""Compiled code in the threads of torch's own OpenMP pool: one hand-over a call, and no second pool.

    launch(address, bytearray(struct.pack("8q", *arguments)), threads)

The code at `address` is a C function of one pointer, to the arguments, which every thread calls; threads divide the
work among themselves by a counter in the arguments (`take`), so that fewer threads than requested do all of it.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

_ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@lru_cache(maxsize=1)
def _start() -> Any:
    """Return GOMP_parallel of the library that torch is linked with; None where it has none."""
    library = next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"), None)
    try:
        start = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    start.argtypes, start.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return start


def most_threads() -> int:
    """Return the most threads of a launch: torch's, or one where its library cannot be called."""
    return torch.get_num_threads() if _start() is not None else 1


@lru_cache(maxsize=256)
def _entry(address: int) -> Any:
    return _ENTRY(address)


def launch(address: int, arguments: bytearray, threads: int) -> None:
    """Call the function at an address with its arguments, in so many threads."""
    at = ctypes.addressof(ctypes.c_char.from_buffer(arguments))
    if threads > 1:
        _start()(address, at, threads, 0)
    else:
        _entry(address)(at)


__all__ = ["launch", "most_threads"]
