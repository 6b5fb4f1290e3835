"""Masks from scores: the exact top-k of |s|, over all layers, within each, or by units.

True = kept. Dimension letters: N entries of a layer, U units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from intaglio.errors import IntaglioError
from intaglio.methods.weights.bip.prunable_units import Layer, Units
from intaglio.methods.weights.sparsity_target import pruned_count
from intaglio.methods.weights.topk import keep_largest

Scope = Literal["global", "layer"]
Tensors = Mapping[str, Tensor]
"""By the name of the module that stores the weight, in the weight's shape."""


def magnitude_masks(
    scores: Tensors, layers: Sequence[Layer], sparsity: float, scope: Scope = "global", *, guard: bool = True
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return m = TopK(|s|) with exactly floor(sparsity numel) zeros in all layers together, or in each.

    A global ranking can empty a layer. With `guard` such a layer keeps its largest score, the total stays exact: the
    largest score of every layer then ranks before all others.

    Args:
        scores: s.
        layers: the layers to rank.
        sparsity: share of zeros, 0 <= sparsity < 1.
        scope: one ranking over all layers (`global`, default) or one for each (`layer`).
        guard: whether no layer may be emptied. Default True.

    Returns:
        The masks, True = kept, and the names of the layers that the guard saved from being emptied.

    Raises:
        IntaglioError: fewer weights are kept than there are layers, and the guard is on.
    """
    parts = [layer.slice_of(scores[layer.tensor]).abs().contiguous() for layer in layers]
    if scope == "layer":
        counts = [pruned_count(part.numel(), sparsity) for part in parts]
        kept = [keep_largest([part], count)[0] for part, count in zip(parts, counts, strict=True)]
        rescued: list[str] = []
    else:
        total = sum(part.numel() for part in parts)
        count = pruned_count(total, sparsity)
        kept = keep_largest(parts, count)
        rescued = [layer.name for layer, mask in zip(layers, kept, strict=True) if not mask.any()]
        if rescued and guard:
            if total - count < len(layers):
                raise IntaglioError(
                    f"sparsity is {sparsity:g}, which leaves {total - count} weights for {len(layers)} layers; at least"
                    " one weight a layer is needed"
                )
            for part in parts:
                part.view(-1)[part.argmax()] = torch.inf
            kept = keep_largest(parts, count)
    masks = {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
    for layer, mask in zip(layers, kept, strict=True):
        layer.put(masks[layer.tensor], mask)
    return masks, tuple(rescued if guard else ())


def unit_scores(scores: Tensors, units: Units, p: float = 2.0) -> Tensor:
    """Return the p-norm of |s| over all weights of a unit, [U]."""
    total_U = None
    for member in units.members:
        score = scores[member.tensor]
        if total_U is None:
            total_U = torch.zeros(units.count + 1, dtype=torch.float64, device=score.device)
        shape = list(member.unit.shape) + [1] * (score.dim() - member.unit.dim())
        alone = [axis for axis in range(score.dim()) if shape[axis] == 1]
        powers = score.double().abs().pow(p).sum(alone, keepdim=True)
        unit = member.unit.to(score.device).view(shape)
        total_U.index_add_(0, unit.reshape(-1) + 1, powers.reshape(-1))
    assert total_U is not None  # units have members
    return total_U[1:].pow(1 / p)


def unit_masks(scores: Tensors, groups: Sequence[Units], sparsity: float, p: float = 2.0) -> dict[str, Tensor]:
    """Return masks in which floor(sparsity U) units of each layer are zero, those of the least norm."""
    masks = {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
    for units in groups:
        (kept_U,) = keep_largest([unit_scores(scores, units, p)], pruned_count(units.count, sparsity))
        # What belongs to no unit is -1: the last, always kept.
        kept = torch.cat([kept_U, kept_U.new_ones(1)])
        for member in units.members:
            mask = masks[member.tensor]
            shape = list(member.unit.shape) + [1] * (mask.dim() - member.unit.dim())
            mask &= kept[member.unit.to(mask.device).view(shape)]
    return masks


def overlap(first: Tensors, second: Tensors) -> float:
    """Return the intersection over union of two sets of masks."""
    both = sum(int((first[name] & second[name]).count_nonzero()) for name in first)
    either = sum(int((first[name] | second[name]).count_nonzero()) for name in first)
    return both / either if either else 1.0
