"""Masked weights of some layers, from the first training step until they are baked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from intaglio.errors import IntaglioError
from intaglio.methods.weights.progressive_nm.parametrization import Part, ProgressiveMask
from intaglio.methods.weights.progressive_nm.schedule import STRAIGHT, Gradient, Moment, Recipe, Schedule, kept_share
from intaglio.methods.weights.sparsity_target import pruned_count

Along = Literal["inputs", "outputs"]
LAMBDA = 2e-4
"""Of SR-STE, as published."""


@dataclass(frozen=True, eq=False)
class PrunedLayer:
    """A linear layer or convolution with the schedules of its rows."""

    name: str
    module: nn.Module
    parts: tuple[Part, ...]


def axes(module: nn.Module, along: Along) -> tuple[int, int]:
    """Return the stored dimensions of the groups and of the outputs."""
    out_axis = 1 if isinstance(module, Conv1D) else 0
    return (1 - out_axis if along == "inputs" else out_axis), out_axis


class MaskedWeights:
    """Masked weights of some layers; `pull` is lambda of SR-STE, divided by the batches that a step sums up."""

    def __init__(
        self, layers: Sequence[PrunedLayer], along: Along = "inputs", gradient: Gradient = "chain", pull: float = 0.0
    ) -> None:
        for layer in layers:
            check_layer(layer, along)
        self._layers: dict[str, nn.Module] = {}
        for layer in layers:
            axis, out_axis = axes(layer.module, along)
            weight: Tensor = layer.module.weight  # type: ignore[assignment]
            mask = ProgressiveMask(layer.parts, axis, out_axis, gradient, pull).to(weight.device)
            mask.train(layer.module.training)
            parametrize.register_parametrization(layer.module, "weight", mask)
            self._layers[layer.name] = layer.module

    def items(self) -> Iterator[tuple[str, nn.Parameter, ProgressiveMask]]:
        """Yield `(name, dense weight, mask)` of each layer."""
        for name, module in self._layers.items():
            parametrization: Any = module.parametrizations.weight  # type: ignore[union-attr]
            yield name, parametrization.original, parametrization[0]

    @property
    def now(self) -> Moment:
        """The state of the schedule in the step that was set, in the first layer."""
        return next(mask for _, _, mask in self.items()).moments[0]

    def set(self, t: int) -> None:
        """Move every layer to a step."""
        for _, _, mask in self.items():
            mask.set(t)

    @torch.no_grad()
    def masks(self, *, final: bool = False) -> dict[str, Tensor]:
        """Return the masks in force, or the final ones, by layer; True = kept."""
        return {name: mask.keep(weight, final=final) for name, weight, mask in self.items()}

    @property
    def zeros(self) -> float:
        """The share of the layers' weights that the forward pass multiplies by zero in the step that was set."""
        pruned, count = 0, 0
        for _, weight, mask in self.items():
            count += weight.numel()
            for part, now in zip(mask.parts, mask.moments, strict=True):
                share = 1.0 if part.rows is None else len(part.rows) / weight.shape[mask.out_axis]
                size = round(weight.numel() * share)
                pruned += 0 if now.z > 0 else pruned_count(size, 1 - kept_share(now.amount))
        return pruned / count

    @torch.no_grad()
    def pruned_moment(self, optimizer: torch.optim.Optimizer) -> float | None:
        """Return AdamW's mean second moment of the gradients at pruned weights; None for other optimizers.

        High values are the noise that the paper holds responsible for the loss of quality at high sparsity.
        """
        decays = {
            id(p): group["betas"][1] for group in optimizer.param_groups if "betas" in group for p in group["params"]
        }
        total, count = 0.0, 0
        for _, weight, mask in self.items():
            state: Any = optimizer.state.get(weight, {})
            if "exp_avg_sq" not in state:
                return None
            corrected = state["exp_avg_sq"] / (1 - decays[id(weight)] ** float(state["step"]))
            pruned = ~mask.keep(weight)
            total += float(corrected.masked_fill(~pruned, 0).sum(dtype=torch.float64))
            count += int(pruned.sum())
        return total / count if count else 0.0

    @torch.no_grad()
    def mask_momentum(self, optimizer: torch.optim.Optimizer) -> None:
        """Reset the momentum of pruned weights, so that it does not move them.

        Second moments stay, so a weight that comes back does not start with a leap.
        """
        for _, weight, mask in self.items():
            state: Any = optimizer.state.get(weight, {})
            pruned = None
            for key in ("exp_avg", "momentum_buffer"):
                if isinstance(state.get(key), Tensor):
                    pruned = ~mask.keep(weight) if pruned is None else pruned
                    state[key].masked_fill_(pruned, 0)

    @torch.no_grad()
    def bake(self) -> None:
        """Write the zeros of the final pattern, and restore plain weights."""
        for name, weight, mask in list(self.items()):
            weight.masked_fill_(~mask.keep(weight, final=True), 0)
            parametrize.remove_parametrizations(self._layers.pop(name), "weight", leave_parametrized=False)


def check_layer(layer: PrunedLayer, along: Along) -> None:
    """Refuse a layer that a pattern does not fit or that is parametrized already."""
    weight: Tensor = layer.module.weight  # type: ignore[assignment]
    axis, out_axis = axes(layer.module, along)
    if parametrize.is_parametrized(layer.module, "weight"):
        raise IntaglioError(f"{layer.name}.weight is parametrized already; remove that before pruning")
    if not weight.is_floating_point():
        raise IntaglioError(f"{layer.name} stores its weight as {weight.dtype}; N:M training needs plain numbers")
    for part in layer.parts:
        size = weight.shape[axis] if part.rows is None or axis != out_axis else len(part.rows)
        check_size(layer.name, size, part.schedule, along)


def check_size(name: str, size: int, schedule: Schedule, along: Along) -> None:
    """Refuse a width that is no multiple of the group of every pattern of a schedule."""
    for pattern in schedule.patterns():
        if isinstance(pattern, tuple) and size % pattern[1]:
            frame = "" if pattern == schedule.amount else f", a frame of {schedule.recipe},"
            raise IntaglioError(
                f"the pattern {pattern[0]}:{pattern[1]}{frame} does not fit {name}: its {size} {along} are not a"
                f" multiple of {pattern[1]}"
            )


def straight_through(recipe: Recipe, gradient: Gradient, pull: float) -> tuple[Gradient, float]:
    """Return the gradient and lambda of a recipe, given those requested."""
    return ("ste" if recipe in STRAIGHT else gradient), (pull if recipe == "sr-ste" else 0.0)
