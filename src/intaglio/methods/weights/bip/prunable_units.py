"""Prunable units: the layers of any module, and filters, channels, neurons and heads that are pruned as a whole.

Dimension letters: O outputs, I inputs, R rows of what is stored, U units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from intaglio.errors import IntaglioError
from intaglio.methods.weights.prunable_layers import prunable_layers, refuse_shared
from intaglio.methods.weights.sparsity_target import not_ignored
from intaglio.modeling.anatomy import Linear, anatomy

Kind = Literal["unstructured", "filter", "channel", "neuron", "head"]


@dataclass(frozen=True, eq=False)
class Layer:
    """A ranked layer: a stored weight, or some output rows of a fused one (`rows`, int64 [O]).

    `tensor` is the name of the module that stores the weight; `transposed` is for weights stored as [I, O].
    """

    name: str
    tensor: str
    module: nn.Module
    rows: Tensor | None = None
    transposed: bool = False

    def slice_of(self, stored: Tensor) -> Tensor:
        """Return the layer's part [O, ...] of a tensor in the shape of the stored weight."""
        rows_first = stored.T if self.transposed else stored
        return rows_first if self.rows is None else rows_first[self.rows.to(stored.device)]

    def put(self, stored: Tensor, values: Tensor) -> None:
        """Write the layer's part of a tensor."""
        rows_first = stored.T if self.transposed else stored
        if self.rows is None:
            rows_first.copy_(values.view_as(rows_first))
        else:
            rows_first[self.rows.to(stored.device)] = values.view(len(self.rows), *rows_first.shape[1:])


@dataclass(frozen=True, eq=False)
class Member:
    """A weight, with the unit of each entry: int64, broadcast to its shape; -1: none, never masked."""

    tensor: str
    module: nn.Module
    unit: Tensor


@dataclass(frozen=True, eq=False)
class Units:
    """Units that are ranked against each other, and the weights that they consist of."""

    name: str
    count: int
    members: tuple[Member, ...]


def find_layers(model: nn.Module, ignore: Sequence[str] = ()) -> list[Layer]:
    """Return the layers whose weights are ranked one by one.

    Of a Hugging Face model these are the projections of its blocks, as in every pruning step (no embedding, no head;
    fused ones taken apart); of any other module all linear layers and convolutions.
    """
    if not isinstance(model, PreTrainedModel):
        return [
            Layer(name, name, module, None, isinstance(module, Conv1D))
            for name, module in prunable_layers(model, ignore)
        ]
    names = {id(module): name for name, module in model.named_modules()}
    linears = anatomy(model).all_linears()
    chosen = [linears[index] for index in not_ignored([name for name, _ in linears], ignore)]
    layers = [
        Layer(name, names[id(linear.module)], linear.module, linear.rows, isinstance(linear.module, Conv1D))
        for name, linear in chosen
    ]
    refuse_shared(model, [(layer.tensor, layer.module) for layer in layers])
    return layers


def find_units(model: nn.Module, kind: Kind, ignore: Sequence[str] = ()) -> list[Units]:
    """Return the units that are kept or removed as a whole.

    `filter`: outputs of a Conv2d. `channel`: inputs of a Conv2d. `neuron`: rows of an MLP's up (and gate) projections
    with the columns of its down projection. `head`: rows of the query projection with the columns of the output
    projection, and rows of key and value where each head has its own. All other weights stay dense.
    """
    if kind in ("filter", "channel"):
        groups = [
            Units(name, units.shape[0] if kind == "filter" else module.in_channels, (Member(name, module, units),))
            for name, module in model.named_modules()
            if isinstance(module, nn.Conv2d)
            for units in [_of_convolution(module, kind)]
        ]
        if not groups:
            raise IntaglioError(f"kind is {kind!r}, but {type(model).__name__} has no Conv2d; accepted: unstructured")
    else:
        if not isinstance(model, PreTrainedModel):
            raise IntaglioError(
                f"kind is {kind!r}, which needs a transformer of Hugging Face, not {type(model).__name__}; accepted:"
                " unstructured, filter, channel"
            )
        groups = _of_blocks(model, kind)
    chosen = [groups[index] for index in not_ignored([units.name for units in groups], ignore)]
    refuse_shared(model, [(member.tensor, member.module) for units in chosen for member in units.members])
    return chosen


def _of_convolution(module: nn.Conv2d, kind: Kind) -> Tensor:
    """Return the unit of each filter [O, 1, 1, 1], or of each input channel [1 or O, I / groups, 1, 1]."""
    out, into = module.weight.shape[:2]
    if kind == "filter":
        return torch.arange(out).view(-1, 1, 1, 1)
    group = torch.arange(out) // (out // module.groups) if module.groups > 1 else torch.zeros(1, dtype=torch.int64)
    return (group[:, None] * into + torch.arange(into)).view(-1, into, 1, 1)


def _of_blocks(model: PreTrainedModel, kind: Kind) -> list[Units]:
    parts = anatomy(model)
    names = {id(module): name for name, module in model.named_modules()}
    groups = []
    for index in range(len(parts.blocks)):
        part = "mlp" if kind == "neuron" else "attention"
        own = [linear for linear in parts.linears(index) if linear.part == part]
        pieces = _neurons(own) if kind == "neuron" else _heads(own, parts.config)
        if pieces is None:
            raise IntaglioError(f"kind is {kind!r}, but the {kind}s of layers.{index} cannot be identified")
        count, rows, columns = pieces
        members = [_rows(linear, unit, names[id(linear.module)]) for linear, unit in rows]
        members.append(_columns(columns[0], columns[1], names[id(columns[0].module)]))
        groups.append(Units(f"layers.{index}.{part}", count, tuple(members)))
    return groups


Pieces = tuple[int, list[tuple[Linear, Tensor]], tuple[Linear, Tensor]]


def _neurons(mlp: Sequence[Linear]) -> Pieces | None:
    if len(mlp) < 2:
        return None
    *ups, down = mlp
    width = down.shape[1]
    if any(up.shape[0] != width for up in ups):
        return None
    return width, [(up, torch.arange(width)) for up in ups], (down, torch.arange(width))


def _heads(attention: Sequence[Linear], config: Any) -> Pieces | None:
    heads = int(config.num_attention_heads)
    by_role = {linear.role: linear for linear in attention if linear.role in ("q", "k", "v")}
    others = [linear for linear in attention if linear.role not in by_role]
    if set(by_role) != {"q", "k", "v"} or len(others) != 1 or by_role["q"].shape[0] % heads:
        return None
    out, width = others[0], by_role["q"].shape[0]
    if out.shape[1] != width:
        return None
    unit = torch.arange(width) // (width // heads)
    # Keys and values that several heads read stay.
    own = [linear for linear in by_role.values() if linear.shape[0] == width]
    return heads, [(linear, unit) for linear in own], (out, unit)


def _rows(linear: Linear, unit_O: Tensor, tensor: str) -> Member:
    transposed = isinstance(linear.module, Conv1D)
    if linear.rows is not None:
        weight: Tensor = linear.module.weight  # type: ignore[assignment]
        unit_R = torch.full((weight.shape[1 if transposed else 0],), -1)
        unit_R[linear.rows] = unit_O
        unit_O = unit_R
    return Member(tensor, linear.module, unit_O[None] if transposed else unit_O[:, None])


def _columns(linear: Linear, unit_I: Tensor, tensor: str) -> Member:
    return Member(tensor, linear.module, unit_I[:, None] if isinstance(linear.module, Conv1D) else unit_I[None])
