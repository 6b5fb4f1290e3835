"""A design without a model, and claims about it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from intaglio.errors import DivergedError
from intaglio.evidence.engine.claim import Arm, Claim, Cost, Metric, Result, RunKey, Settings

LOSS = Metric("loss", "nats")


@dataclass(frozen=True)
class Noise:
    """Draws a loss around the arm's level; the tuned `rate` adds (log10(rate) + 3)²."""

    sd: float = 0.05
    inner: int = 1

    def run(self, arm: Arm, key: RunKey, settings: Settings) -> Result:
        rng = np.random.default_rng(key.seed)
        shared, own = rng.normal(size=self.inner), np.random.default_rng([key.seed, len(arm.what)]).normal()
        level = arm.settings.get("level", 1.0) + (np.log10(settings.get("rate", 1e-3)) + 3) ** 2
        losses = {f"d{i}": float(level + x + self.sd * own) for i, x in enumerate(shared)}
        if arm.settings.get("diverges") == "raises" or settings.get("rate", 0) > 0.1:
            raise DivergedError("the loss is nan at step 3")
        if arm.settings.get("diverges"):
            losses = dict.fromkeys(losses, float("nan"))
        return Result(
            {"loss": losses, "calls": 3.0}, Cost(tokens=arm.settings.get("tokens", 100)), {"data": str(key.seed)}
        )

    def toy(self, **changes: Any) -> Noise:
        return replace(self, **changes)


def toy_claim(method: float = 0.7, **changes: Any) -> Claim:
    """Return a claim whose method's loss is `method`, the baseline's 1 and the ceiling's 0.2."""
    arms = {
        "plain": Arm("plain training"),
        "better": Arm("the method", {"level": method}),
        "oracle": Arm("all data", {"level": 0.2}),
        "half": Arm("half of the method", {"level": (1 + method) / 2}),
    }
    fields: dict[str, Any] = {
        "slug": "wanda", "version": 1, "says": "The method has a lower loss.", "metric": LOSS, "delta": 0.1,
        "design": Noise(), "arms": arms, "baseline": "plain", "method": "better", "ceiling": "oracle",
        "ablations": ("half",), "parity": "equal tokens", "use_when": "tokens are scarce",
        "otherwise": "plain training",
        "tune": {"rate": (1e-5, 1e-4, 1e-3)}, "toy": {"sd": 0.01}, "equal": ("tokens",),
    }  # fmt: skip
    return Claim(**(fields | changes))
