"""Peak memory and wall time of a piece of work."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch


@dataclass
class Peak:
    """Peak memory in bytes (of the device on a GPU, of the process on a CPU) and wall time, set when the block ends."""

    bytes: int = 0
    seconds: float = 0.0


def _reset_peak() -> bool:
    """Reset the kernel's high-water mark; return False where that is impossible (the process's own peak counts)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def _high_water() -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the peak memory and the wall time of a block.

    On a CPU this is the resident memory of the whole process, libraries and mapped weights included.
    """
    peak, start = Peak(), time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device)
    else:
        _reset_peak()
        yield peak
        peak.bytes = max(_high_water(), psutil.Process().memory_info().rss)
    peak.seconds = time.perf_counter() - start
