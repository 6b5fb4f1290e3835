"""Design that gives a small model another one's tokenizer and measures it: `Transplant`.

Settings of an arm: `transplant`, an `OMPTransplant` (without it the base keeps its own tokenizer); everything else is a
field of it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

from intaglio.evidence.designs.base import BedDesign, Configured, Settings
from intaglio.evidence.engine.claim import Arm, Cost, Metric, Result, RunKey
from intaglio.evidence.testbeds.cached_models import copied
from intaglio.evidence.testbeds.two_tokenizers import TwoTokenizers, Which, nats_per_byte
from intaglio.measures.memory import peak_memory
from intaglio.methods.weights.omp_transplant import Donor
from intaglio.trainer import train

NATS = Metric("nats a byte", "nats a byte")
TUNED_NATS = Metric("nats a byte after 50 steps", "nats a byte")


@dataclass(frozen=True)
class Transplant(BedDesign):
    """Swap the tokenizer of a copy of the base, measure, fine-tune, measure again; a unit is a training seed."""

    bed: TwoTokenizers = field(default_factory=TwoTokenizers)
    steps: int = 50
    MINIATURE: ClassVar = {"steps": 3}

    def run(self, arm: Arm, key: RunKey, settings: Settings) -> Result:
        """Transplant with the models of a unit and measure each document."""
        own, seed = Configured(arm, settings), key.seed
        method = own.pop("transplant")
        method = method and own.fill(method)
        own.check()
        which: Which = "base" if method is None else "donor"
        documents = self.bed.documents(key.split, key.base)
        checkpoint, donor = copied(self.bed.trained("base", seed)), self.bed.trained("donor", seed)
        with peak_memory(checkpoint.device) as spent, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # 64 atoms are too many: an arm shows it
            if method is not None:
                method.transplant(checkpoint, Donor.from_checkpoint(donor), seed=seed)
        values: dict[str, Any] = {NATS.name: nats_per_byte(checkpoint, documents)}
        windows = self.bed.training(which, seed + 2**32, self.steps)  # those that neither model was pretrained on
        if key.stage != "tune":
            train(checkpoint, windows, **self.bed.recipe(seed + 2**32, self.steps))
            checkpoint.model.eval()
            values[TUNED_NATS.name] = nats_per_byte(checkpoint, documents)
        parameters = sum(p.numel() for p in checkpoint.model.parameters())
        cost = Cost(windows.tokens, 0.0, parameters, spent.seconds, spent.bytes)
        return Result(values, cost, {"documents": "".join(documents), "models": str(seed)})
