"""Base of the one-shot pruning methods: blockwise calibration, writing the weights, the record.

Dimension letters: R rows (outputs), I inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from intaglio.checkpoint import DTYPES, Checkpoint
from intaglio.checkpoint.calibration import InputStatistics, SharedInputGroup, as_segments, calibrate_blocks
from intaglio.data.segments import Segments
from intaglio.errors import IntaglioError
from intaglio.methods.base import Capability, Cost, Method, ModelAspect, Progress, Workload, no_progress
from intaglio.methods.weights.sparsity_target import SparsityTarget
from intaglio.modeling.anatomy import Linear, anatomy

SAMPLES = 128
LENGTH = 512

PruneFn = Callable[[Linear, InputStatistics], Tensor]
"""`rule(linear, input statistics) -> new weight [R, I]`."""


def shapes(checkpoint: Checkpoint) -> list[tuple[str, int, int]]:
    """Return `(name, rows, columns)` of every linear that pruning edits."""
    linears = [(name, *linear.shape) for name, linear in anatomy(checkpoint.model).all_linears(experts=True)]
    if not linears:
        raise IntaglioError("the model has no plain projections to prune: another step replaced them")
    return linears


def masked(linear: Linear, mask_RI: Tensor) -> Tensor:
    """Return the linear's weight with zeros where the mask is True and the other values unchanged."""
    return linear.read().masked_fill(mask_RI, 0)


class OneShotPruner(ABC):
    """Base of pruning methods: `apply` replaces each linear's weight, block by block, by the result of `rule`.

    Each expert of a mixture counts as a linear, with statistics of the tokens routed to it; routers stay as they are.

    A mixin beside `Amount` and `Method`. A subclass implements `rule` and sets `moments` or `hessian` where the rule
    needs more input statistics than norms, or `needs_calibration = False` where it needs no data.
    """

    storage: ClassVar[Literal["standalone"]] = "standalone"
    needs_calibration: ClassVar[bool] = True
    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"weights"})
    requires: ClassVar[frozenset[Capability]] = frozenset({"linear_weights"})
    edits_experts: ClassVar[bool] = True
    moments: ClassVar[bool] = False

    @property
    def hessian(self) -> bool:
        """Whether the rule needs the Hessian of a linear's input."""
        return False

    @abstractmethod
    def rule(self, linears: Sequence[tuple[str, int, int]]) -> tuple[PruneFn, dict[str, Any]]:
        """Return the rule for a model with these linears `(name, rows, columns)`, and its dict for the record."""

    def apply(
        self,
        checkpoint: Checkpoint,
        calibration: Any = None,
        *,
        seed: int = 0,
        batch_size: int = 4,
        progress: Progress = no_progress,
    ) -> Checkpoint:
        """Prune `checkpoint` in place and return it."""
        method, amount = cast(Method, self), cast(SparsityTarget, self)
        amount.check(shapes(checkpoint))
        linears = amount.taken(shapes(checkpoint))
        names = {name for name, _, _ in linears}
        refuse_packed(checkpoint)
        rule, chosen = self.rule(linears)
        parts = anatomy(checkpoint.model)

        def wanted(index: int) -> list[Linear]:
            return [x for x in parts.linears(index, experts=True) if f"layers.{index}.{x.name}" in names]

        def statistic(features: int, device: torch.device) -> InputStatistics:
            return InputStatistics(features, device, moments=self.moments, hessian=self.hessian)

        def prune_group(index: int, group: SharedInputGroup) -> None:
            for linear in group.linears:
                linear.write(rule(linear, group.statistic))

        identity = None
        if self.needs_calibration:
            data = as_segments(checkpoint, calibration, SAMPLES, LENGTH, seed)
            identity = describe(data, batch_size)
            calibrate_blocks(
                checkpoint,
                data,
                statistic=statistic,
                carve=prune_group,
                linears=wanted,
                batch_size=batch_size,
                what=method.slug,
                progress=progress,
            )
        else:
            for index in range(len(parts.blocks)):
                for linear in wanted(index):
                    prune_group(index, SharedInputGroup([linear], statistic(linear.shape[1], checkpoint.device)))
                progress(index + 1, len(parts.blocks), f"{method.slug}: block {index + 1}/{len(parts.blocks)}")
        checkpoint.record_step(method.slug, method.model_dump(), seed=seed, calibration=identity, chosen=chosen)
        return checkpoint


def describe(data: Segments, batch_size: int) -> dict[str, Any]:
    """Return the identity of calibration data for the record."""
    return {"digest": data.digest, "samples": data.n, "length": data.length, "batch_size": batch_size}


def walk_cost(workload: Workload, *, hessian: bool = False) -> Cost:
    """Return the cost of the two passes and the statistics, as if every token reached every expert."""
    flops = 4.0 * workload.block_parameters * workload.tokens
    widest = max(columns for _, columns in workload.linears)
    extra = workload.tokens * workload.hidden * workload.element_size
    extra += workload.batch_tokens * widest * workload.element_size * 6
    if hessian:
        # Linears with a shared input share a product: about half of the columns.
        flops += sum(2.0 * workload.tokens * columns**2 for _, columns in workload.linears) / 2
        # Dense blocks have at most four inputs; each expert has its own.
        extra += 4 * max(4 * widest**2, sum(columns**2 for _, columns in workload.linears) // workload.blocks)
    return Cost(flops=flops, sorted_elements=float(sum(r * c for r, c in workload.linears)), extra_bytes=int(extra))


def refuse_packed(checkpoint: Checkpoint) -> None:
    """Refuse packed or quantized weights, which have no meaning without their scales."""
    for name, linear in anatomy(checkpoint.model).all_linears(experts=True):
        dtype = linear.weight.dtype
        if dtype not in DTYPES.values():
            raise IntaglioError(
                f"{name} stores its weight as {str(dtype).removeprefix('torch.')}; pruning needs {', '.join(DTYPES)}: "
                "carve the checkpoint that was quantized"
            )
