"""Projections in full precision with the layer norm that ternary ones have in front of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.replacement import ReplacedLinear, module_names, replace_modules


class NormedLinear(ReplacedLinear):
    """y = W norm(x) + b, with a layer norm without weights."""

    slug = "bitnet"

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.weight, self.bias = linear.weight, linear.bias

    def dense(self) -> Tensor:
        """Return the weight."""
        return self.weight.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        """Return W norm(x) + b."""
        return F.linear(F.layer_norm(x, x.shape[-1:]), self.weight, self.bias)


@dataclass(frozen=True)
class InnerNorms:
    """Put layer norms in front of all projections, or leave the model as it is."""

    norms: bool = True

    def __call__(self, checkpoint: Checkpoint, seed: int) -> None:
        """Replace the projections in place."""
        if self.norms:
            names = module_names(checkpoint.model)
            modules: list[Any] = [linear.module for _, linear in anatomy(checkpoint.model).all_linears()]
            replace_modules(checkpoint.model, {names[id(module)]: NormedLinear(module) for module in modules})
