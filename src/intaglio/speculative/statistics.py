"""Cost of a run: passes, nodes, accepted tokens, and where the time went."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Statistics:
    """Counts and seconds of one call of `generate`.

    Attributes:
        passes: forward passes of the target, the prefill included.
        row_passes: the same, counted once for each row that was still active; equals `passes` with one row.
        nodes: drafted nodes verified, the roots not counted.
        tokens: tokens emitted.
        accepted: drafted tokens emitted.
        lengths: accepted drafted tokens of each tree pass and row.
        seconds: the whole call.
        model_seconds: inside the target's passes.
        drafter_seconds: inside the drafter's `start`, `propose` and `observe`.
        note: a remark of the drafter on the run, such as the reason for drafting nothing.
    """

    passes: int = 0
    row_passes: int = 0
    nodes: int = 0
    tokens: int = 0
    accepted: int = 0
    lengths: list[int] = field(default_factory=list)
    seconds: float = 0.0
    model_seconds: float = 0.0
    drafter_seconds: float = 0.0
    note: str = ""

    def record_pass(self, rows: int, start: float, device: torch.device) -> None:
        """Count a pass of the target over `rows` rows that began at `start` (`time.perf_counter()`)."""
        if device.type == "cuda":
            torch.cuda.synchronize()  # the call returns before the work is done
        self.model_seconds += time.perf_counter() - start
        self.passes += 1
        self.row_passes += rows

    @property
    def tokens_per_pass(self) -> float:
        """Tokens emitted per pass and row, the prefill included."""
        return self.tokens / self.row_passes if self.row_passes else 0.0

    @property
    def accepted_share(self) -> float:
        """Share of the verified drafted nodes that were accepted."""
        return self.accepted / self.nodes if self.nodes else 0.0

    @property
    def drafted_share(self) -> float:
        """Share of the emitted tokens that had been drafted."""
        return self.accepted / self.tokens if self.tokens else 0.0

    @property
    def loop_seconds(self) -> float:
        """Seconds outside the target and the drafter: masks, acceptance, processors, criteria, cache, streaming."""
        return self.seconds - self.model_seconds - self.drafter_seconds

    def as_dict(self) -> dict[str, Any]:
        """Return everything above as plain data, ready for JSON."""
        names = ("passes", "row_passes", "nodes", "tokens", "accepted", "lengths", "tokens_per_pass", "accepted_share",
                 "drafted_share", "seconds", "model_seconds", "drafter_seconds", "loop_seconds", "note")  # fmt: skip
        return {name: getattr(self, name) for name in names}
