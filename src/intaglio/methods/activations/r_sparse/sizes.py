"""How many channels of a projection are kept, and the rank of what stands for the others.

Dimension letters: I inputs, O outputs, C channels, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from intaglio.errors import IntaglioError
from intaglio.modeling.targets import matches


def floor_share(size: int, share: float) -> int:
    """floor(size * share), safe from the rounding of products such as 100 * 0.29.

    Args:
        size: of the whole.
        share: of it.
    """
    return math.floor(size * share + 1e-9 * size)


@dataclass(frozen=True)
class Split:
    """What one projection reads for a token.

    Args:
        inputs: I.
        outputs: O.
        share: of the inputs that are kept, as thresholds are set for it.
        channels: C, the whole number of them.
        rank: R; 0: the others are left out.
        sparsity: the share of the weights that is not to be read.
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
        """Whether more is read than may be: a channel and a rank of one at the least are too much for small layers."""
        return self.read > self.budget + 1e-9 * self.dense


@dataclass(frozen=True)
class Wanted:
    """What decides the sizes; see `RSparse`.

    Args:
        low_rank: whether channels that are not kept go through a low-rank path.
        rank: of every projection; None: by what is left of the budget.
        strict: whether what the budget leaves no room for is left out, in the place of one channel and rank 1.
    """

    low_rank: bool = True
    rank: int | None = None
    strict: bool = False

    def of(self, name: str, outputs: int, inputs: int, sparsity: float, alpha: float) -> Split:
        """The sizes of one projection.

            C = max(int(I (1 - s) alpha), 1)
            R = max(int((I O (1 - s) - C O) / (I + O)), 1)

        At alpha 1 there is no low-rank path (R = 0, unless a rank is asked for), at alpha 0 nothing else (C = 0).

        Args:
            name: of it, for the sentence.
            outputs: O.
            inputs: I.
            sparsity: s.
            alpha: the share of the budget that channels get.

        Raises:
            IntaglioError: the rank that was asked for is above the narrower side.
        """
        if not self.low_rank:
            alpha = 1.0
        least, share = 0 if self.strict else 1, (1 - sparsity) * alpha
        channels = max(floor_share(inputs, share), least) if alpha else 0
        rank = 0
        if alpha < 1 or self.rank is not None:
            # Of the real shape: in grouped-query attention keys and values have fewer outputs than inputs.
            left = inputs * outputs * (1 - sparsity) - channels * outputs
            rank = max(floor_share(1, left / (inputs + outputs)), least) if self.rank is None else self.rank
            if rank > min(inputs, outputs):
                if self.rank is not None:
                    raise IntaglioError(
                        f"rank is {rank}, above the width of {name}, {outputs} x {inputs}: at most "
                        f"{min(inputs, outputs)} is accepted"
                    )
                rank = min(inputs, outputs)
        return Split(inputs, outputs, share if channels else 0.0, channels, rank, sparsity)


def alpha_of(name: str, alpha: float | Mapping[str, float], default: float) -> float:
    """The alpha of a projection: of the first name or pattern that means it.

    Args:
        name: of the projection.
        alpha: one for all, or by name or shell pattern.
        default: of what no pattern means.
    """
    if not isinstance(alpha, Mapping):
        return alpha
    return next((value for pattern, value in alpha.items() if matches(name, pattern)), default)


__all__ = ["Split", "Wanted", "alpha_of", "floor_share"]
