"""What the claims of carvings share: a method on a copy of the world's dense model, by a draw, and what that cost."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, cast

from intaglio.checkpoint import Checkpoint
from intaglio.evidence.experiment import Cost, Outcome, Stage, Unit
from intaglio.evidence.worlds.sealing import Windows
from intaglio.measures.memory import peak_memory
from intaglio.methods.base import Carving, Method, Workload
from intaglio.modeling.anatomy import anatomy

BATCH = 8
"""Rows that pass at a time, in carving and in measuring."""


class World(Protocol):
    """What these experiments ask of a world; it can be hashed, and compares by its fields."""

    def load(self) -> Checkpoint:
        """The dense model, shared: not to be changed."""

    def calibration(self, seed: int) -> Windows:
        """The calibration data of a draw."""

    def documents(self, stage: Stage, base: int = 0) -> Windows:
        """The documents that a stage is measured on."""


@dataclass(frozen=True)
class Carved:
    """A copy of the dense model that a method has carved.

    Args:
        dense: the model as it was, shared.
        checkpoint: the copy.
        documents: what it is to be measured on.
        calibration: what it was carved with.
        cost: of carving it.
    """

    dense: Checkpoint
    checkpoint: Checkpoint
    documents: Windows
    calibration: Windows
    cost: Cost

    def outcome(self, values: Mapping[str, Mapping[str, float | None]]) -> Outcome:
        """What the run gave.

        Args:
            values: of each metric, `{document: value}`.
        """
        return Outcome(
            values={metric: dict(by_document) for metric, by_document in values.items()},
            cost=self.cost,
            shared={"calibration": self.calibration.segments.digest, "documents": self.documents.segments.digest},
        )


def carved(world: World, method: Method | None, unit: Unit, seed: int) -> Carved:
    """Carve a copy of the dense model.

    Args:
        world: gives model, calibration data and documents.
        method: what carves; None: the copy stays as it is.
        unit: of which run.
        seed: of the calibration draw, and of the method.
    """
    dense = world.load()
    documents, calibration = world.documents(unit.stage, unit.base), world.calibration(seed)
    copied = Checkpoint(copy.deepcopy(dense.model), dense.tokenizer, dense.source)
    with peak_memory(dense.device) as peak:
        begun = time.perf_counter()
        if method is not None:
            cast(Carving, method).apply(copied, calibration.segments, seed=seed, batch_size=BATCH)
        seconds = time.perf_counter() - begun
    cost = Cost(
        tokens=calibration.segments.tokens,
        flops=0.0 if method is None else cast(Carving, method).estimate(_workload(dense, calibration)).flops,
        parameters=sum(int(p.count_nonzero()) for p in copied.model.parameters()),
        seconds=seconds,
        peak_bytes=peak.bytes,
    )
    return Carved(dense, copied, documents, calibration, cost)


def _workload(dense: Checkpoint, calibration: Windows) -> Workload:
    """What the methods' own estimates are made from."""
    parts = anatomy(dense.model)
    return Workload(
        linears=tuple(linear.shape for _, linear in parts.all_linears()),
        block_parameters=sum(p.numel() for block in parts.blocks for p in block.parameters()),
        parameters=sum(p.numel() for p in dense.model.parameters()),
        hidden=int(parts.config.hidden_size),
        tokens=calibration.segments.tokens,
        batch_tokens=BATCH * calibration.segments.length,
        element_size=next(dense.model.parameters()).element_size(),
    )
