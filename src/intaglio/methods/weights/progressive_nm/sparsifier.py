"""N:M training outside the trainer: any module with linear layers and convolutions, in any loop.

    sparsifier = NMSparsifier(model, 1, 16, steps=len(loader) * epochs, ignore=["head"])
    for t, (x, y) in enumerate(batches, start=1):
        sparsifier.step(t)                     # before the forward pass
        loss(model(x), y).backward(); optimizer.step(); optimizer.zero_grad()
    sparsifier.finalize()                      # plain weights again, the zeros burnt in

`optimizer` may be made before or after: the parameters stay the same objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from intaglio.errors import IntaglioError
from intaglio.methods.weights.progressive_nm.masks import Amount
from intaglio.methods.weights.progressive_nm.parametrization import Part, ProgressiveMask
from intaglio.methods.weights.progressive_nm.schedule import FINETUNE, Gradient, Moment, Recipe, Schedule, kept_share
from intaglio.methods.weights.sparsity_target import pruned_count

Along = Literal["inputs", "outputs"]
LAMBDA = 2e-4
"""Of SR-STE, as published."""
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer whose weight is pruned.

    Args:
        name: in the model.
        module: a linear layer or a convolution.
        parts: which rows by which schedule.
    """

    name: str
    module: nn.Module
    parts: tuple[Part, ...]


def axes(module: nn.Module, along: Along) -> tuple[int, int]:
    """The stored dimensions along which groups run, and of the outputs.

    Args:
        module: `nn.Linear` [O, I], transformers' `Conv1D` [I, O], or a convolution [O, I, ...].
        along: `inputs` or `outputs`.
    """
    out_axis = 1 if isinstance(module, Conv1D) else 0
    return (1 - out_axis if along == "inputs" else out_axis), out_axis


class ProgressiveWeights:
    """Masked weights of some layers, from the first step until they are baked.

    Args:
        layers: what is pruned.
        along: whether groups run along the inputs or the outputs. Default `inputs`.
        gradient: `chain` or `ste`. Default `chain`.
        pull: lambda of SR-STE, divided by the batches that are summed up in a step; 0 for none. Default 0.

    Raises:
        IntaglioError: a pattern does not fit a layer, or a layer's weight is no plain one.
    """

    def __init__(
        self, layers: Sequence[Layer], along: Along = "inputs", gradient: Gradient = "chain", pull: float = 0.0
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
        """`(name, dense weight, mask)` of each layer."""
        for name, module in self._layers.items():
            found: Any = module.parametrizations.weight  # type: ignore[union-attr]
            yield name, found.original, found[0]

    @property
    def now(self) -> Moment:
        """What holds in the step that was set, in the first layer."""
        return next(mask for _, _, mask in self.items()).moments[0]

    def set(self, t: int) -> None:
        """Move every layer to a step.

        Args:
            t: from 1.
        """
        for _, _, mask in self.items():
            mask.set(t)

    @torch.no_grad()
    def masks(self, *, final: bool = False) -> dict[str, Tensor]:
        """True where a weight is kept, by layer, in the shape that the layer stores.

        Args:
            final: whether by the final pattern, or by the one in force. Default False.
        """
        return {name: mask.keep(weight, final=final) for name, weight, mask in self.items()}

    @property
    def zeros(self) -> float:
        """The share of these layers' weights that the forward pass multiplies by zero in the step that was set."""
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
        """The mean second moment of the gradients at the weights that the mask leaves out, as AdamW has estimated it.

        High values are the noise that the paper holds responsible for what is lost at high sparsity.

        Args:
            optimizer: of the Adam family; None is returned for any other, and before its first step.
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
        """Forget the momentum of weights that the mask leaves out, so that it does not move them.

        Second moments stay, so a weight that comes back does not start with a leap.

        Args:
            optimizer: SGD, or of the Adam family.
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
        """Set what the final pattern leaves out to zero, and give the layers plain weights again."""
        for name, weight, mask in list(self.items()):
            weight.masked_fill_(~mask.keep(weight, final=True), 0)
            parametrize.remove_parametrizations(self._layers.pop(name), "weight", leave_parametrized=False)


def check_layer(layer: Layer, along: Along) -> None:
    """Refuse a layer that a pattern does not fit, or whose weight is shared with nobody knows whom.

    Args:
        layer: with its schedules.
        along: which way groups run.

    Raises:
        IntaglioError: names the layer.
    """
    weight: Tensor = layer.module.weight  # type: ignore[assignment]
    axis, out_axis = axes(layer.module, along)
    if parametrize.is_parametrized(layer.module, "weight"):
        raise IntaglioError(f"{layer.name} has a parametrization already; bake that first")
    if not weight.is_floating_point():
        raise IntaglioError(f"{layer.name} stores its weight as {weight.dtype}; N:M training needs plain numbers")
    for part in layer.parts:
        size = weight.shape[axis] if part.rows is None or axis != out_axis else len(part.rows)
        check_size(layer.name, size, part.schedule, along)


def check_size(name: str, size: int, schedule: Schedule, along: Along) -> None:
    """Refuse a width that is no multiple of the group of every pattern of a schedule.

    Args:
        name: of the layer.
        size: inputs (or outputs, where groups run along these).
        schedule: of the layer.
        along: which way groups run.

    Raises:
        IntaglioError: names layer, pattern and width.
    """
    for pattern in schedule.patterns():
        if isinstance(pattern, tuple) and size % pattern[1]:
            frame = "" if pattern == schedule.amount else f", a frame of {schedule.recipe},"
            raise IntaglioError(
                f"the pattern {pattern[0]}:{pattern[1]}{frame} does not fit {name}: its {size} {along} are not a"
                f" multiple of {pattern[1]}"
            )


class NMSparsifier:
    """Train a sparse network in a loop of your own (see the module for the loop).

    Args:
        model: any module; its `nn.Linear`, `nn.Conv1d/2d/3d` and transformers' `Conv1D` layers are pruned.
        n: N, weights that are kept.
        m: M, of so many in a row. N = M keeps everything.
        recipe: see `ProgressiveNM`. Default `mdgf-exp`.
        steps: optimizer steps of the whole training, from which phases are reckoned.
        dense_frac: share of the steps before anything is pruned. Default: 0.05; none for ste and sr-ste.
        finetune_frac: share of the steps at the end with a binary mask. Default 0.25.
        decay: c a step, of mdgf. Default: such that z has fallen to about 0 where fine-tuning begins.
        grad: `chain` or `ste`. Default `chain`; ste and sr-ste are always straight-through.
        targets: names or shell patterns of the layers that are pruned. Default: all.
        ignore: names or shell patterns of layers that stay dense, such as the first and the last. Default: none.
        sparsity: share of zeros of each tensor as a whole, in the place of N:M. Default: N:M.
        along: whether groups run along `inputs` (of a convolution: its channels) or `outputs`. Default `inputs`.
        sr_decay: lambda of SR-STE. Default 2e-4.
        frames: of the recipe `custom`: `{start: (N, M)}`, a start below 1 being a share of the steps.

    Raises:
        IntaglioError: a name fits no layer, a pattern does not fit a layer, a layer shares its weight with another
            module, or the recipe does not fit the pattern.
    """

    def __init__(
        self,
        model: nn.Module,
        n: int | None = None,
        m: int | None = None,
        recipe: Recipe = "mdgf-exp",
        *,
        steps: int,
        dense_frac: float | None = None,
        finetune_frac: float = FINETUNE,
        decay: float | None = None,
        grad: Gradient = "chain",
        targets: Sequence[str] = ("*",),
        ignore: Sequence[str] = (),
        sparsity: float | None = None,
        along: Along = "inputs",
        sr_decay: float = LAMBDA,
        frames: Mapping[float, tuple[int, int]] | None = None,
    ) -> None:
        self.model = model
        self.schedule = Schedule(
            _amount(n, m, sparsity), steps, recipe, dense_frac, finetune_frac, decay, dict(frames or {})
        )
        layers = [Layer(name, module, (Part(self.schedule),)) for name, module in _chosen(model, targets, ignore)]
        straight, pull = straight_through(recipe, grad, sr_decay)
        self.weights = ProgressiveWeights(layers, along, straight, pull)

    def step(self, t: int) -> None:
        """Move to a step, before its forward pass.

        Args:
            t: the optimizer step, from 1.
        """
        self.weights.set(t)

    @property
    def z(self) -> float:
        """What pruned weights are multiplied by in the step that was set."""
        return self.weights.now.z

    @property
    def sparsity(self) -> float:
        """The share of the layers' weights that the forward pass multiplies by zero in the step that was set."""
        return self.weights.zeros

    def masks(self) -> dict[str, Tensor]:
        """True where a weight is kept by the pattern in force, by layer, bool in the weight's shape."""
        return self.weights.masks()

    def mask_momentum(self, optimizer: torch.optim.Optimizer) -> None:
        """Forget the momentum of pruned weights; call it behind `step` while `z` is 0, under the gradient `chain`.

        Args:
            optimizer: SGD, or of the Adam family.
        """
        self.weights.mask_momentum(optimizer)

    def pruned_moment(self, optimizer: torch.optim.Optimizer) -> float | None:
        """The mean second moment of the gradients at pruned weights; None where the optimizer keeps none.

        Args:
            optimizer: of the Adam family.
        """
        return self.weights.pruned_moment(optimizer)

    def finalize(self) -> nn.Module:
        """Burn the binary mask in and return the model, stock modules with plain weights."""
        self.weights.bake()
        return self.model


def straight_through(recipe: Recipe, gradient: Gradient, pull: float) -> tuple[Gradient, float]:
    """The gradient and lambda of a recipe.

    Args:
        recipe: which.
        gradient: that was asked for.
        pull: lambda of SR-STE.
    """
    return ("ste" if recipe in ("ste", "sr-ste") else gradient), (pull if recipe == "sr-ste" else 0.0)


def _amount(n: int | None, m: int | None, sparsity: float | None) -> Amount:
    if sparsity is not None:
        if n is not None or m is not None or not 0 <= sparsity < 1:
            raise IntaglioError(f"sparsity is {sparsity}; a share from 0 up to 1 is accepted, in the place of n and m")
        return float(sparsity)
    if n is None or m is None or not 1 <= n <= m:
        raise IntaglioError(f"n is {n} and m is {m}; accepted: 1 <= n <= m, or sparsity in their place")
    return n, m


def _chosen(model: nn.Module, targets: Sequence[str], ignore: Sequence[str]) -> list[tuple[str, nn.Module]]:
    found = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D, *CONVOLUTIONS))}
    for pattern in (*targets, *ignore):
        if not any(fnmatchcase(name, pattern) for name in found):
            raise IntaglioError(
                f"{pattern!r} names no layer of this model; it has {', '.join(list(found)[:3]) or 'none'}"
            )
    chosen = [
        (name, module)
        for name, module in found.items()
        if any(fnmatchcase(name, pattern) for pattern in targets)
        and not any(fnmatchcase(name, pattern) for pattern in ignore)
    ]
    if not chosen:
        raise IntaglioError("targets and ignore leave no layer to prune")
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    for name, module in chosen:
        names = [] if parametrize.is_parametrized(module, "weight") else holders[id(module.weight)]
        others = [other for other in names if other != f"{name}.weight"]
        if others:
            raise IntaglioError(f"{name} shares its weight with {others[0]}, which would be pruned too; ignore {name}")
    return chosen
