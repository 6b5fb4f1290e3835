"""Design that measures generated outputs: `Generate`.

Settings of an arm: `generator`, a function `(model, prompt, seed, **settings) -> outputs`, token ids of one or several
outputs. Test beds give `load()` and `source(part, index, base)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from intaglio.checkpoint import Checkpoint
from intaglio.evidence.designs.base import BedDesign, Settings
from intaglio.evidence.engine.claim import Arm, Cost, Metric, Result, RunKey
from intaglio.evidence.testbeds.cache import digest
from intaglio.evidence.testbeds.prompts import Prompts
from intaglio.measures.memory import peak_memory

DISTINCT = Metric("type-token ratio", "share", "higher", continuous=False)
Outputs = Sequence[Sequence[int]]
Score = Callable[[Sequence[int], Outputs], Mapping[str, float]]


def type_token_ratio(prompt: Sequence[int], outputs: Outputs) -> Mapping[str, float]:
    """Return the share of distinct tokens of the outputs, a mean over them."""
    return {DISTINCT.name: sum(len(set(ids)) / max(len(ids), 1) for ids in outputs) / len(outputs)}


@dataclass(frozen=True)
class Generate(BedDesign):
    """Generate outputs for the prompts of a unit; `score(prompt, outputs)` returns `{metric: value}`."""

    bed: Any = field(default_factory=Prompts)
    score: Score = type_token_ratio

    def run(self, arm: Arm, key: RunKey, settings: Settings) -> Result:
        """Generate and score the outputs of an arm on a unit."""
        own = {**settings, **arm.settings}
        model: Checkpoint = self.bed.load()
        make = own.pop("generator")
        prompts = [tuple(prompt.ids) for prompt in self.bed.source(key.split, key.index, key.base)]
        with peak_memory(model.device) as spent:
            outputs = [make(model, prompt, key.seed, **own) for prompt in prompts]
        scores = [self.score(prompt, of_prompt) for prompt, of_prompt in zip(prompts, outputs, strict=True)]
        values = {name: {str(n): score[name] for n, score in enumerate(scores)} for name in scores[0]}
        tokens = sum(len(ids) for of_prompt in outputs for ids in of_prompt)
        cost = Cost(tokens, seconds=spent.seconds, peak_bytes=spent.bytes)
        return Result(values, cost, {"prompts": digest(prompts)})
