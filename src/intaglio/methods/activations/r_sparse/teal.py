"""TEAL's allocation: the sparsity of each projection of a block with which the block's output changes least.

Within a block all begin dense. Each step raises the sparsity of one projection by as much as saves the same share of
the block's weights: of the projection for which the block's output is then nearest to the dense one; until the block
has the requested sparsity. As errors grow with sparsity, an error that was measured some steps ago is measured again
only when it is the smallest.

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
from intaglio.methods.activations.r_sparse.layers import InputRule, SparseLinear
from intaglio.methods.base import Progress, no_progress
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.partial_pass import BlockInputs, capture, run_block

SEGMENTS = 4
"""Calibration segments that errors are measured on."""
STEP = 0.01
"""Share of a block's weights that a step saves."""
GRID = 100
"""Steps of a projection's own sparsity, from 0 to 1."""
PASSES = 120
"""About how many passes over each block 50 % take."""

Steps = Mapping[str, int]
"""Sparsity of each projection of a block, in steps of the grid."""


@torch.no_grad()
def allocate(
    checkpoint: Checkpoint,
    layers: Mapping[str, SparseLinear],
    limits: Mapping[str, list[float]],
    data: Segments,
    sparsity: float,
    progress: Progress = no_progress,
) -> dict[str, float]:
    """Set the rules of layers that are in a model, and return the sparsity of each by its full name.

    Args:
        checkpoint: with the layers.
        layers: by the full names of their projections.
        limits: the thresholds of each for the `GRID` + 1 steps of its sparsity.
        data: calibration segments, which pass together.
        sparsity: of the weights of each block.
        progress: called after each block.
    """
    parts = anatomy(checkpoint.model)
    sparsities: dict[str, float] = {}

    def set_rules(steps: Steps) -> None:
        for name, step in steps.items():
            layers[name].rule = InputRule(limits[name][step], None, False)

    set_rules(dict.fromkeys(layers, 0))
    (batch,) = data.batches(data.n)
    inputs = capture(parts, batch)
    for index, block in enumerate(parts.blocks):
        sizes = {name: layer.weight.numel() for name, layer in layers.items() if name.startswith(f"layers.{index}.")}
        dense_BLD = run_block(block, index, inputs.hidden_BLD, inputs)
        steps = allocate_block(sizes, sparsity, partial(_error, block, index, inputs, dense_BLD, set_rules))
        set_rules(steps)
        sparsities |= {name: step / GRID for name, step in steps.items()}
        inputs.hidden_BLD = dense_BLD
        progress(index + 1, len(parts.blocks), "r_sparse: allocating")
    return sparsities


def _error(
    block: nn.Module,
    index: int,
    inputs: BlockInputs,
    dense_BLD: Tensor,
    set_rules: Callable[[Steps], None],
    steps: Steps,
) -> float:
    """Return the squared distance of the block's output from the dense one."""
    set_rules(steps)
    return float((run_block(block, index, inputs.hidden_BLD, inputs) - dense_BLD).float().square().sum())


def allocate_block(sizes: Mapping[str, int], sparsity: float, error: Callable[[Steps], float]) -> dict[str, int]:
    """Return the steps of each projection of a block with which all reach a sparsity together.

    `sizes` are the weights of each, and `error` gives the error of the block's output.
    """
    whole, steps = sum(sizes.values()), dict.fromkeys(sizes, 0)
    # Errors one step further, and which of them were measured from the current steps.
    errors, current = dict.fromkeys(sizes, -math.inf), set[str]()
    while True:
        left = sparsity * whole * GRID - sum(steps[name] * size for name, size in sizes.items())
        free = [name for name in sizes if steps[name] < GRID - 1]
        if left <= 1e-6 * whole or not free:
            return steps
        name = min(free, key=errors.__getitem__)
        step = max(1, math.ceil(min(STEP * whole * GRID, left) / sizes[name] - 1e-9))
        further = {**steps, name: min(GRID - 1, steps[name] + step)}
        if name in current:
            steps, errors[name] = further, -math.inf
            current.clear()
        else:
            errors[name] = error(further)
            current.add(name)
