"""Quantized layers in a checkpoint: which projections, put in, packed, noted for the reload, and put in again empty.

A projection that shares a fused module with others becomes a layer of its own, so that each has its own scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from intaglio.errors import IntaglioError
from intaglio.methods.weights.bitnet.linear import SLUG, BitLinear, PackedLinear, Quantized
from intaglio.methods.weights.bitnet.quantization import Quantization, measured
from intaglio.modeling.anatomy import Anatomy, Linear, anatomy
from intaglio.modeling.replacement import FusedLinears, ReplacedLinear, module_names, replace_modules
from intaglio.modeling.targets import check_patterns, select_layers

Place = list[tuple[str, Linear]]
"""The projections of one module, with their full names."""


def taken(names: Sequence[str], targets: Sequence[str] | None, ignore: Sequence[str]) -> list[str]:
    """The names that `targets` and `ignore` leave.

    Args:
        names: of every plain projection, such as `layers.3.self_attn.q_proj`.
        targets: names or shell patterns; None: every projection.
        ignore: the same, left out.

    Raises:
        IntaglioError: an entry names no projection, or none is left.
    """
    check_patterns(names, {"targets": targets or [], "ignore": ignore})
    left = [names[place] for place in select_layers(names, targets, ignore)]
    if not left:
        raise IntaglioError("targets and ignore leave no layer of this model, so nothing would be quantized")
    return left


def places(parts: Anatomy, names: Sequence[str]) -> dict[str, Place]:
    """The projections with some names by the module that holds them.

    Args:
        parts: of the model.
        names: of projections.

    Raises:
        IntaglioError: a fused module is named in part, or there is no such projection.
    """
    where, wanted = module_names(parts.model), set(names)
    found: dict[str, Place] = {}
    for full, linear in parts.all_linears():
        found.setdefault(where[id(linear.module)], []).append((full, linear))
    chosen = {}
    for name, place in found.items():
        inside = [full for full, _ in place if full in wanted]
        outside = [full for full, _ in place if full not in wanted]
        if inside and outside:
            raise IntaglioError(
                f"{inside[0]} and {outside[0]} are fused in one module; quantize both or neither (see targets, ignore)"
            )
        if inside:
            chosen[name] = place
            wanted.difference_update(inside)
    if wanted:
        raise IntaglioError(f"the model has no projection named {min(wanted)}")
    return chosen


def _placed(place: Place, make: Callable[[Linear], Quantized]) -> nn.Module:
    """What stands in the place of a module: a layer, or those of a fused one."""
    made = [make(linear) for _, linear in place]
    if place[0][1].rows is None:
        return made[0]
    return FusedLinears(made, [linear.rows for _, linear in place if linear.rows is not None])


def _trained(linear: Linear, how: Quantization) -> BitLinear:
    """A layer with the projection's weight; the very parameters where the module is a plain linear of its own."""
    module: Any = linear.module
    bias = module.bias
    if isinstance(module, nn.Linear) and linear.rows is None:
        return BitLinear.of(cast(nn.Parameter, module.weight), bias, how)
    weight = nn.Parameter(linear.read().contiguous().clone(), module.weight.requires_grad)
    if bias is not None:
        own = bias.detach() if linear.rows is None else bias.detach()[linear.rows.to(bias.device)]
        bias = nn.Parameter(own.clone(), bias.requires_grad)
    return BitLinear.of(weight, bias, how)


def check_scales(parts: Anatomy, names: Sequence[str], how: Quantization) -> None:
    """Refuse, before anything is changed, weights whose measure is 0 or not finite.

    Args:
        parts: of the model.
        names: of the projections.
        how: the quantization.

    Raises:
        IntaglioError: names the first such projection.
    """
    wanted = set(names)
    for name, linear in parts.all_linears():
        if name not in wanted:
            continue
        weight_OI = linear.read()
        found = measured(weight_OI, how.weight_measure, how.per == "row")
        if not bool(torch.isfinite(found).all()):
            raise IntaglioError(f"{name} holds weights that are not finite; nothing is quantized")
        if bool((found == 0).any()):
            what = f"a row of {name}" if how.per == "row" else name
            if how.weight_measure == "median" and bool(weight_OI.any()):
                raise IntaglioError(
                    f"at least half of {what} is zero, so its median is 0 and scales nothing; set scale: mean"
                )
            raise IntaglioError(f"{what} is all zeros, which has no scale; leave it out with ignore")


def put_trained(parts: Anatomy, names: Sequence[str], how: Quantization) -> None:
    """Put layers that train into the model.

    Args:
        parts: of the model.
        names: of the projections.
        how: the quantization.
    """
    chosen = places(parts, names)
    replace_modules(
        parts.model, {name: _placed(place, lambda linear: _trained(linear, how)) for name, place in chosen.items()}
    )


def trained_layers(model: nn.Module) -> dict[str, BitLinear]:
    """The layers with float weights, by the names of their modules.

    Args:
        model: any.
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, BitLinear)}


def weights(model: nn.Module, names: Sequence[str]) -> list[nn.Parameter]:
    """The float weights of some projections, or of the layers that train where there are such.

    Args:
        model: any.
        names: of plain projections; none where layers that train are there.
    """
    if not names:
        return [layer.weight for layer in trained_layers(model).values()]
    wanted = set(names)
    found = [linear.module.weight for name, linear in anatomy(model).all_linears() if name in wanted]
    return cast(list[nn.Parameter], found)


def is_packed(model: nn.Module) -> bool:
    """Whether some layer has codes alone.

    Args:
        model: any.
    """
    return any(isinstance(module, PackedLinear) for module in model.modules())


def pack_layers(model: nn.Module) -> None:
    """Put packed layers in the place of those that train.

    Args:
        model: changed in place.
    """
    for name, layer in trained_layers(model).items():
        replace_modules(model, {name: PackedLinear.of(layer)})


def part_of(how: Quantization, names: Sequence[str], packed: bool) -> dict[str, Any]:
    """The live part of the record.

    Args:
        how: the quantization.
        names: of the projections.
        packed: whether codes alone are there.
    """
    return {"quantization": how.kept(), "layers": list(names), "packed": packed}


def build_empty(part: Mapping[str, Any], model: nn.Module) -> None:
    """Put empty layers into a model without weights.

    Args:
        part: from `part_of`.
        model: on the meta device.

    Raises:
        IntaglioError: the part does not fit the model.
    """
    how = Quantization(**part["quantization"])
    kind = PackedLinear if part["packed"] else BitLinear

    def empty(linear: Linear) -> Quantized:
        module: Any = linear.module
        into, out = linear.shape[1], linear.shape[0]
        return kind(into, out, module.bias is not None, how, device="meta", dtype=module.weight.dtype)

    with torch.device("cpu"):  # which rows of a fused module are whose is known without weights
        chosen = places(anatomy(model), [str(name) for name in part["layers"]])
        replace_modules(model, {name: _placed(place, empty) for name, place in chosen.items()})


def check_restore(part: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse a model that lacks what a live part names.

    Args:
        part: from `part_of`.
        model: just loaded.

    Raises:
        IntaglioError: it was loaded without the layers.
    """
    found = sum(isinstance(module, Quantized) for module in model.modules())
    if found != len(part["layers"]):
        raise IntaglioError(f"the model has {found} layers of {SLUG} where its record names {len(part['layers'])}")


def replaced_by(model: nn.Module) -> str:
    """The slug of the method that put other projections into a model; empty where none did.

    Args:
        model: any.
    """
    return next(
        (module.slug for module in model.modules() if isinstance(module, ReplacedLinear) and hasattr(module, "slug")),
        "",
    )
