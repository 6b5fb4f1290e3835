"""Take blocks out of a model so that it is, to the last attribute, what the stock loader makes of the smaller config.

What hangs on a block's place is found by building the family's own skeletons, without weights, of both depths: a number
that is the block's place in each of the two (the key-value cache is read and written by it) is set anew; anything else
that would come out different (a scale by depth, a first block that lacks a norm, tensors by layer) is refused.
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
"""Rules from which `layer_types` was once made: beside a list that no longer follows them they would mislead."""
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Cut:
    """What has to be done to a model.

    Args:
        kept: the blocks that stay, in order.
        settings: `(name, value)` of the configuration.
        stale: names that leave the configuration.
        attributes: `(module, name, value)`: places of blocks, and what a family derives from its list of layers.
    """

    kept: tuple[int, ...]
    settings: dict[str, Any]
    stale: tuple[str, ...]
    attributes: tuple[tuple[nn.Module, str, Any], ...]


def shortened(config: Any, kept: Sequence[int]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What a configuration says of a model with fewer blocks: its depth, and every list with an entry a block.

    Args:
        config: of the text part.
        kept: the blocks that stay.

    Returns:
        The settings that change, and the names that no longer hold.

    Raises:
        IntaglioError: each block has a configuration of its own.
    """
    depth = int(config.num_hidden_layers)
    if getattr(config, "is_heterogeneous", False):
        raise IntaglioError(
            f"blocks of this {config.model_type} cannot be dropped: its blocks have configurations of their own"
        )
    settings: dict[str, Any] = {
        name: type(value)(value[index] for index in kept)
        for name, value in vars(config).items()
        if isinstance(value, (list, tuple)) and len(value) == depth and "token" not in name and name != "architectures"
    }
    stale = tuple(name for name in _PATTERNS if name in vars(config)) if "layer_types" in settings else ()
    return {"num_hidden_layers": len(kept), **settings}, stale


def plan_cut(parts: Anatomy, kept: Sequence[int]) -> Cut:
    """Find out what leaving only some blocks takes, without touching the model.

    Args:
        parts: of the model.
        kept: the blocks that stay, in order.

    Raises:
        IntaglioError: the family ties a block to its place.
    """
    settings, stale = shortened(parts.config, kept)
    old = _skeleton(parts.model, {}, ())
    new = _skeleton(parts.model, settings, stale)
    live = parts.blocks
    attributes: list[tuple[nn.Module, str, Any]] = []
    for place, index in enumerate(kept):
        before, after = block_list(old)[index], block_list(new)[place]
        there = _same_parts(parts, before, after, f"block {index} cannot stand in the place of block {place}")
        for name, module in before.named_modules():
            for attribute, value, other in _differences(module, there[name]):
                if type(value) is not int or (value, other) != (index, place):
                    raise IntaglioError(
                        f"blocks of this {parts.config.model_type} cannot be dropped: {attribute} of "
                        f"{name or 'a block'} depends on the block's place"
                    )
                attributes.append((live[index].get_submodule(name), attribute, place))
    attributes += _around(parts, old, new)
    return Cut(tuple(kept), settings, stale, tuple(attributes))


def carry_out(parts: Anatomy, cut: Cut) -> None:
    """Take the blocks out.

    Args:
        parts: of the model; of no use afterwards.
        cut: from `plan_cut`.
    """
    found = block_list(parts.model)
    for index in reversed(range(len(found))):
        if index not in cut.kept:
            del found[index]
    for module, name, value in cut.attributes:
        setattr(module, name, value)
    for name, value in cut.settings.items():
        setattr(parts.config, name, value)
    for name in cut.stale:
        delattr(parts.config, name)


def unlike(parts: Anatomy) -> list[int]:
    """The first block, where it is built otherwise than the second (an encoder's that needs no norm before it).

    Args:
        parts: of the model.
    """
    if len(parts.blocks) < 2:
        return []
    return [0] if _built(parts.blocks[0]) != _built(parts.blocks[1]) else []


def _built(block: nn.Module) -> list[Any]:
    modules = [(name, type(module).__name__) for name, module in block.named_modules()]
    return [modules, [(name, tuple(tensor.shape)) for name, tensor in block.named_parameters()]]


def _skeleton(model: nn.Module, settings: dict[str, Any], stale: Sequence[str]) -> nn.Module:
    """The family's model of a changed configuration, without weights."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()  # type: ignore[operator, union-attr]
    for name, value in settings.items():
        setattr(text, name, value)
    for name in stale:
        delattr(text, name)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        made: nn.Module = type(model)(config)
    return made


def _same_parts(parts: Anatomy, before: nn.Module, after: nn.Module, what: str) -> dict[str, nn.Module]:
    """The modules of `after` by name, if they are the same kinds, with the same tensors, as those of `before`."""
    if _built(before) != _built(after):
        raise IntaglioError(f"in this {parts.config.model_type} {what}: it is built otherwise")
    return dict(after.named_modules())


def _differences(module: nn.Module, other: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Plain attributes of two modules whose values differ."""
    there = vars(other)
    for name, value in vars(module).items():
        if not name.startswith("_") and isinstance(value, _PLAIN) and there.get(name) != value:
            yield name, value, there.get(name)


def _around(parts: Anatomy, old: nn.Module, new: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """What the modules outside the blocks derive from the layers, such as whether any of them has a window."""
    before, after = _outside(old), _outside(new)
    shapes = [{n: tuple(p.shape) for n, p in one.items() if isinstance(p, torch.Tensor)} for one in (before, after)]
    kinds = [{n: type(m) for n, m in one.items() if isinstance(m, nn.Module)} for one in (before, after)]
    if shapes[0] != shapes[1] or kinds[0] != kinds[1]:
        raise IntaglioError(
            f"blocks of this {parts.config.model_type} cannot be dropped: parts outside its blocks depend on how many "
            "there are"
        )
    live = dict(parts.model.named_modules())
    return [
        (live[name], attribute, value)
        for name, module in before.items()
        if isinstance(module, nn.Module) and name in live
        for attribute, _, value in _differences(module, after[name])
    ]


def _outside(model: nn.Module) -> dict[str, Any]:
    """Modules and parameters by name, those of the blocks left out."""
    listed = block_list(model)
    inside = {id(part) for part in (*listed.modules(), *listed.parameters())}
    named = [*model.named_modules(), *((f"{name}:", tensor) for name, tensor in model.named_parameters())]
    return {name: part for name, part in named if id(part) not in inside}
