"""Weights of losses that follow what comes of them.

Both are told once an optimizer step what was seen, and say what the next step's weight is; their state is plain data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

LEAST = 1.025
"""The least that a weight rises by, if it rises."""
MOST = 4.0
"""The most that it may come to, over what it began with."""
FACTOR = 1.2
"""What the penalty of ReMoE is multiplied with, or divided by, each step."""


@dataclass
class Adaptive:
    """Pushes harder while the chunk loss goes up, and relaxes while it goes down.

    Held for `hold` steps. From then on, every `window` steps, with ρ the mean of the last window over that of the one
    before: if ρ > 1, ρ = max(ρ, 1.025); at most 4 times the first weight; the weight moves in a line to ρ times itself
    over the next window.

    Args:
        first: the weight that it begins with.
        hold: steps; at least two windows are seen before the first move.
        window: steps, at least 1.
        start: the weight that it moves from.
        goal: the weight that it moves to.
        since: the step from which it does.
        seen: the chunk loss of the last steps, two windows at the most.
    """

    first: float
    hold: int
    window: int
    start: float = field(init=False)
    goal: float = field(init=False)
    since: int = 0
    seen: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start = self.goal = self.first

    def weight(self, t: int) -> float:
        """The weight at an optimizer step.

        Args:
            t: the step, from 1.
        """
        return self.start + (self.goal - self.start) * min(1.0, (t - self.since) / self.window)

    def observe(self, t: int, loss: float) -> None:
        """Take note of a step, and choose a goal where one is due.

        Args:
            t: the step, from 1.
            loss: the mean chunk loss of its batches.
        """
        self.seen = [*self.seen, loss][-2 * self.window :]
        if t < self.hold or (t - self.hold) % self.window or len(self.seen) < 2 * self.window:
            return
        before, last = fmean(self.seen[: self.window]), fmean(self.seen[self.window :])
        now = self.weight(t)
        if before <= 0 or not now:
            return
        rho = last / before
        if rho > 1:
            rho = max(rho, LEAST)
        rho = min(rho, self.first * MOST / now)
        self.start, self.goal, self.since = now, now * rho, t

    def state(self) -> dict[str, Any]:
        """What `load` takes."""
        return {"start": self.start, "goal": self.goal, "since": self.since, "seen": list(self.seen)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave.

        Args:
            state: from `state`.
        """
        self.start, self.goal, self.since = float(state["start"]), float(state["goal"]), int(state["since"])
        self.seen = [float(value) for value in state["seen"]]


@dataclass
class Controlled:
    """Holds the sparsity at a target: the penalty is multiplied with 1.2 below it, divided by 1.2 above it, each step.

    Args:
        now: the weight.
        target: of the sparsity, 1 - k / E.
        factor: default 1.2.

    Source: Wang et al., ReMoE, ICLR 2025, section 3.
    """

    now: float
    target: float
    factor: float = FACTOR

    def weight(self, t: int) -> float:
        """The weight at an optimizer step.

        Args:
            t: the step; not looked at.
        """
        return self.now

    def observe(self, t: int, sparsity: float) -> None:
        """Take note of a step.

        Args:
            t: the step; not looked at.
            sparsity: of the routers, TLS.
        """
        if sparsity != self.target:
            self.now *= self.factor if sparsity < self.target else 1 / self.factor

    def state(self) -> dict[str, Any]:
        """What `load` takes."""
        return {"now": self.now}

    def load(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave.

        Args:
            state: from `state`.
        """
        self.now = float(state["now"])


__all__ = ["Adaptive", "Controlled"]
