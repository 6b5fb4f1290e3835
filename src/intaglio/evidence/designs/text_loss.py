"""Design that measures the loss of texts which are scored with a method: `TextLoss`.

Settings of an arm: `method`, whose `losses(model, ids_1T)` returns the loss of every token but the first, or `score`, a
function `(model, ids_1T, **settings)` that does; `passes`, the operations in forward passes. The test bed gives
`load()` and `documents(part, base)`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from intaglio.checkpoint import Checkpoint
from intaglio.evidence.designs.base import BedDesign, Configured, Settings, nonzero_parameters
from intaglio.evidence.engine.claim import Arm, Cost, Metric, Result, RunKey
from intaglio.evidence.testbeds.smollm2 import SmolLM2Wikipedia
from intaglio.evidence.testbeds.splits import check_count
from intaglio.measures.memory import peak_memory

NATS = Metric("nats per byte", "nats")


@dataclass(frozen=True)
class TextLoss(BedDesign):
    """Score the texts of a unit, `texts` documents that no other unit has.

    Args:
        bed: test bed.
        texts: documents of a unit. Default 2.
        fixed: values that tuned settings have instead, by name. Default: none; a miniature takes steps that show.
    """

    bed: Any = field(default_factory=SmolLM2Wikipedia)
    texts: int = 2
    fixed: tuple[tuple[str, float], ...] = ()
    MINIATURE: ClassVar = {"fixed": (("step_size", 0.3), ("learning_rate", 1e-3))}

    def run(self, arm: Arm, key: RunKey, settings: Settings) -> Result:
        """Score the texts of a unit with an arm."""
        own = Configured(arm, {name: dict(self.fixed).get(name, value) for name, value in settings.items()})
        method, score, passes = own.pop("method"), own.pop("score"), own.pop("passes")
        if method is not None:
            score = own.fill(method).losses
            own.check()
        arguments = {} if method is not None else own.arguments(score)
        checkpoint: Checkpoint = self.bed.load()
        windows = self.bed.documents(key.split, key.base)
        first = key.index * self.texts
        check_count(f"{key.split} texts", first + self.texts, windows.segments.n)
        ids_NT = windows.segments.ids_NT[first : first + self.texts].to(checkpoint.device)
        with peak_memory(checkpoint.device) as spent:
            losses = [float(score(checkpoint.model, ids_T[None], **arguments).sum()) for ids_T in ids_NT]
        sizes = [len(checkpoint.tokenizer.decode(ids_T[1:]).encode()) for ids_T in ids_NT]
        names = windows.names[first : first + self.texts]
        values = {name: loss / size for name, loss, size in zip(names, losses, sizes, strict=True)}
        parameters, tokens = nonzero_parameters(checkpoint), ids_NT.numel()
        cost = Cost(tokens, 2.0 * passes * parameters * tokens, parameters, spent.seconds, spent.bytes)
        return Result({NATS.name: values}, cost, {"texts": windows.segments.digest})
