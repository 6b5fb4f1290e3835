"""Sizes of the parts of each projection.

Dimension letters: I inputs, O outputs, R rank, C columns, E single weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from intaglio.errors import IntaglioError
from intaglio.methods.weights.sparsity_target import pruned_count
from intaglio.modeling.targets import matches

RANK_SHARE = 0.25
"""Default rank over the model's width, as 128 of 512 in the paper's model of 60M parameters."""
COMPLEMENT_SHARE = 0.5
"""Default triples of the complement over the model's width, as 256 of 512."""
COLUMN_SHARE = 0.05
"""Default columns over inputs."""

Amount = int | float
"""A number (an integer) or a share (a float)."""


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of one projection: I inputs, O outputs, rank R, C columns, E single weights."""

    inputs: int
    outputs: int
    rank: int
    columns: int
    elements: int = 0

    @property
    def parameters(self) -> int:
        """R (I + O) + C O + E."""
        return self.rank * (self.inputs + self.outputs) + self.columns * self.outputs + self.elements

    @property
    def dense(self) -> int:
        """I O, the numbers of the replaced weight."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class SizeSpec:
    """Size fields of `LOST`, from which the sizes of each projection follow.

    Args:
        rank: a number, a share of the width, or either by a pattern of names. None: a quarter of the width.
        columns: a number, or a share of the inputs.
        elements: a number, or a share of the weights.
        budget: in place of a rank, a share of the weight's numbers.
        within_rank: whether the sparse part is paid for out of the rank.
    """

    rank: Amount | Mapping[str, Amount] | None = None
    columns: Amount = COLUMN_SHARE
    elements: Amount = 0
    budget: float | None = None
    within_rank: bool = False

    def layer_sizes(self, name: str, outputs: int, inputs: int, width: int) -> LayerSizes:
        """Return the sizes of one projection; `width` is what a rank may be a share of.

        Raises:
            IntaglioError: nothing is left for the rank, or more columns or weights are requested than there are.
        """
        columns = self._count(self.columns, inputs)
        elements = self._count(self.elements, inputs * outputs)
        if columns > inputs:
            raise IntaglioError(f"columns is {columns}, but {name} has only {inputs} inputs")
        if elements > inputs * outputs:
            raise IntaglioError(f"elements is {elements}, but {name} has only {inputs * outputs} weights")
        sparse, pair = columns * outputs + elements, inputs + outputs
        if self.budget is not None:
            rank = (pruned_count(inputs * outputs, self.budget) - sparse) // pair
            field = f"budget is {self.budget}"
        else:
            rank = self._rank(name, min(inputs, outputs), width)
            field = f"rank is {rank}"
            if self.within_rank:
                rank -= math.ceil(sparse / pair)
        if rank < 1:
            raise IntaglioError(
                f"{field}, which leaves nothing for the rank of {name} beside {sparse:,} numbers of its sparse part"
            )
        return LayerSizes(inputs, outputs, min(rank, inputs, outputs), columns, elements)

    @staticmethod
    def _count(amount: Amount, of: int) -> int:
        if isinstance(amount, int):
            return amount
        return max(1, pruned_count(of, amount)) if amount else 0

    def _rank(self, name: str, narrow: int, width: int) -> int:
        rank: Amount | Mapping[str, Amount] | None = self.rank
        if isinstance(rank, Mapping):
            rank = next((rank for pattern, rank in rank.items() if matches(name, pattern)), None)
        if rank is None:
            rank = RANK_SHARE
        return min(narrow, rank if isinstance(rank, int) else max(1, round(rank * width)))
