"""TEAL's allocation: how sparse each projection of a block is, so that the block's output changes least.

Within a block all begin dense. In each step the sparsity of one projection is raised by as much as saves the same share
of the block's weights, whichever it is, and the one is taken for which the block's output is then nearest to the dense
one; until the block has the sparsity that was asked for. As errors grow with sparsity, one that was measured some steps
ago is measured anew only when it is the least.

Source: Liu et al., Training-Free Activation Sparsity in Large Language Models, ICLR 2025, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.data.segments import Segments
from intaglio.methods.activations.r_sparse.linear import Rule, SparseLinear
from intaglio.methods.base import Progress, no_progress
from intaglio.modeling.anatomy import BlockInputs, anatomy, capture, run_block

SEGMENTS = 4
"""Calibration segments that errors are taken on."""
STEP = 0.01
"""The share of a block's weights that a step saves."""
GRID = 100
"""Steps of a projection's own sparsity, from 0 to 1."""
PASSES = 120
"""Passes over each block that 50 % take, about."""

Places = Mapping[str, int]
"""How sparse each projection of a block is, in steps of the grid."""


@torch.no_grad()
def allocate(
    checkpoint: Checkpoint,
    layers: Mapping[str, SparseLinear],
    limits: Mapping[str, list[float]],
    data: Segments,
    sparsity: float,
    progress: Progress = no_progress,
) -> dict[str, float]:
    """Set the rules of layers that are in place, and return the sparsity of each.

    Args:
        checkpoint: with the layers in place.
        layers: by the full names of their projections.
        limits: of each, the threshold for each place on the grid of its sparsity, `GRID` + 1 of them.
        data: calibration segments, which pass together.
        sparsity: of the weights of each block.
        progress: called after each block.
    """
    parts = anatomy(checkpoint.model)
    found: dict[str, float] = {}

    def set_rules(places: Places) -> None:
        for name, place in places.items():
            layers[name].rule = Rule(limits[name][place], None, False)

    set_rules(dict.fromkeys(layers, 0))
    (batch,) = data.batches(data.n)
    inputs = capture(parts, batch)
    for index, block in enumerate(parts.blocks):
        sizes = {name: layer.weight.numel() for name, layer in layers.items() if name.startswith(f"layers.{index}.")}
        dense_BLD = run_block(block, index, inputs.hidden_BLD, inputs)
        places = allot(sizes, sparsity, partial(_error, block, index, inputs, dense_BLD, set_rules))
        set_rules(places)
        found |= {name: place / GRID for name, place in places.items()}
        inputs.hidden_BLD = dense_BLD
        progress(index + 1, len(parts.blocks), "r_sparse: allocating")
    return found


def _error(
    block: nn.Module,
    index: int,
    inputs: BlockInputs,
    dense_BLD: Tensor,
    set_rules: Callable[[Places], None],
    places: Places,
) -> float:
    """How far the block's output is from the dense one."""
    set_rules(places)
    return float((run_block(block, index, inputs.hidden_BLD, inputs) - dense_BLD).float().square().sum())


def allot(sizes: Mapping[str, int], sparsity: float, error: Callable[[Places], float]) -> dict[str, int]:
    """Where on the grid each projection of a block ends.

    Args:
        sizes: weights of each.
        sparsity: of all together; at least that is reached, where projections can still give.
        error: of the block, for places.
    """
    whole, places = sum(sizes.values()), dict.fromkeys(sizes, 0)
    known, fresh = dict.fromkeys(sizes, -math.inf), set[str]()  # errors one step on, and which are of these places
    while True:
        left = sparsity * whole * GRID - sum(places[name] * size for name, size in sizes.items())
        free = [name for name in sizes if places[name] < GRID - 1]
        if left <= 1e-6 * whole or not free:
            return places
        name = min(free, key=known.__getitem__)
        step = max(1, math.ceil(min(STEP * whole * GRID, left) / sizes[name] - 1e-9))
        further = {**places, name: min(GRID - 1, places[name] + step)}
        if name in fresh:
            places, known[name] = further, -math.inf
            fresh.clear()
        else:
            known[name] = error(further)
            fresh.add(name)


__all__ = ["GRID", "PASSES", "SEGMENTS", "STEP", "allocate", "allot"]
