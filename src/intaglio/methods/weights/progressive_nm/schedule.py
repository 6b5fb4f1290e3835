"""Sparsity schedules: the recipes as functions of the step.

A run of T steps has a dense phase, a span in which the recipe tightens, and a fine-tuning phase in which the mask is
binary. s counts finished steps (step t begins with s = t - 1), k those since the end of the dense phase. All phases are
ranges of steps, so that a run resumes within a phase.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from intaglio.errors import IntaglioError
from intaglio.methods.weights.progressive_nm.masks import Amount

Recipe = Literal[
    "mdgf-exp", "mdgf-linear", "sdgf-stepwise", "sdgf-geometric", "sdgf-densify", "custom", "ste", "sr-ste"
]
Gradient = Literal["chain", "ste"]
Phase = Literal["dense", "tightening", "sparse"]

DENSE, FINETUNE = 0.05, 0.25
"""Shares of the steps: the paper's short dense start, and its fine-tuning of 20 to 25 %."""
LEFT = 0.01
"""Value of z under exponential decay when fine-tuning begins."""
FRAMES = 4
"""Frames of the geometric and the densifying recipe."""
STRAIGHT: tuple[Recipe, ...] = ("ste", "sr-ste")
"""Recipes that begin sparse, with a straight-through gradient, as published."""


@dataclass(frozen=True)
class Moment:
    """State of a schedule in one step: `z` multiplies pruned weights, `amount` is the pattern in force."""

    phase: Phase
    z: float
    amount: Amount


@dataclass(frozen=True)
class Schedule:
    """A recipe over a run.

        mdgf-linear     z = max(1 - c k, 0)
        mdgf-exp        z = exp(-c k)
        sdgf-*          z = 0, and the pattern changes in equal frames
        ste, sr-ste     z = 0, and the final pattern from the end of the dense phase on

    Args:
        amount: the final (N, M), or the share of zeros.
        steps: T, of the whole run.
        recipe: which. Default `mdgf-exp`.
        dense: share of the steps before anything is pruned. Default None: 0.05; none for ste and sr-ste.
        finetune: share of the steps at the end with the final pattern and a binary mask. Default 0.25.
        decay: c, per step. Default None: such that z has fallen to 0 (linear) or 0.01 (exponential) where fine-tuning
            begins.
        frames: of `custom`: `{start: (N, M)}`, a start below 1 being a share of the steps; dense before the first.

    Raises:
        IntaglioError: a phase is no share, together they leave nothing, or the recipe has no such pattern.
    """

    amount: Amount
    steps: int
    recipe: Recipe = "mdgf-exp"
    dense: float | None = None
    finetune: float = FINETUNE
    decay: float | None = None
    frames: Mapping[float, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, share in (("dense", self.dense_share), ("finetune", self.finetune)):
            if not 0 <= share <= 1:
                raise IntaglioError(f"{name} is {share}; a share of the steps, from 0 to 1, is accepted")
        if self.dense_share + self.finetune > 1:
            raise IntaglioError(
                f"dense is {self.dense_share} and finetune {self.finetune}; together they are at most 1, the whole run"
            )
        if self.decay is not None and not self.decay >= 0:
            raise IntaglioError(f"decay is {self.decay}; a rate per step of at least 0 is accepted")
        if bool(self.frames) != (self.recipe == "custom"):
            raise IntaglioError(
                'custom, such as {"0": "7:8", "0.4": "2:8"}, belongs to the recipe custom and to no other'
            )
        if isinstance(self.amount, float) and self.recipe.startswith(("sdgf", "custom")):
            raise IntaglioError(f"the recipe {self.recipe} tightens a pattern; give pattern instead of sparsity")
        self.patterns()

    @property
    def dense_share(self) -> float:
        """The share of the dense phase."""
        default = 0.0 if self.recipe in STRAIGHT else DENSE
        return default if self.dense is None else self.dense

    @property
    def dense_steps(self) -> int:
        """Steps of the dense phase."""
        return round(self.dense_share * self.steps)

    @property
    def span(self) -> int:
        """Steps between the dense phase and fine-tuning."""
        return max(0, self.steps - self.dense_steps - round(self.finetune * self.steps))

    @property
    def rate(self) -> float:
        """c, as given or by the scaling rule."""
        if self.decay is not None:
            return self.decay
        return (math.log(1 / LEFT) if self.recipe == "mdgf-exp" else 1.0) / max(1, self.span)

    def patterns(self) -> list[Amount]:
        """Return the patterns of the frames in order, the final one last."""
        if not isinstance(self.amount, tuple) or self.amount[0] == self.amount[1]:
            return [self.amount]
        keep, of = self.amount
        if self.recipe == "custom":
            return [*(self.frames[start] for start in sorted(self.frames)), self.amount]
        if self.recipe == "sdgf-stepwise":
            halvings = round(math.log2(of / keep))
            if keep * 2**halvings != of:
                raise IntaglioError(
                    f"sdgf-stepwise halves what is kept, and the pattern {keep}:{of} is no such fraction; take N:M with"
                    " M / N a power of 2, or the recipe custom"
                )
            return [(of - 1, of), *((of >> frame, of) for frame in range(1, halvings + 1))]
        if self.recipe == "sdgf-geometric":
            return [(keep << k, of << k) for k in reversed(range(FRAMES))]
        if self.recipe == "sdgf-densify":
            return [(keep, of << k) for k in reversed(range(FRAMES))]
        return [self.amount]

    def at(self, t: int) -> Moment:
        """Return the state in step `t`, from 1."""
        k = t - 1 - self.dense_steps
        if k < 0:
            return Moment("dense", 1.0, self.amount)
        if k >= self.span or self.recipe in STRAIGHT:
            return Moment("sparse", 0.0, self.amount)
        if self.recipe == "mdgf-linear":
            return Moment("tightening", max(1 - self.rate * k, 0.0), self.amount)
        if self.recipe == "mdgf-exp":
            return Moment("tightening", math.exp(-self.rate * k), self.amount)
        if self.recipe == "custom":
            begun = [start for start in sorted(self.frames) if (start * self.steps if start < 1 else start) <= t - 1]
            if not begun:
                return Moment("dense", 1.0, self.amount)
            return Moment("tightening", 0.0, self.frames[begun[-1]])
        frames = self.patterns()
        return Moment("tightening", 0.0, frames[k * len(frames) // self.span])

    def work(self, t: int, gradient: Gradient = "chain") -> float:
        """Return the operations of a step's three matrix products as a share of a dense step's.

        The forward product and that for the gradient of the input cover the nonzero weights (all of them while z > 0);
        the product for the gradient of the weights covers all under a straight-through gradient, and those of the mask
        under the chain rule once z = 0. These are operations, not seconds: no common kernel skips the zeros of patterns
        other than 2:4.
        """
        now = self.at(t)
        density = 1.0 if now.z > 0 else kept_share(now.amount)
        straight = gradient == "ste" or self.recipe in STRAIGHT
        return (2 * density + (1.0 if straight else density)) / 3


def kept_share(amount: Amount) -> float:
    """Return the share of weights that an amount keeps."""
    return amount[0] / amount[1] if isinstance(amount, tuple) else 1 - amount
