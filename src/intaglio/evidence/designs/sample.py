"""Design that measures samplers of constrained distributions against the exact posterior: `Sample`.

Settings of an arm: `method`, an `AWRS`, or `exact` for draws from the posterior itself; fields of the method.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from intaglio.evidence.designs.base import BedDesign, Configured, Settings
from intaglio.evidence.engine.claim import Arm, Cost, Metric, Result, RunKey
from intaglio.evidence.testbeds.cache import digest
from intaglio.evidence.testbeds.random_language_models import RandomLanguageModels, TableModel, Unit
from intaglio.measures.memory import peak_memory
from intaglio.methods.decoding.awrs import AWRS

TOTAL_VARIATION = Metric("total variation to the posterior", "share")
CHECKS = Metric("checks a token", "checks", continuous=False)
Weighted = Mapping[tuple[int, ...], float]


def total_variation(weights: Weighted, posterior: Weighted) -> float:
    """Return half the sum of absolute differences; 1 for a run without an output."""
    if not weights:
        return 1.0
    return sum(abs(weights.get(key, 0.0) - posterior.get(key, 0.0)) for key in {*weights, *posterior}) / 2


@dataclass(frozen=True)
class Sample(BedDesign):
    """Draw `outputs` weighted outputs `repeats` times from a random constrained model.

    The total variation between the weighted outputs and the exact posterior is averaged over the repeats.
    """

    bed: RandomLanguageModels = field(default_factory=RandomLanguageModels)
    outputs: int = 10
    repeats: int = 100
    MINIATURE: ClassVar[Mapping[str, Any]] = {"repeats": 5}

    def run(self, arm: Arm, key: RunKey, settings: Settings) -> Result:
        """Measure an arm on a random model."""
        own = Configured(arm, settings)
        exact, method = own.pop("exact", False), own.pop("method", AWRS())
        method = own.fill(AWRS(**{**method.model_dump(exclude_unset=True), "particles": self.outputs}))
        own.check()
        unit, rng = self.bed.unit(key.seed), np.random.default_rng([key.seed, 1])
        distances, checks, tokens = [], 0, 0
        with peak_memory(torch.device("cpu")) as spent:
            start = unit.start()
            for _ in range(self.repeats):
                if exact:
                    weights = self._draws(unit, rng)
                else:
                    population = method.sample(TableModel(unit.table), start, unit.limit, rng)
                    weights = {tokens: weight for tokens, weight, _ in population.distinct()}
                    checks += population.checks
                    tokens += sum(map(len, population.tokens))
                distances.append(total_variation(weights, unit.posterior))
        values = {TOTAL_VARIATION.name: float(np.mean(distances)), CHECKS.name: checks / max(tokens, 1)}
        cost = Cost(tokens, seconds=spent.seconds, peak_bytes=spent.bytes)
        return Result(values, cost, {"posterior": digest(sorted(unit.posterior.items()))})

    def _draws(self, unit: Unit, rng: np.random.Generator) -> Weighted:
        strings, probs = zip(*unit.posterior.items(), strict=True)
        drawn = Counter(rng.choice(len(strings), self.outputs, p=probs).tolist())
        return {strings[index]: count / self.outputs for index, count in drawn.items()}
