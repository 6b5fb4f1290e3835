"""What every pruning step does around its own rule: the walk over the blocks, the write, the record.

Dimension letters: R rows (outputs), I inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from intaglio.anatomy import Linear, anatomy
from intaglio.calibrate import Group, InputStatistics, as_segments, walk
from intaglio.checkpoint import Checkpoint
from intaglio.data.segments import Segments
from intaglio.errors import IntaglioError
from intaglio.method import Cost, Method, Progress, Workload

SAMPLES = 128
LENGTH = 512

Rule = Callable[[int, Linear, InputStatistics], Tensor]
"""`rule(block index, linear, statistics of its input) -> its new weight [R, I]`."""


def shapes(checkpoint: Checkpoint) -> list[tuple[str, int, int]]:
    """`(name, rows, columns)` of every linear that pruning edits.

    Args:
        checkpoint: its model is taken apart.
    """
    return [(name, *linear.shape) for name, linear in anatomy(checkpoint.model).all_linears()]


def masked(linear: Linear, mask_RI: Tensor) -> Tensor:
    """The linear's weight with zeros where the mask is True and the very same values elsewhere.

    Args:
        linear: whose weight is read.
        mask_RI: True = pruned.
    """
    return linear.read().masked_fill(mask_RI, 0)


def calibrated(
    method: Method,
    checkpoint: Checkpoint,
    calibration: Any,
    rule: Rule,
    *,
    moments: bool = False,
    hessian: bool = False,
    seed: int,
    batch_size: int,
    progress: Progress,
    chosen: dict[str, Any] | None = None,
) -> Checkpoint:
    """Walk over the blocks, replace each linear by what `rule` makes of it, and record the step.

    Args:
        method: for its name and parameters.
        checkpoint: edited in place.
        calibration: what `calibrate.as_segments` takes.
        rule: makes a linear's new weight.
        moments: whether the rule needs means and variances.
        hessian: whether the rule needs the Hessian.
        seed: chooses the calibration documents, where text is given.
        batch_size: sequences that pass at a time.
        progress: called as the walk goes on.
        chosen: what the rule notes for the record while it runs.
    """
    data = as_segments(checkpoint, calibration, SAMPLES, LENGTH, seed)

    def carve(index: int, group: Group) -> None:
        for linear in group.linears:
            linear.write(rule(index, linear, group.statistic))

    def statistic(features: int, device: torch.device) -> InputStatistics:
        return InputStatistics(features, device, moments=moments, hessian=hessian)

    walk(
        checkpoint,
        data,
        statistic=statistic,
        carve=carve,
        batch_size=batch_size,
        what=method.slug,
        progress=progress,
    )
    checkpoint.note(
        method.slug,
        method.model_dump(),
        seed=seed,
        calibration=describe(data, batch_size),
        chosen=chosen,
    )
    return checkpoint


def describe(data: Segments, batch_size: int) -> dict[str, Any]:
    """What identifies calibration data in the record.

    Args:
        data: the segments.
        batch_size: sequences that passed at a time.
    """
    return {"digest": data.digest, "samples": data.n, "length": data.length, "batch_size": batch_size}


def walk_cost(workload: Workload, *, hessian: bool = False) -> Cost:
    """What the two passes and the statistics take.

    Args:
        workload: sizes of the model and the calibration data.
        hessian: whether input products are accumulated.
    """
    flops = 4.0 * workload.block_parameters * workload.tokens
    widest = max(columns for _, columns in workload.linears)
    extra = workload.tokens * workload.hidden * workload.element_size
    extra += workload.batch_tokens * widest * workload.element_size * 6
    if hessian:
        # One product serves the linears that share an input; by columns that is about half of them.
        flops += sum(2.0 * workload.tokens * columns**2 for _, columns in workload.linears) / 2
        extra += 4 * 4 * widest**2
    return Cost(flops=flops, sorted_elements=float(sum(r * c for r, c in workload.linears)), extra_bytes=int(extra))


def refuse_integers(linear: Linear) -> None:
    """Refuse a weight that is not a floating-point matrix (packed or quantized storage).

    Args:
        linear: whose weight is looked at.

    Raises:
        IntaglioError: names the dtype.
    """
    dtype = linear.read().dtype
    if not dtype.is_floating_point:
        raise IntaglioError(f"{linear.name} stores its weight as {dtype}; pruning needs floating-point weights")
