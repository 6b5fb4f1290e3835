"""Sparsity masks: the zeros of pruned layers stay zeros while a model is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from intaglio.modeling.classifier import head_modules
from intaglio.modeling.replacement import REPLACED
from intaglio.trainer.fsdp import shard_like
from intaglio.trainer.protocols import ModifierSession, TrainingRun

LEAST = 0.05
"""Least share of zeros of a pruned matrix; trained weights are rarely zero by chance."""


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers of a model by name, without its output or classification head.

    Those inside a module that a method has put in are left out too: a factor may begin as zeros.
    """
    output: Any = getattr(model, "get_output_embeddings", None)
    inside = {id(part) for m in model.modules() if isinstance(m, REPLACED) for part in m.modules()}
    inside |= {id(part) for head in head_modules(model) for part in head.modules()}
    linears = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and id(m) not in inside}
    head = None if output is None else output()
    return {name: module for name, module in linears.items() if module is not head}


def pruned_mask(weight: Tensor) -> Tensor | None:
    """Return where a pruned matrix is not zero, bool in its shape; None if it is not pruned."""
    mask = weight.detach() != 0
    return mask if float(mask.float().mean()) <= 1 - LEAST else None


class SparsityMask:
    """Modifier that sets the zeros of pruned linear layers to zero again after each step.

    So the optimizer moves only the weights that pruning left: gradient descent projected onto the pattern.
    """

    def attach(self, run: TrainingRun) -> ModifierSession:
        """Record the zeros of the layers in training."""
        return _MaskSession(run.model)


class _MaskSession(ModifierSession):
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.zeros: dict[str, Tensor] = {}
        for name in linear_modules(model):
            weight = model.get_parameter(f"{name}.weight")
            mask = pruned_mask(weight) if weight.requires_grad else None
            if mask is not None:
                self.zeros[f"{name}.weight"] = ~mask

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        for name, zero in self.zeros.items():
            # By name: sharding puts another parameter into the model.
            weight = self.model.get_parameter(name)
            if zero.shape == weight.shape and type(zero) is not type(weight.data):
                zero = self.zeros[name] = shard_like(zero, weight)
            weight.masked_fill_(zero, 0)
