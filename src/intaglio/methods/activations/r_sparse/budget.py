"""Budget of a projection: kept channels, and the rank for the others.

Dimension letters: I inputs, O outputs, C channels, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from intaglio.errors import IntaglioError
from intaglio.modeling.targets import matches


def floor_share(size: int, share: float) -> int:
    """Return floor(size * share), safe from the rounding of products such as 100 * 0.29."""
    return math.floor(size * share + 1e-9 * size)


@dataclass(frozen=True)
class BudgetSplit:
    """Weights that one projection reads for a token.

    Args:
        inputs: I.
        outputs: O.
        share: of the inputs to keep, which thresholds are set for.
        channels: C, the whole number of them.
        rank: R; 0: the others are left out.
        sparsity: the share of the weights not to be read.
    """

    inputs: int
    outputs: int
    share: float
    channels: int
    rank: int
    sparsity: float

    @property
    def read(self) -> int:
        """Weights that are read for a token, C O + R (I + O)."""
        return self.channels * self.outputs + self.rank * (self.inputs + self.outputs)

    @property
    def dense(self) -> int:
        """Weights of the projection, I O."""
        return self.inputs * self.outputs

    @property
    def budget(self) -> float:
        """Weights that may be read, (1 - s) I O."""
        return (1 - self.sparsity) * self.dense

    @property
    def overspent(self) -> bool:
        """Whether more is read than may be: at least one channel and a rank of one are too much for small layers."""
        return self.read > self.budget + 1e-9 * self.dense


@dataclass(frozen=True)
class BudgetSpec:
    """Fields of `RSparse` that decide how a budget is split.

    Args:
        low_rank: whether the other channels go through a low-rank path; else they are left out.
        rank: of every projection; None: by what is left of the budget.
        strict: whether what the budget has no room for is left out, instead of one channel and rank 1.
    """

    low_rank: bool = True
    rank: int | None = None
    strict: bool = False

    def split(self, name: str, outputs: int, inputs: int, sparsity: float, alpha: float) -> BudgetSplit:
        """Split the budget of one projection.

            C = max(int(I (1 - s) alpha), 1)
            R = max(int((I O (1 - s) - C O) / (I + O)), 1)

        Without `low_rank` and at alpha 1 there is no low-rank path (R = 0, unless `rank` is set), at alpha 0 nothing
        else (C = 0).

        Raises:
            IntaglioError: `rank` is above the narrower side.
        """
        least, share = 0 if self.strict else 1, (1 - sparsity) * alpha
        channels = max(floor_share(inputs, share), least) if alpha else 0
        rank = 0
        if self.rank is not None:
            rank = self.rank
            if rank > min(inputs, outputs):
                raise IntaglioError(
                    f"rank is {rank}, above the width of {name}, {outputs} x {inputs}: at most {min(inputs, outputs)} "
                    "is accepted"
                )
        elif alpha < 1 and self.low_rank:
            # Of the real shape: in grouped-query attention keys and values have fewer outputs than inputs.
            left = inputs * outputs * (1 - sparsity) - channels * outputs
            rank = min(max(floor_share(1, left / (inputs + outputs)), least), inputs, outputs)
        return BudgetSplit(inputs, outputs, share if channels else 0.0, channels, rank, sparsity)


def alpha_of(name: str, alpha: float | Mapping[str, float], default: float) -> float:
    """Return a projection's alpha: one for all, or that of the first pattern that matches, else the default."""
    if not isinstance(alpha, Mapping):
        return alpha
    return next((value for pattern, value in alpha.items() if matches(name, pattern)), default)
