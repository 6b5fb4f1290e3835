"""Modules that are the stock ones no more: what the rooms put in the place of a block's linears, or of its whole MLP.

A carving or a shaper puts such modules into the model and notes a live part in the record (`Checkpoint.set_runtime_state`); its
class builds the same modules again, empty, before a reload reads the weights (`intaglio.methods.base.Rebuilds`). `anatomy`
knows them by their base class: it counts them as projections, and leaves them out of what it offers for carving.

Dimension letters: B any leading dimensions, D width, E units, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from intaglio.errors import IntaglioError


@dataclass
class InputCounter:
    """How many inputs a module kept; put into its `tally` while they are counted, where it has such a place.

    Args:
        kept: inputs that were multiplied.
        seen: all of them.
    """

    kept: int = 0
    seen: int = 0

    def add(self, kept: int, seen: int) -> None:
        """Count those of a pass.

        Args:
            kept: that were multiplied.
            seen: all of them.
        """
        self.kept += kept
        self.seen += seen

    @property
    def left_out(self) -> float:
        """The share that was not multiplied."""
        return 1 - self.kept / max(1, self.seen)


class ReplacedLinear(nn.Module):
    """A projection from I to O features that stands in the place of an `nn.Linear` or `Conv1D`.

    Args:
        in_features: I.
        out_features: O.
    """

    slug: ClassVar[str]
    """Of the method that made it, for sentences."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    def dense(self) -> Tensor:
        """The matrix [O, I] that it multiplies with, in float32.

        Raises:
            IntaglioError: it is not a matrix product.
        """
        raise IntaglioError(f"the projections of {self.slug} are no matrix products")

    @property
    def packed_away(self) -> int:
        """How many more weights it has than numbers that it stores, as several share one; 0 by default."""
        return 0

    def extra_repr(self) -> str:
        """As `nn.Linear` says it."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class ReplacedMLP(nn.Module):
    """A feed-forward layer from D to D features that stands in the place of a block's own (`anatomy.feed_forward`).

    Args:
        width: D.
    """

    slug: ClassVar[str]
    """Of the method that made it, for sentences."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def active(self, x_BD: Tensor) -> Tensor | None:
        """Which of its units fire for an input, bool [B, E]; None (the default) where none ever rests.

        Args:
            x_BD: the input.
        """
        return None


REPLACED = (ReplacedLinear, ReplacedMLP)
"""What stands in the place of stock modules, for `isinstance`."""


class FusedLinears(ReplacedLinear):
    """Replaced projections in the place of one fused module: each gives its own rows of the output.

    Args:
        parts: the projections, all of I inputs.
        rows: the output rows of each, int64, together every row once.
    """

    def __init__(self, parts: Sequence[ReplacedLinear], rows: Sequence[Tensor]) -> None:
        super().__init__(parts[0].in_features, sum(map(len, rows)))
        self.parts = nn.ModuleList(parts)
        places_O = torch.empty(self.out_features, dtype=torch.int64, device="cpu")
        places_O[torch.cat([row.cpu() for row in rows])] = torch.arange(self.out_features, device="cpu")
        # As numbers, not as a buffer: a model's skeleton has no memory for buffers, and nothing would fill it.
        self._in_order = bool(torch.equal(places_O, torch.arange(self.out_features, device="cpu")))
        self.places = places_O.tolist()

    def forward(self, x_BI: Tensor) -> Tensor:
        """Return what the parts give, in the order of the fused rows [B, O].

        Args:
            x_BI: the input.
        """
        y_BO = torch.cat([part(x_BI) for part in self.parts], dim=-1)
        return y_BO if self._in_order else y_BO[..., self.places]

    def dense(self) -> Tensor:
        """See the base."""
        found_OI = torch.cat([part.dense() for part in self.parts])  # type: ignore[operator]
        return found_OI if self._in_order else found_OI[self.places]


def count_parameters(model: nn.Module) -> int:
    """The parameters of a model, each weight of a packed projection counted.

    Args:
        model: any model.
    """
    packed = sum(module.packed_away for module in model.modules() if isinstance(module, ReplacedLinear))
    return sum(parameter.numel() for parameter in model.parameters()) + packed


def module_names(model: nn.Module) -> dict[int, str]:
    """Where every module of a model stands: `{id(module): name}`, as `model.get_submodule` takes the names.

    Args:
        model: any model.
    """
    return {id(module): name for name, module in model.named_modules()}


def replace_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules in the place of others.

    Args:
        model: holds them.
        modules: by name, as `model.get_submodule` takes it.

    Raises:
        IntaglioError: the model has no such place.
    """
    for name, module in modules.items():
        try:
            old = model.get_submodule(name)
        except AttributeError as error:
            raise IntaglioError(f"the model has no module {name}") from error
        module.train(old.training)
        model.set_submodule(name, module)


__all__ = [
    "REPLACED",
    "FusedLinears",
    "InputCounter",
    "ReplacedLinear",
    "ReplacedMLP",
    "count_parameters",
    "module_names",
    "replace_modules",
]
