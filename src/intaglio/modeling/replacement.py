"""Base classes of the modules that replace stock linears and MLPs, and how they are put into a model and merged back.

A method puts such modules into a model and notes a runtime part in the record; its class builds the same modules,
empty, before a reload reads the weights (`intaglio.checkpoint.replacement`). `anatomy` knows their base class: it
counts them as projections and leaves them out of the plain ones.

Dimension letters: B any leading dimensions, D width, E units, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from intaglio.errors import IntaglioError


@dataclass
class InputCounter:
    """Counter of the inputs that a module multiplied (`kept`) and of all its inputs (`seen`)."""

    kept: int = 0
    seen: int = 0

    def add(self, kept: int, seen: int) -> None:
        """Count one pass."""
        self.kept += kept
        self.seen += seen

    @property
    def left_out(self) -> float:
        """Share of the inputs that were not multiplied."""
        return 1 - self.kept / max(1, self.seen)


class ReplacedLinear(nn.Module):
    """Base of projections from I to O features that replace an `nn.Linear` or a `Conv1D`.

    Args:
        in_features: I.
        out_features: O.
        has_bias: whether it adds a bias. Default False.
        transposed: whether it replaces a `Conv1D`, which stores its weight as [I, O]. Default False.
    """

    slug: str = ""
    """The method that made it, for error messages."""

    def __init__(self, in_features: int, out_features: int, has_bias: bool = False, transposed: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.has_bias, self.transposed = has_bias, transposed

    def dense(self) -> Tensor:
        """Return the matrix [O, I] that it multiplies with, in float32.

        Raises:
            IntaglioError: it is not a matrix product.
        """
        raise IntaglioError(f"the projections of {self.slug} are no matrix products")

    @property
    def packed_weights(self) -> int:
        """Number of weights beyond the numbers it stores, where several weights share one; 0 by default."""
        return 0

    def extra_repr(self) -> str:
        """Return the sizes as `nn.Linear` does."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class ReplacedMLP(nn.Module):
    """Base of feed-forward layers from D to D features that replace a block's own (`anatomy.feed_forward`).

    Args:
        width: D.
    """

    slug: str = ""
    """The method that made it, for error messages."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def active_units(self, x_BD: Tensor) -> Tensor | None:
        """Return which of its units fire for an input, bool [B, E]; None (the default) if all always do."""
        return None


REPLACED = (ReplacedLinear, ReplacedMLP)
"""Base classes of all replacements, for `isinstance`."""


class FusedLinears(ReplacedLinear):
    """Replaced projections of one fused module: each computes its own rows of the output.

    Args:
        parts: the projections, all with I inputs.
        rows: the output rows of each, int64, together every row once.
    """

    def __init__(self, parts: Sequence[ReplacedLinear], rows: Sequence[Tensor]) -> None:
        super().__init__(parts[0].in_features, sum(map(len, rows)), parts[0].has_bias, parts[0].transposed)
        self.parts, self.slug = nn.ModuleList(parts), parts[0].slug
        order_O = torch.cat([row.cpu() for row in rows]).argsort()
        # A list, not a buffer: a model on the meta device has no memory for buffers, and nothing would fill it.
        self.places = order_O.tolist()
        self._in_order = self.places == list(range(self.out_features))

    def forward(self, x_BI: Tensor) -> Tensor:
        """Return the outputs of the parts in the order of the fused rows [B, O]."""
        y_BO = torch.cat([part(x_BI) for part in self.parts], dim=-1)
        return y_BO if self._in_order else y_BO[..., self.places]

    def dense(self) -> Tensor:
        """Return the matrix [O, I] in the order of the fused rows; see the base."""
        weight_OI = torch.cat([part.dense() for part in self.parts])  # type: ignore[operator]
        return weight_OI if self._in_order else weight_OI[self.places]


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters of a model, each weight of a packed projection counted."""
    packed = sum(module.packed_weights for module in model.modules() if isinstance(module, ReplacedLinear))
    return sum(parameter.numel() for parameter in model.parameters()) + packed


def module_names(model: nn.Module) -> dict[int, str]:
    """Return `{id(module): name}`, with the names that `model.get_submodule` takes."""
    return {id(module): name for name, module in model.named_modules()}


def replace_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Replace submodules by name.

    Raises:
        IntaglioError: the model has no such submodule.
    """
    for name, module in modules.items():
        try:
            old = model.get_submodule(name)
        except AttributeError as error:
            raise IntaglioError(f"the model has no module {name}") from error
        module.train(old.training)
        model.set_submodule(name, module)


def outermost(model: nn.Module, kinds: tuple[type[ReplacedLinear], ...]) -> dict[str, ReplacedLinear]:
    """Return the replaced projections of some classes by name, parts of a fused module as their `Joined`."""
    modules: dict[str, ReplacedLinear] = {}
    for name, module in model.named_modules():
        fused = isinstance(module, FusedLinears) and isinstance(module.parts[0], kinds)
        if fused or (isinstance(module, kinds) and name.rpartition(".parts.")[0] not in modules):
            modules[name] = module
    return modules


@torch.no_grad()
def merge_linears(model: nn.Module, kinds: tuple[type[ReplacedLinear], ...]) -> list[str]:
    """Replace the projections of some classes by stock layers with the same matrix, and return their names.

    Raises:
        IntaglioError: a projection is not a matrix product; then nothing is changed.
    """
    modules = outermost(model, kinds)
    replace_modules(model, {name: stock_linear(module) for name, module in modules.items()})
    return list(modules)


@torch.no_grad()
def stock_linear(module: ReplacedLinear) -> nn.Linear | Conv1D:
    """Return the `nn.Linear` or `Conv1D` that computes the same as a replaced projection, in the same dtype."""
    weight_OI, like = module.dense(), next(p for p in module.parameters() if p.is_floating_point())
    with torch.device("meta"):  # nothing is drawn
        stock = (
            Conv1D(module.out_features, module.in_features)
            if module.transposed
            else nn.Linear(module.in_features, module.out_features, bias=module.has_bias)
        )
    stock.to(like.dtype).to_empty(device=like.device)
    stock.weight.copy_(weight_OI.T if module.transposed else weight_OI)
    if stock.bias is not None:
        # The output for an input of zeros is the bias, in the order of fused rows. A Conv1D always has one.
        stock.bias.copy_(
            module(like.new_zeros(1, module.in_features))[0] if module.has_bias else stock.bias.new_zeros(())
        )
    return stock
