"""Target selection: projections by name or shell pattern, and the plan for replacing them or whole MLPs.

Dimension letters: O output features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from intaglio.errors import IntaglioError
from intaglio.modeling.anatomy import Anatomy, Linear, anatomy
from intaglio.modeling.replacement import (
    REPLACED,
    FusedLinears,
    ReplacedLinear,
    ReplacedMLP,
    module_names,
    replace_modules,
)

L = TypeVar("L", bound=ReplacedLinear)
M = TypeVar("M", bound=ReplacedMLP)


def check_patterns(names: Sequence[str], fields: Mapping[str, Sequence[str]]) -> None:
    """Refuse names and shell patterns that match no layer.

    Args:
        names: the layers, at least one.
        fields: `{field: names or shell patterns}`.

    Raises:
        IntaglioError: the first pattern that matches nothing, with its field.
    """
    for field, patterns in fields.items():
        for pattern in patterns:
            if not any(matches(name, pattern) for name in names):
                raise IntaglioError(
                    f"{field}: {pattern!r} names no layer of this model; its first is {names[0]}, and * and ? stand"
                    " for any characters"
                )


def select_layers(names: Sequence[str], targets: Sequence[str] | None, ignore: Sequence[str]) -> list[int]:
    """Return the indices of the names that `targets` (None: all) matches and `ignore` does not, in order."""
    return [
        index
        for index, name in enumerate(names)
        if (targets is None or any(matches(name, pattern) for pattern in targets))
        and not any(matches(name, pattern) for pattern in ignore)
    ]


def matches(name: str, pattern: str) -> bool:
    """Return whether a layer's name equals or matches a pattern."""
    # A part of a fused projection has brackets in its name, which are also pattern characters.
    return name == pattern or fnmatchcase(name, pattern)


def projections(model: nn.Module) -> list[tuple[str, Linear]]:
    """Return the projections of a transformer's blocks by full name, or the linear layers of any other module.

    Modules that a method has replaced are not among them.
    """
    if isinstance(model, PreTrainedModel):
        with torch.device("cpu"):  # the rows of fused projections are needed even where weights are on meta
            return anatomy(model).all_linears()
    inside = {id(part) for module in model.modules() if isinstance(module, REPLACED) for part in module.modules()}
    return [
        (name, Linear(name, "mlp", name.rpartition(".")[2], module))
        for name, module in model.named_modules()
        if name and isinstance(module, (nn.Linear, Conv1D)) and id(module) not in inside
    ]


def plan_replacements(model: nn.Module, names: Iterable[str]) -> dict[str, list[tuple[str, Linear]]]:
    """Return the projections to replace, grouped by the name of the module that holds them.

    Args:
        model: the model, perhaps without weights.
        names: the projections, named as in `projections`.

    Raises:
        IntaglioError: there is no such projection, only some parts of a fused module are named, or a projection shares
            its weight with another module.
    """
    every, modules, chosen = projections(model), module_names(model), set(names)
    missing = chosen - {name for name, _ in every}
    if missing:
        raise IntaglioError(f"the model has no projection named {min(missing)}")
    plan: dict[str, list[tuple[str, Linear]]] = {}
    for name, linear in every:
        plan.setdefault(modules[id(linear.module)], []).append((name, linear))
    for parts in plan.values():
        inside = [name for name, _ in parts if name in chosen]
        if inside and len(inside) < len(parts):
            outside = next(name for name, _ in parts if name not in chosen)
            raise IntaglioError(f"{inside[0]} and {outside} are one module of this model; name both or neither")
    plan = {module: parts for module, parts in plan.items() if parts[0][0] in chosen}
    refuse_tied(model, [parts[0][1].module for parts in plan.values()])
    return plan


def refuse_tied(model: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Refuse modules that share a parameter with another module.

    Raises:
        IntaglioError: names the two.
    """
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for module in modules:
        for parameter in module.parameters(recurse=False):
            tied = owners[id(parameter)]
            if len(tied) > 1:
                raise IntaglioError(f"{tied[0]} and {tied[1]} share one weight, so they cannot be replaced")


def replace_linears(model: nn.Module, names: Iterable[str], make: Callable[[str, Linear], L]) -> dict[str, L]:
    """Replace projections in place and return their replacements by full name; parts of a fused module are joined.

    Args:
        model: the model, perhaps without weights.
        names: the projections, named as in `projections`.
        make: makes the replacement of one projection from its full name and itself; an empty one for a model without
            weights, which a reload then fills.

    Raises:
        IntaglioError: see `plan_replacements`.
    """
    made: dict[str, L] = {}
    modules: dict[str, nn.Module] = {}
    for module, parts in plan_replacements(model, names).items():
        made |= {name: make(name, linear) for name, linear in parts}
        rows = [linear.rows for _, linear in parts if linear.rows is not None]
        modules[module] = FusedLinears([made[name] for name, _ in parts], rows) if rows else made[parts[0][0]]
    replace_modules(model, modules)
    return made


def replace_mlps(
    model: nn.Module, make: Callable[[int, Anatomy], M], indices: Iterable[int] | None = None
) -> dict[int, M]:
    """Replace the MLPs of blocks in place and return their replacements by block.

    Args:
        model: the model, perhaps without weights.
        make: makes the replacement of one block's MLP from the block's index and the model's anatomy.
        indices: the blocks. Default: all.

    Raises:
        IntaglioError: an MLP cannot be identified, or has been replaced already.
    """
    modules: dict[str, nn.Module] = {}
    with torch.device("cpu"):  # the rows of fused projections are needed even where weights are on meta
        parts, names = anatomy(model), module_names(model)
        blocks = range(len(parts.blocks)) if indices is None else list(indices)
        places = {index: parts.feed_forward(index) for index in blocks}
        made = {index: make(index, parts) for index in blocks}
    for index, place in places.items():
        modules |= place.puts(names[id(parts.blocks[index])], made[index])
    replace_modules(model, modules)
    return made
