"""Sparse layers in a checkpoint: put in, noted for the reload, put in again, and held against their thresholds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.fingerprint import fingerprint
from intaglio.errors import IntaglioError
from intaglio.methods.activations.r_sparse.linear import Cut, Mode, Phase, Rule, SparseLinear
from intaglio.modeling.anatomy import Linear, anatomy
from intaglio.modeling.replacement import replace_modules
from intaglio.modeling.targets import plan_replacements

Layer = tuple[Rule, tuple[Tensor, Tensor] | None]
"""What is kept of a projection's inputs, and the factors for the others."""


def put_layers(checkpoint: Checkpoint, wanted: Mapping[str, Layer]) -> dict[str, SparseLinear]:
    """Put sparse layers in the place of projections.

    Args:
        checkpoint: changed in place.
        wanted: by the full names of projections.

    Returns:
        The layers by the same names.

    Raises:
        IntaglioError: some parts of a fused module are named and others are not.
    """
    every, made = anatomy(checkpoint.model).all_linears(), {}

    def make(name: str, linear: Linear) -> SparseLinear:
        rule, pair = wanted[name]
        conv = linear.rows is None and isinstance(linear.module, Conv1D)
        found = SparseLinear.of(linear.read(), linear.read_bias(), rule, pair, conv)
        made[name] = found
        return found

    linears = [(name, linear) for name, linear in every if name in wanted]
    replace_modules(checkpoint.model, plan_replacements(checkpoint.model, linears, every, make))
    return made


def put_cuts(model: nn.Module, cuts: Mapping[str, float]) -> None:
    """Put thresholds behind activation functions.

    Args:
        model: changed in place.
        cuts: threshold by where the function stands, as `model.get_submodule` takes it.
    """
    replace_modules(model, {name: Cut(model.get_submodule(name), threshold) for name, threshold in cuts.items()})


def sparse_modules(model: nn.Module) -> list[SparseLinear | Cut]:
    """Everything that chooses inputs in a model.

    Args:
        model: any.
    """
    return [module for module in model.modules() if isinstance(module, (SparseLinear, Cut))]


def set_phase(model: nn.Module, mode: Mode, fraction: float) -> None:
    """Have the tokens of a prompt dense, as the mode says, in place of what was said before.

    Args:
        model: has sparse layers.
        mode: see `Phase`; `all`: no token is dense.
        fraction: see `Phase`.
    """
    base = anatomy(model).base
    for key, hook in list(base._forward_pre_hooks.items()):
        if isinstance(hook, Phase):
            del base._forward_pre_hooks[key]
            base._forward_pre_hooks_with_kwargs.pop(key, None)
    phase = None if mode == "all" else Phase(mode, fraction)
    if phase is not None:
        base.register_forward_pre_hook(phase, with_kwargs=True)
    for module in sparse_modules(model):
        module.phase = phase


def weights_of(model: nn.Module) -> list[str]:
    """What thresholds belong to: fingerprints of the sparse layers' weights, as they are and as float16 has them.

    Args:
        model: has sparse layers.
    """
    holder = nn.Module()
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            holder.register_parameter(name.replace(".", "/"), module.weight)
    return [fingerprint(holder), fingerprint(holder, through=torch.float16)]


def part_of(
    model: nn.Module, layers: Mapping[str, SparseLinear], cuts: Mapping[str, float], mode: Mode, fraction: float
) -> dict[str, Any]:
    """The live part of the record.

    Args:
        model: with everything in place.
        layers: by the names of their projections.
        cuts: see `put_cuts`.
        mode: see `set_phase`.
        fraction: see `set_phase`.
    """
    return {
        "layers": {
            name: {
                "threshold": layer.rule.threshold,
                "channels": layer.rule.channels,
                "scaled": layer.rule.scaled,
                "rank": layer.rank,
            }
            for name, layer in layers.items()
        },
        "cuts": dict(cuts),
        "mode": mode,
        "fraction": fraction,
        "weights": weights_of(model),
    }


def build_empty(part: Mapping[str, Any], model: nn.Module) -> None:
    """Put empty layers into a model without weights.

    Args:
        part: from `part_of`.
        model: on the meta device.

    Raises:
        IntaglioError: the part does not fit the model.
    """
    known: Mapping[str, Mapping[str, Any]] = part["layers"]
    with torch.device("cpu"):  # which rows of a fused module are whose is known without weights
        every = anatomy(model).all_linears()
    names = {name for name, _ in every}
    missing = sorted(set(known) - names)
    if missing:
        raise IntaglioError(f"the model has no projection named {missing[0]}")

    def empty(name: str, linear: Linear) -> SparseLinear:
        (outputs, inputs), one = linear.shape, known[name]
        module: Any = linear.module
        conv = linear.rows is None and isinstance(module, Conv1D)
        rule = Rule(one["threshold"], one["channels"], one["scaled"])
        return SparseLinear(
            inputs, outputs, one["rank"], module.bias is not None, rule, conv, device="meta", dtype=module.weight.dtype
        )

    with torch.device("cpu"):
        replace_modules(
            model, plan_replacements(model, [(name, linear) for name, linear in every if name in known], every, empty)
        )
    put_cuts(model, part["cuts"])


def restore_runtime(part: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Set the phase of a model that was just loaded, and leave nothing of its layers to be trained.

    Args:
        part: from `part_of`.
        checkpoint: its model.

    Raises:
        IntaglioError: the thresholds belong to other weights.
    """
    model = checkpoint.model
    if weights_of(model)[0] not in part["weights"]:
        raise IntaglioError(
            f"the thresholds in the record of {checkpoint.source or 'this checkpoint'} were calibrated on another "
            f"model than the one beside it; apply r_sparse to that one anew"
        )
    freeze(model)
    set_phase(model, part["mode"], part["fraction"])


def freeze(model: nn.Module) -> None:
    """Leave nothing of the sparse layers to be trained: thresholds and factors belong to the weights as they are.

    Args:
        model: has them.
    """
    for module in model.modules():
        if isinstance(module, SparseLinear):
            module.requires_grad_(False)


__all__ = [
    "Layer",
    "build_empty",
    "freeze",
    "part_of",
    "put_cuts",
    "put_layers",
    "restore_runtime",
    "set_phase",
    "sparse_modules",
    "weights_of",
]  # fmt: skip
