"""Zeros that a carving made stay zeros while a model is trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from intaglio.modeling.replacement import REPLACED
from intaglio.modeling.token_classifier import classification_head
from intaglio.trainer.fsdp import shard_like
from intaglio.trainer.protocols import Batch, TrainingRun

LEAST = 0.05
"""The share of zeros from which on a matrix counts as pruned; trained weights hit zero by chance far more seldom."""


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers of a model by name, its output or labelling head left out.

    Those inside of what a method has replaced are its own business: a factor may begin as zeros.

    Args:
        model: a stock model.
    """
    output: Any = getattr(model, "get_output_embeddings", None)
    heads = (None if output is None else output(), classification_head(model))
    inside = {id(part) for m in model.modules() if isinstance(m, REPLACED) for part in m.modules()}
    found = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and id(m) not in inside}
    return {name: module for name, module in found.items() if not any(module is head for head in heads)}


def pruned_mask(weight: Tensor) -> Tensor | None:
    """Return where a pruned matrix is not zero, bool in its shape; None if it is not pruned.

    Args:
        weight: a matrix.
    """
    mask = weight.detach() != 0
    return mask if float(mask.float().mean()) <= 1 - LEAST else None


class SparsityMask:
    """A shaper that sets the zeros of pruned linear layers to zero again after each step.

    So the optimizer moves only what a carving left: gradient descent projected onto the pattern.
    """

    def __init__(self) -> None:
        self._model: nn.Module | None = None
        self._zeros: dict[str, Tensor] = {}

    def attach(self, run: TrainingRun) -> None:
        """Note the zeros of the layers that will be trained.

        Args:
            run: whose model is trained.
        """
        self._model = run.checkpoint.model
        for name in linear_modules(self._model):
            weight = self._model.get_parameter(f"{name}.weight")
            mask = pruned_mask(weight) if weight.requires_grad else None
            if mask is not None:
                self._zeros[f"{name}.weight"] = ~mask

    @torch.no_grad()
    def on_step(self, t: int) -> None:
        """Set the zeros again.

        Args:
            t: the step.
        """
        for name, zero in self._zeros.items():
            assert self._model is not None  # there are zeros
            # By name: sharding puts another parameter into the model.
            weight = self._model.get_parameter(name)
            if zero.shape == weight.shape and type(zero) is not type(weight.data):
                zero = self._zeros[name] = shard_like(zero, weight)
            weight.masked_fill_(zero, 0)

    def before_step(self, t: int, next_batch: Batch) -> None:
        """Do nothing."""

    def extra_loss(self, model: nn.Module, batch: Batch, outputs: Any) -> None:
        """Add nothing."""

    def param_groups(self) -> list[dict[str, Any]]:
        """Return none."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the zeros are those of the model that the run began with."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing."""

    def detach(self, run: TrainingRun) -> None:
        """Forget the model."""
        self._model = None
        self._zeros.clear()
