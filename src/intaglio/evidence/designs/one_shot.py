"""Design that edits a trained model with calibration data and measures it: `OneShot`.

Settings of an arm: `method` (without it the model stays as it is); everything else is a field of the method. The test
bed gives `load()`, `calibration(seed, part)` and `documents(part, base)`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from intaglio.checkpoint import Checkpoint
from intaglio.evidence.designs.base import BedDesign, Configured, Measure, Measured, Settings, nonzero_parameters
from intaglio.evidence.designs.measures import BATCH, log_perplexity
from intaglio.evidence.engine.claim import Arm, Cost, Result, RunKey
from intaglio.evidence.testbeds.cached_models import copied
from intaglio.evidence.testbeds.smollm2 import SmolLM2Wikipedia
from intaglio.evidence.testbeds.splits import Windows
from intaglio.measures.memory import peak_memory
from intaglio.methods.base import Workload
from intaglio.modeling.anatomy import anatomy


@dataclass(frozen=True)
class OneShot(BedDesign):
    """Apply a method to a copy of the test bed's model; a unit is a calibration draw."""

    bed: Any = field(default_factory=SmolLM2Wikipedia)
    measures: tuple[Measure, ...] = (log_perplexity,)

    def run(self, arm: Arm, key: RunKey, settings: Settings) -> Result:
        """Edit a copy of the model on a unit's calibration draw and measure it."""
        own = Configured(arm, settings)
        method = own.pop("method")
        method = method and own.fill(method)
        own.check()
        original = self.bed.load()
        calibration = self.bed.calibration(key.seed, key.split)
        edited = copied(original)
        flops = 0.0
        with peak_memory(original.device) as spent:
            if method is not None:
                method.apply(edited, calibration.segments, seed=key.seed, batch_size=BATCH)
                flops = method.estimate(_workload(original, calibration)).flops
        measured = Measured(edited, self.bed, key, arm.settings, original)
        values = {name: value for measure in self.measures for name, value in measure(measured).items()}
        tokens = calibration.segments.tokens
        cost = Cost(tokens, flops, nonzero_parameters(edited), spent.seconds, spent.bytes)
        parity = {"calibration": calibration.segments.digest, "documents": measured.documents.segments.digest}
        return Result(values, cost, parity)


def _workload(original: Checkpoint, calibration: Windows) -> Workload:
    """Sizes that methods estimate their own cost from."""
    parts = anatomy(original.model)
    return Workload(
        linears=tuple(linear.shape for _, linear in parts.all_linears()),
        block_parameters=sum(p.numel() for block in parts.blocks for p in block.parameters()),
        parameters=sum(p.numel() for p in original.model.parameters()),
        hidden=int(parts.config.hidden_size),
        tokens=calibration.segments.tokens,
        batch_tokens=BATCH * calibration.segments.length,
        element_size=next(original.model.parameters()).element_size(),
    )
