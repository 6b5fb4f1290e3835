"""What every pruning step does around its own rule: the walk over the blocks, the write, the record.

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
"""`rule(linear, statistics of its input) -> its new weight [R, I]`."""


def shapes(checkpoint: Checkpoint) -> list[tuple[str, int, int]]:
    """`(name, rows, columns)` of every linear that pruning edits.

    Args:
        checkpoint: its model is taken apart.

    Raises:
        IntaglioError: it has none, since a method put others in their place.
    """
    found = [(name, *linear.shape) for name, linear in anatomy(checkpoint.model).all_linears()]
    if not found:
        raise IntaglioError("the model has no plain projections that could be pruned: a method replaced them")
    return found


def masked(linear: Linear, mask_RI: Tensor) -> Tensor:
    """The linear's weight with zeros where the mask is True and the very same values elsewhere.

    Args:
        linear: whose weight is read.
        mask_RI: True = pruned.
    """
    return linear.read().masked_fill(mask_RI, 0)


class OneShotPruner(ABC):
    """What pruning methods share: `apply` walks over the blocks and replaces each linear's weight by what `rule` gives.

    A mixin beside `Amount` and `Method`. What it asks of the class: `rule`, and `moments` or `hessian` where the rule
    needs more of a linear's input than its norms. A class whose rule looks at no data says `needs_calibration = False`.
    """

    storage: ClassVar[Literal["standalone"]] = "standalone"
    needs_calibration: ClassVar[bool] = True
    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"weights"})
    requires: ClassVar[frozenset[Capability]] = frozenset({"linear_weights"})
    moments: ClassVar[bool] = False

    @property
    def hessian(self) -> bool:
        """Whether the rule needs the Hessian of a linear's input."""
        return False

    @abstractmethod
    def rule(self, linears: Sequence[tuple[str, int, int]]) -> tuple[PruneFn, dict[str, Any]]:
        """The rule for a model with these linears `(name, rows, columns)`, and what it notes for the record."""

    def apply(
        self,
        checkpoint: Checkpoint,
        calibration: Any = None,
        *,
        seed: int = 0,
        batch_size: int = 4,
        progress: Progress = no_progress,
    ) -> Checkpoint:
        """Prune `checkpoint` in place and return it.

        Args:
            checkpoint: what to prune.
            calibration: segments, token ids [N, L], texts, a bundled name, a file or a folder; not looked at by a
                method that needs none.
            seed: chooses the calibration documents, where text is given. Default 0.
            batch_size: sequences that pass at a time. Default 4.
            progress: called after each batch, or after each block where no data is needed.

        Raises:
            IntaglioError: the pattern does not fit a width, `ignore` names no layer, no calibration data, or statistics
                that are not finite.
        """
        method, amount = cast(Method, self), cast(SparsityTarget, self)
        amount.check(shapes(checkpoint))
        linears = amount.taken(shapes(checkpoint))
        names = {name for name, _, _ in linears}
        refuse_packed(checkpoint)
        rule, chosen = self.rule(linears)

        def statistic(features: int, device: torch.device) -> InputStatistics:
            return InputStatistics(features, device, moments=self.moments, hessian=self.hessian)

        def carve(index: int, group: SharedInputGroup) -> None:
            for linear in group.linears:
                if f"layers.{index}.{linear.name}" in names:
                    linear.write(rule(linear, group.statistic))

        identity = None
        if self.needs_calibration:
            data = as_segments(checkpoint, calibration, SAMPLES, LENGTH, seed)
            identity = describe(data, batch_size)
            calibrate_blocks(
                checkpoint,
                data,
                statistic=statistic,
                carve=carve,
                batch_size=batch_size,
                what=method.slug,
                progress=progress,
            )
        else:
            parts = anatomy(checkpoint.model)
            for index in range(len(parts.blocks)):
                for linear in parts.linears(index):
                    carve(index, SharedInputGroup([linear], statistic(linear.shape[1], checkpoint.device)))
                progress(index + 1, len(parts.blocks), f"{method.slug}: block {index + 1}/{len(parts.blocks)}")
        checkpoint.record_step(method.slug, method.model_dump(), seed=seed, calibration=identity, chosen=chosen)
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


def refuse_packed(checkpoint: Checkpoint) -> None:
    """Refuse weights that are no plain numbers: packed or quantized ones mean something only with their scales.

    Args:
        checkpoint: whose linears are looked at.

    Raises:
        IntaglioError: names the first such linear and its dtype.
    """
    for name, linear in anatomy(checkpoint.model).all_linears():
        dtype = linear.module.weight.dtype
        if dtype not in DTYPES.values():
            raise IntaglioError(
                f"{name} stores its weight as {str(dtype).removeprefix('torch.')}; pruning needs {', '.join(DTYPES)}: "
                "carve the checkpoint that was quantized"
            )
