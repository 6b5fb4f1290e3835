"""Design that measures generated outputs: `Generate`.

Settings of an arm: `generator`, a function `(model, prompt, seed, **settings) -> outputs`, token ids of one or several
outputs. Test beds give `load()` and `source(part, index, base)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from intaglio.checkpoint import Checkpoint
from intaglio.evidence.designs.base import BedDesign, Configured, Settings
from intaglio.evidence.engine.claim import Arm, Cost, Metric, Result, RunKey
from intaglio.evidence.testbeds.cache import digest
from intaglio.evidence.testbeds.prompts import Prompts
from intaglio.measures import generated_text
from intaglio.measures.memory import peak_memory

DISTINCT = Metric("type-token ratio", "share", "higher", continuous=False)
Outputs = Sequence[Sequence[int]]
Score = Callable[[Sequence[int], Outputs], Mapping[str, float]]
TOP_1 = Metric("log-probability of the first output", "nats", "higher")


def type_token_ratio(prompt: Sequence[int], outputs: Outputs) -> Mapping[str, float]:
    """Return the share of distinct tokens of the outputs, a mean over them."""
    return {DISTINCT.name: fmean(generated_text.type_token_ratio(ids, None) for ids in outputs)}


@dataclass(frozen=True)
class Generate(BedDesign):
    """Generate outputs for the prompts of a unit; `score(prompt, outputs)` returns `{metric: value}`.

    With `likelihood` the first output's log-probability is measured too.
    """

    bed: Any = field(default_factory=Prompts)
    score: Score = type_token_ratio
    likelihood: bool = False

    def run(self, arm: Arm, key: RunKey, settings: Settings) -> Result:
        """Generate and score the outputs of an arm on a unit."""
        own = Configured(arm, settings)
        model: Checkpoint = self.bed.load()
        make = own.pop("generator")
        prompts = [tuple(prompt.ids) for prompt in self.bed.source(key.split, key.index, key.base)]
        with peak_memory(model.device) as spent:
            outputs = [make(model, prompt, key.seed, **own.arguments(make)) for prompt in prompts]
        scores = [dict(self.score(prompt, of_prompt)) for prompt, of_prompt in zip(prompts, outputs, strict=True)]
        if self.likelihood:
            for score, prompt, (first, *_) in zip(scores, prompts, outputs, strict=True):
                score[TOP_1.name] = generated_text.log_prob(model, prompt, first)
        values = {name: {str(n): score[name] for n, score in enumerate(scores)} for name in scores[0]}
        tokens = sum(len(ids) for of_prompt in outputs for ids in of_prompt)
        cost = Cost(tokens, seconds=spent.seconds, peak_bytes=spent.bytes)
        return Result(values, cost, {"prompts": digest(prompts)})
