"""Masks from scores: the exact top-k of |s|, over all layers, within each, or by units.

True = kept. Dimension letters: N entries of a layer, U units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from intaglio.errors import IntaglioError
from intaglio.methods.weights.bip.layers import Layer, Units
from intaglio.methods.weights.sparsity_target import pruned_count
from intaglio.methods.weights.topk import keep_largest

Scope = Literal["global", "layer"]
Tensors = Mapping[str, Tensor]
"""By the name of the module that stores the weight, in the weight's shape."""


def magnitude_masks(
    scores: Tensors, layers: Sequence[Layer], keep: float, scope: Scope = "global", *, guard: bool = True
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """m = TopK(|s|), exactly numel - floor((1 - keep) numel) entries of all layers together, or of each.

    A global ranking can empty a layer. With `guard` such a layer keeps its largest score, the total stays exact: the
    largest score of every layer then ranks before all others.

    Args:
        scores: s.
        layers: what is ranked.
        keep: share kept, above 0 and at most 1.
        scope: one ranking over all layers (`global`, default) or one for each (`layer`).
        guard: whether no layer may be emptied. Default True.

    Returns:
        The masks, and the names of the layers that the guard kept from being emptied.

    Raises:
        IntaglioError: fewer weights are kept than there are layers, and the guard is on.
    """
    parts = [layer.of(scores[layer.tensor]).abs().contiguous() for layer in layers]
    if scope == "layer":
        counts = [pruned_count(part.numel(), 1 - keep) for part in parts]
        kept = [keep_largest([part], count)[0] for part, count in zip(parts, counts, strict=True)]
        rescued: list[str] = []
    else:
        total = sum(part.numel() for part in parts)
        count = pruned_count(total, 1 - keep)
        kept = keep_largest(parts, count)
        rescued = [layer.name for layer, mask in zip(layers, kept, strict=True) if not mask.any()]
        if rescued and guard:
            if total - count < len(layers):
                raise IntaglioError(
                    f"keep is {keep:g}, which leaves {total - count} weights for {len(layers)} layers; at least one"
                    " weight a layer is needed"
                )
            for part in parts:
                part.view(-1)[part.argmax()] = torch.inf
            kept = keep_largest(parts, count)
    masks = {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
    for layer, mask in zip(layers, kept, strict=True):
        layer.put(masks[layer.tensor], mask)
    return masks, tuple(rescued if guard else ())


def unit_scores(scores: Tensors, units: Units, p: float = 2.0) -> Tensor:
    """The p-norm of |s| over everything that belongs to a unit, [U].

    Args:
        scores: s.
        units: what is ranked against each other.
        p: of the norm. Default 2.
    """
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


def unit_masks(scores: Tensors, found: Sequence[Units], keep: float, p: float = 2.0) -> dict[str, Tensor]:
    """Masks in which floor((1 - keep) U) units of each layer are zero, those of the least norm.

    Args:
        scores: s.
        found: the units of each layer.
        keep: share kept, above 0 and at most 1.
        p: of the norm. Default 2.
    """
    masks = {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
    for units in found:
        (kept_U,) = keep_largest([unit_scores(scores, units, p)], pruned_count(units.count, 1 - keep))
        # What belongs to no unit is -1: the last, always kept.
        kept = torch.cat([kept_U, kept_U.new_ones(1)])
        for member in units.members:
            mask = masks[member.tensor]
            shape = list(member.unit.shape) + [1] * (mask.dim() - member.unit.dim())
            mask &= kept[member.unit.to(mask.device).view(shape)]
    return masks


def overlap(first: Tensors, second: Tensors) -> float:
    """Intersection over union of what two sets of masks keep.

    Args:
        first: masks, True = kept.
        second: of the same layers.
    """
    both = sum(int((first[name] & second[name]).count_nonzero()) for name in first)
    either = sum(int((first[name] | second[name]).count_nonzero()) for name in first)
    return both / either if either else 1.0
