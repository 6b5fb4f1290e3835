"""What is ranked: the layers of any module, and the units (filters, channels, neurons, heads) that go as a whole.

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
from intaglio.methods.weights.sparsity_target import not_ignored
from intaglio.modeling.anatomy import Linear, anatomy

Kind = Literal["unstructured", "filter", "channel", "neuron", "head"]
KINDS: tuple[Kind, ...] = ("unstructured", "filter", "channel", "neuron", "head")

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer that is ranked: a stored weight, or the rows of a fused one that belong together.

    Args:
        name: of the layer; a part of a fused one has its role in brackets behind it.
        tensor: name of the module that stores the weight.
        module: that module.
        rows: the output rows that belong to the layer, int64 [O]; None: all of them.
        transposed: whether the weight is stored as [I, O].
    """

    name: str
    tensor: str
    module: nn.Module
    rows: Tensor | None = None
    transposed: bool = False

    def of(self, stored: Tensor) -> Tensor:
        """The layer's part [O, ...] of a tensor in the shape of the stored weight.

        Args:
            stored: scores, say.
        """
        lying = stored.T if self.transposed else stored
        return lying if self.rows is None else lying[self.rows.to(stored.device)]

    def put(self, stored: Tensor, values: Tensor) -> None:
        """Write the layer's part of a tensor.

        Args:
            stored: in the shape of the stored weight; changed.
            values: [O, ...].
        """
        lying = stored.T if self.transposed else stored
        if self.rows is None:
            lying.copy_(values.view_as(lying))
        else:
            lying[self.rows.to(stored.device)] = values.view(len(self.rows), *lying.shape[1:])


@dataclass(frozen=True, eq=False)
class Member:
    """A weight, and which unit each of its entries belongs to.

    Args:
        tensor: name of the module that stores the weight.
        module: that module.
        unit: int64 in a shape that broadcasts to the weight's, such as [R, 1]; -1: to none, never masked.
    """

    tensor: str
    module: nn.Module
    unit: Tensor


@dataclass(frozen=True, eq=False)
class Units:
    """Units that are ranked against each other.

    Args:
        name: of the layer, or of the part of a block.
        count: U.
        members: the weights that the units are parts of.
    """

    name: str
    count: int
    members: tuple[Member, ...]


def find_layers(model: nn.Module, ignore: Sequence[str] = ()) -> list[Layer]:
    """The layers whose weights are ranked one by one.

    Of a Hugging Face model these are the projections of its blocks, as in every pruning step here (no embedding, no
    head; fused ones taken apart); of any other module all its linear layers and convolutions.

    Args:
        model: any module.
        ignore: layers left out, by name or shell pattern. Default: none.

    Raises:
        IntaglioError: there is none, `ignore` names none or all, or two share a weight.
    """
    if isinstance(model, PreTrainedModel):
        names = {id(module): name for name, module in model.named_modules()}
        found = [
            Layer(name, names[id(linear.module)], linear.module, linear.rows, isinstance(linear.module, Conv1D))
            for name, linear in anatomy(model).all_linears()
        ]
    else:
        found = [
            Layer(name, name, module, None, isinstance(module, Conv1D))
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, Conv1D, *CONVOLUTIONS))
        ]
    if not found:
        raise IntaglioError(f"{type(model).__name__} has no linear layer and no convolution, so there is none to prune")
    left = [found[place] for place in not_ignored([layer.name for layer in found], ignore)]
    _refuse_shared(model, [(layer.tensor, layer.module) for layer in left])
    return left


def find_units(model: nn.Module, kind: Kind, ignore: Sequence[str] = ()) -> list[Units]:
    """The units that are kept or removed as a whole.

    `filter`: outputs of a Conv2d. `channel`: inputs of a Conv2d. `neuron`: rows of an MLP's up (and gate) projections
    with the columns of its down projection. `head`: rows of the query projection with the columns of the output
    projection, and rows of key and value where each head has its own. All other weights stay dense.

    Args:
        model: for `neuron` and `head` a Hugging Face model.
        kind: which units.
        ignore: layers (for `neuron` and `head`: such as `layers.0.mlp`) left out. Default: none.

    Raises:
        IntaglioError: the model has no such units, or two layers share a weight.
    """
    if kind in ("filter", "channel"):
        found = [
            Units(name, units.shape[0] if kind == "filter" else module.in_channels, (Member(name, module, units),))
            for name, module in model.named_modules()
            if isinstance(module, nn.Conv2d)
            for units in [_of_convolution(module, kind)]
        ]
        if not found:
            raise IntaglioError(f"kind is {kind!r}, but {type(model).__name__} has no Conv2d; accepted: unstructured")
    else:
        if not isinstance(model, PreTrainedModel):
            raise IntaglioError(
                f"kind is {kind!r}, which needs a transformer of Hugging Face, not {type(model).__name__}; accepted:"
                " unstructured, filter, channel"
            )
        found = _of_blocks(model, kind)
    left = [found[place] for place in not_ignored([units.name for units in found], ignore)]
    _refuse_shared(model, [(member.tensor, member.module) for units in left for member in units.members])
    return left


def _of_convolution(module: nn.Conv2d, kind: Kind) -> Tensor:
    """The unit of each filter [O, 1, 1, 1], or of each input channel [1 or O, I / groups, 1, 1]."""
    out, into = module.weight.shape[:2]
    if kind == "filter":
        return torch.arange(out).view(-1, 1, 1, 1)
    group = torch.arange(out) // (out // module.groups) if module.groups > 1 else torch.zeros(1, dtype=torch.int64)
    return (group[:, None] * into + torch.arange(into)).view(-1, into, 1, 1)


def _of_blocks(model: PreTrainedModel, kind: Kind) -> list[Units]:
    parts = anatomy(model)
    names = {id(module): name for name, module in model.named_modules()}
    found = []
    for index in range(len(parts.blocks)):
        wanted = "mlp" if kind == "neuron" else "attention"
        own = [linear for linear in parts.linears(index) if linear.part == wanted]
        pieces = _neurons(own) if kind == "neuron" else _heads(own, parts.config)
        if pieces is None:
            raise IntaglioError(f"kind is {kind!r}, but the {kind}s of layers.{index} of this model cannot be told")
        count, rows, columns = pieces
        members = [_rows(linear, unit, names[id(linear.module)]) for linear, unit in rows]
        members.append(_columns(columns[0], columns[1], names[id(columns[0].module)]))
        found.append(Units(f"layers.{index}.{wanted}", count, tuple(members)))
    return found


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


def _refuse_shared(model: nn.Module, taken: Sequence[tuple[str, nn.Module]]) -> None:
    """Refuse weights that another module holds too: masked here, they would stay whole there."""
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name)
    for tensor, module in taken:
        if not isinstance(module.weight, nn.Parameter):
            raise IntaglioError(f"{tensor}.weight is parametrized already; remove that before pruning")
        others = owners.get(id(module.weight), set()) - {f"{tensor}.weight"}
        if others:
            raise IntaglioError(
                f"{tensor}.weight is tied to {min(others)}; name it in ignore, or untie the two before pruning"
            )
