"""Projections replaced, rebuilt empty, and merged back.

Dimension letters: I inputs, O outputs, R rank, C columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from intaglio.checkpoint import DTYPES
from intaglio.errors import IntaglioError
from intaglio.methods.weights.lost.linear import ElementsLinear, Form, LostLinear, stock
from intaglio.methods.weights.lost.sizes import Sizes
from intaglio.methods.weights.lost.start import By, Decomposition, Init, drawn_pair, drawn_places, largest, within
from intaglio.modeling.anatomy import Linear
from intaglio.modeling.replacement import FusedLinears, ReplacedLinear, replace_modules
from intaglio.trainer.rng import generator


@dataclass(frozen=True)
class Start:
    """What the parts begin as; see `intaglio.methods.weights.lost.LOST`.

    Args:
        form: how they are put together, the scale of an adapter left out (it is `alpha` over the rank).
        init: of the pair.
        by: what columns are chosen by.
        inverse: whether the complement has the smallest triples.
        values: where the columns' values come from, `weight` or `complement`.
        triples: of the complement.
        alpha: of an adapter; None: it is none.
        seed: of what is drawn.
    """

    form: Form
    init: Init = "svd"
    by: By = "l2"
    inverse: bool = False
    values: str = "weight"
    triples: int = 256
    alpha: float | None = None
    seed: int = 0

    def form_of(self, rank: int) -> Form:
        """The form of a projection.

        Args:
            rank: of it.
        """
        scale = None if self.alpha is None else self.alpha / rank
        return Form(self.form.low, self.form.sparse, self.form.activation, scale)

    def empty(self, sizes: Sizes, bias: bool, transposed: bool) -> LostLinear | ElementsLinear:
        """A module without values, on the meta device: nothing is drawn from the global generator.

        Args:
            sizes: of the projection.
            bias: whether it has one.
            transposed: whether it stands for a `Conv1D`.
        """
        kind, count = (ElementsLinear, sizes.elements) if sizes.elements else (LostLinear, sizes.columns)
        form = self.form_of(sizes.rank)
        with torch.device("meta"):
            return kind(sizes.inputs, sizes.outputs, sizes.rank, count, form, bias=bias, transposed=transposed)

    @torch.no_grad()
    def module(self, name: str, linear: Linear, sizes: Sizes, score_I: Tensor | None = None) -> ReplacedLinear:
        """The module that takes the place of one projection, on its device and in its dtype.

        Args:
            name: that random draws go by.
            linear: is read.
            sizes: of the parts.
            score_I: of the columns, for `by: gradient`.

        Raises:
            IntaglioError: the weight is packed, or not finite.
        """
        weight_OI, bias_O = linear.read(), linear.read_bias()
        if weight_OI.dtype not in DTYPES.values():
            raise IntaglioError(
                f"{name} stores its weight as {str(weight_OI.dtype).removeprefix('torch.')}; lost needs "
                f"{', '.join(DTYPES)}"
            )
        made = self.empty(sizes, bias_O is not None, isinstance(linear.module, Conv1D)).to(weight_OI.dtype)
        made.to_empty(device=weight_OI.device)
        draws = generator(self.seed, "lost", name)
        sparse = bool(sizes.columns) and sizes.columns < sizes.inputs
        decomposed = None
        if (
            self.init == "svd"
            or (sparse and self.by in ("l1", "l2"))
            or (sizes.columns and self.values == "complement")
        ):
            decomposed = Decomposition.of(weight_OI)
        if self.init == "svd" and decomposed is not None:
            A_RI, B_OR = decomposed.pair(sizes.rank)
        else:
            A_RI, B_OR = drawn_pair(sizes.inputs, sizes.outputs, sizes.rank, self.init, draws)
        made.down.weight.copy_(A_RI)
        made.up.weight[:, : sizes.rank].copy_(B_OR)
        if bias_O is not None:
            made.up.bias.copy_(bias_O)
        if isinstance(made, ElementsLinear):
            made.places.copy_(drawn_places(sizes.dense, sizes.elements, draws))
            made.values.copy_(within(torch.rand(sizes.elements, generator=draws), sizes.inputs))
            return made
        if sizes.columns:
            places_C = self._columns(sizes, decomposed, score_I, draws).to(weight_OI.device)
            made.columns.copy_(places_C)
            source_OI = weight_OI
            if self.values == "complement" and decomposed is not None:
                source_OI = decomposed.complement(sizes.rank, self.triples, self.inverse)
            made.up.weight[:, sizes.rank :].copy_(source_OI[:, places_C])
        if made.weight is not None:
            made.weight.copy_(weight_OI)
        return made

    def _columns(
        self, sizes: Sizes, decomposed: Decomposition | None, score_I: Tensor | None, draws: torch.Generator
    ) -> Tensor:
        """The places of the columns, sorted [C]."""
        if sizes.columns == sizes.inputs:
            return torch.arange(sizes.inputs)
        if self.by == "random":
            return drawn_places(sizes.inputs, sizes.columns, draws)
        if self.by == "gradient":
            if score_I is None:
                raise IntaglioError("columns_by is gradient, and no gradient was taken")
            return largest(score_I, sizes.columns)
        assert decomposed is not None  # these two look at nothing else
        return largest(decomposed.norms(sizes.rank, self.triples, self.by, self.inverse), sizes.columns)


def replaced_modules(model: nn.Module) -> dict[str, ReplacedLinear]:
    """What this method has put into a model, by where it stands, fused parts joined.

    Args:
        model: any model.
    """
    found: dict[str, ReplacedLinear] = {}
    for name, module in model.named_modules():
        alone = isinstance(module, (LostLinear, ElementsLinear))
        joined = isinstance(module, FusedLinears) and isinstance(module.parts[0], (LostLinear, ElementsLinear))
        if (alone and name.rpartition(".parts.")[0] not in found) or joined:
            found[name] = cast(ReplacedLinear, module)
    return found


@torch.no_grad()
def merged(module: ReplacedLinear) -> nn.Module:
    """The stock module with the matrix of a replaced one.

    Args:
        module: from `replaced_modules`.

    Raises:
        IntaglioError: there is an activation between the factors.
    """
    if isinstance(module, (LostLinear, ElementsLinear)):
        return module.merged()
    assert isinstance(module, FusedLinears)
    first: Any = module.parts[0]
    weight_OI = module.dense()
    # What it gives for nothing is its bias, in the order of the fused rows.
    bias_O = module(torch.zeros_like(first.A[:1]))[0] if first.has_bias else None
    return stock(weight_OI, bias_O, first.transposed, first.A)


def merge(module: nn.Module) -> list[str]:
    """Put stock layers with the same matrices in the place of those that `LOST` or `lostify` put into a module.

    What an adapter had frozen can be trained again.

    Args:
        module: changed in place, or not at all.

    Returns:
        The names of the layers; none if it has none.

    Raises:
        IntaglioError: there is an activation between the factors.
    """
    found = replaced_modules(module)
    replace_modules(module, {name: merged(replaced) for name, replaced in found.items()})
    kinds = [m for replaced in found.values() for m in replaced.modules() if isinstance(m, LostLinear)]
    if any(kind.form.adapter is not None for kind in kinds):
        module.requires_grad_(True)
    return list(found)


def freeze(model: nn.Module) -> None:
    """Leave nothing but factors and columns to be trained.

    Args:
        model: has adapters.
    """
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, LostLinear):
            module.down.weight.requires_grad_(True)
            module.up.weight.requires_grad_(True)


def summary(sizes: Mapping[str, Sizes]) -> dict[str, Any]:
    """What the record says of the sizes.

    Args:
        sizes: of each projection, by its full name.
    """
    whole, dense = sum(s.parameters for s in sizes.values()), sum(s.dense for s in sizes.values())
    groups: dict[str, dict[tuple[int, int], list[str]]] = {}
    for name, one in sizes.items():
        what = name.split(".", 2)[2] if name.startswith("layers.") else name
        groups.setdefault(what, {}).setdefault((one.rank, one.columns or one.elements), []).append(name)
    ranks: dict[str, list[int]] = {}
    for what, kinds in groups.items():
        for (rank, count), names in kinds.items():
            ranks |= {key: [rank, count] for key in ([what] if len(kinds) == 1 else names)}
    return {"parameters": whole, "dense_parameters": dense, "rank_and_sparse": ranks}


__all__ = [
    "Start",
    "freeze",
    "merge",
    "merged",
    "replaced_modules",
    "summary",
]
