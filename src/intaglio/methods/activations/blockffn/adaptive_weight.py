"""Loss weights that follow the loss or the sparsity they cause.

Both observe one value an optimizer step and give the next step's weight; their state is plain data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

MIN_RISE = 1.025
"""Smallest factor of a weight that rises."""
MAX_GROWTH = 4.0
"""Largest weight over the first one."""
FACTOR = 1.2
"""Factor of ReMoE's penalty, up or down, each step."""


@dataclass
class AdaptiveWeight:
    """A weight that rises while the chunk loss rises, and falls while it falls.

    Held for `hold` steps. From then on, every `window` steps, with ρ the mean of the last window over that of the one
    before: if ρ > 1, ρ = max(ρ, 1.025); at most 4 times the first weight; the weight moves linearly to ρ times itself
    over the next window.

    Args:
        first: the first weight.
        hold: steps; at least two windows are seen before the first move.
        window: steps, at least 1.
    """

    first: float
    hold: int
    window: int
    start: float = field(init=False)  # the weight at `since`
    goal: float = field(init=False)  # the weight a window later
    since: int = 0  # the step at which the current move began
    seen: list[float] = field(default_factory=list)  # the chunk loss of the last two windows

    def __post_init__(self) -> None:
        self.start = self.goal = self.first

    def weight(self, step: int) -> float:
        """Return the weight at an optimizer step (from 1)."""
        return self.start + (self.goal - self.start) * min(1.0, (step - self.since) / self.window)

    def observe(self, step: int, loss: float) -> None:
        """Take in the mean chunk loss of a step, and set a goal where one is due."""
        self.seen = [*self.seen, loss][-2 * self.window :]
        if step < self.hold or (step - self.hold) % self.window or len(self.seen) < 2 * self.window:
            return
        before, last = fmean(self.seen[: self.window]), fmean(self.seen[self.window :])
        now = self.weight(step)
        if before <= 0 or not now:
            return
        rho = last / before
        if rho > 1:
            rho = max(rho, MIN_RISE)
        rho = min(rho, self.first * MAX_GROWTH / now)
        self.start, self.goal, self.since = now, now * rho, step

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain data."""
        return {"start": self.start, "goal": self.goal, "since": self.since, "seen": list(self.seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        self.start, self.goal, self.since = float(state["start"]), float(state["goal"]), int(state["since"])
        self.seen = [float(value) for value in state["seen"]]


@dataclass
class SparsityController:
    """A penalty weight that holds the sparsity at a target: each step times 1.2 below it, divided by 1.2 above it.

    Args:
        now: the weight.
        target: sparsity of the routers, 1 - k / E.

    Source: Wang et al., ReMoE, ICLR 2025, section 3.
    """

    now: float
    target: float

    def weight(self, step: int) -> float:
        """Return the weight, the same at every optimizer step until the next observation."""
        return self.now

    def observe(self, step: int, sparsity: float) -> None:
        """Take in the routers' sparsity (TLS) of a step."""
        if sparsity != self.target:
            self.now *= FACTOR if sparsity < self.target else 1 / FACTOR

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain data."""
        return {"now": self.now}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        self.now = float(state["now"])
