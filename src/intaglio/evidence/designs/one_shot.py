"""Design that edits a trained model with calibration data and measures it: `OneShot`.

Settings of an arm: `method`, a carving (without it the model stays as it is); everything else is a field of the method.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from intaglio.checkpoint import Checkpoint
from intaglio.evidence.designs.base import Configured, Measure, Measured, Settings, copied, nonzero_parameters, usage
from intaglio.evidence.designs.measures import BATCH, log_perplexity
from intaglio.evidence.engine.claim import Arm, Cost, Result, RunKey
from intaglio.evidence.testbeds.smollm2 import SmolLM2Wikipedia
from intaglio.evidence.testbeds.splits import Windows
from intaglio.methods.base import Workload
from intaglio.modeling.anatomy import anatomy


@dataclass(frozen=True)
class OneShot:
    """Apply a method to a copy of the test bed's model; a unit is a calibration draw.

    Args:
        bed: gives `load()`, `calibration(seed, part)` and `documents(part, base)`. Default SmolLM2 with Wikipedia.
        measures: functions of the edited model. Default: log-perplexity of each document.
    """

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
        with usage(original.device) as spent:
            if method is not None:
                method.apply(edited, calibration.segments, seed=key.seed, batch_size=BATCH)
                flops = method.estimate(_workload(original, calibration)).flops
        measured = Measured(edited, self.bed, key, arm.settings, original)
        values = {name: value for measure in self.measures for name, value in measure(measured).items()}
        tokens = calibration.segments.tokens
        cost = Cost(tokens, flops, nonzero_parameters(edited), spent.seconds, spent.peak_bytes)
        parity = {"calibration": calibration.segments.digest, "documents": measured.documents.segments.digest}
        return Result(values, cost, parity)

    def toy(self, **changes: Any) -> OneShot:
        """Return the design on a small model of bytes; `changes` are fields of its test bed."""
        return dataclasses.replace(self, bed=self.bed.toy(**changes))


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
