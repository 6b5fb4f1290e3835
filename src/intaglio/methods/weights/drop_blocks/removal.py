"""Remove blocks from a model so that every attribute equals that of the stock loader's model of the smaller config.

Attributes that depend on a block's position are detected by building the family's own models on the meta device at both
depths: an attribute equal to the block's index in each (the key-value cache index) is reassigned; any other difference
(a scale by depth, a first block without a norm, per-layer tensors) is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from intaglio.errors import IntaglioError
from intaglio.modeling.anatomy import Anatomy, block_list

_PATTERNS = ("sliding_window_pattern", "global_attn_every_n_layers")
"""Rules from which `layer_types` is generated; stale once the list no longer follows them."""
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class RemovalPlan:
    """The blocks to keep, config settings to change and to remove, and `(module, name, value)` attributes to set."""

    kept: tuple[int, ...]
    settings: dict[str, Any]
    stale: tuple[str, ...]
    attributes: tuple[tuple[nn.Module, str, Any], ...]


def shortened_config(config: Any, kept: Sequence[int]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the settings of a config with fewer blocks (depth, per-layer lists), and the names that become stale."""
    depth = int(config.num_hidden_layers)
    if getattr(config, "is_heterogeneous", False):
        raise IntaglioError(f"blocks of this {config.model_type} cannot be dropped: they have configs of their own")
    settings: dict[str, Any] = {
        name: type(value)(value[index] for index in kept)
        for name, value in vars(config).items()
        if isinstance(value, (list, tuple)) and len(value) == depth and "token" not in name and name != "architectures"
    }
    stale = tuple(name for name in _PATTERNS if name in vars(config)) if "layer_types" in settings else ()
    return {"num_hidden_layers": len(kept), **settings}, stale


def plan_removal(parts: Anatomy, kept: Sequence[int]) -> RemovalPlan:
    """Determine the changes that keeping only some blocks requires, without touching the model."""
    settings, stale = shortened_config(parts.config, kept)
    old = _meta_model(parts.model, {}, ())
    new = _meta_model(parts.model, settings, stale)
    live = parts.blocks
    attributes: list[tuple[nn.Module, str, Any]] = []
    for position, index in enumerate(kept):
        before, after = block_list(old)[index], block_list(new)[position]
        counterparts = _matching_modules(parts, before, after, f"block {index} cannot replace block {position}")
        for name, module in before.named_modules():
            for attribute, value, other in _differences(module, counterparts[name]):
                if type(value) is not int or (value, other) != (index, position):
                    raise IntaglioError(
                        f"blocks of this {parts.config.model_type} cannot be dropped: {attribute} of "
                        f"{name or 'a block'} depends on the block's position"
                    )
                attributes.append((live[index].get_submodule(name), attribute, position))
    attributes += _outer_attributes(parts, old, new)
    return RemovalPlan(tuple(kept), settings, stale, tuple(attributes))


def apply_plan(parts: Anatomy, plan: RemovalPlan) -> None:
    """Remove the blocks."""
    blocks = block_list(parts.model)
    for index in reversed(range(len(blocks))):
        if index not in plan.kept:
            del blocks[index]
    for module, name, value in plan.attributes:
        setattr(module, name, value)
    for name, value in plan.settings.items():
        setattr(parts.config, name, value)
    for name in plan.stale:
        delattr(parts.config, name)


def atypical_blocks(parts: Anatomy) -> list[int]:
    """Return [0] where the first block is built differently from the second (an encoder's without a norm), else []."""
    if len(parts.blocks) < 2:
        return []
    return [0] if _structure(parts.blocks[0]) != _structure(parts.blocks[1]) else []


def _structure(block: nn.Module) -> list[Any]:
    modules = [(name, type(module).__name__) for name, module in block.named_modules()]
    return [modules, [(name, tuple(tensor.shape)) for name, tensor in block.named_parameters()]]


def _meta_model(model: nn.Module, settings: dict[str, Any], stale: Sequence[str]) -> nn.Module:
    """Return the family's model of a changed config, on the meta device."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()  # type: ignore[operator, union-attr]
    for name, value in settings.items():
        setattr(text, name, value)
    for name in stale:
        delattr(text, name)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return type(model)(config)


def _matching_modules(parts: Anatomy, before: nn.Module, after: nn.Module, what: str) -> dict[str, nn.Module]:
    """Return the modules of `after` by name; refuse other types or shapes than those of `before`."""
    if _structure(before) != _structure(after):
        raise IntaglioError(f"in this {parts.config.model_type} {what}: their modules or shapes differ")
    return dict(after.named_modules())


def _differences(module: nn.Module, other: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Yield the plain attributes of two modules that differ."""
    counterparts = vars(other)
    for name, value in vars(module).items():
        if not name.startswith("_") and isinstance(value, _PLAIN) and counterparts.get(name) != value:
            yield name, value, counterparts.get(name)


def _outer_attributes(parts: Anatomy, old: nn.Module, new: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Return the attributes outside the blocks that derive from the layers, such as whether any has a window."""
    before, after = _outer_parts(old), _outer_parts(new)
    shapes = [{n: tuple(p.shape) for n, p in one.items() if isinstance(p, torch.Tensor)} for one in (before, after)]
    kinds = [{n: type(m) for n, m in one.items() if isinstance(m, nn.Module)} for one in (before, after)]
    if shapes[0] != shapes[1] or kinds[0] != kinds[1]:
        raise IntaglioError(
            f"blocks of this {parts.config.model_type} cannot be dropped: parts outside its blocks depend on the "
            "number of blocks"
        )
    live = dict(parts.model.named_modules())
    return [
        (live[name], attribute, value)
        for name, module in before.items()
        if isinstance(module, nn.Module) and name in live
        for attribute, _, value in _differences(module, after[name])
    ]


def _outer_parts(model: nn.Module) -> dict[str, Any]:
    """Return modules and parameters outside the blocks, by name."""
    listed = block_list(model)
    inside = {id(part) for part in (*listed.modules(), *listed.parameters())}
    named = [*model.named_modules(), *((f"{name}:", tensor) for name, tensor in model.named_parameters())]
    return {name: part for name, part in named if id(part) not in inside}
