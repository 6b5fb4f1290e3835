"""Design that draws samples of source tasks for a target and measures the target's error: `AllocateSamples`.

Settings of an arm: `known`, whether the true coefficients are given; everything else is a field of `ActiveSettings`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from intaglio.evidence.designs.base import BedDesign, Configured, Settings
from intaglio.evidence.engine.claim import Arm, Cost, Metric, Result, RunKey
from intaglio.evidence.testbeds.cache import digest
from intaglio.evidence.testbeds.linear_tasks import LinearTasks
from intaglio.measures.memory import peak_memory
from intaglio.methods.training.amtrl_lasso import ActiveSettings, basis_pursuit, least_norm

TARGET_ERROR = Metric("target error", "square", relative=True)
DENSE_ERROR = Metric("error on a dense target", "square", relative=True)


@dataclass(frozen=True)
class AllocateSamples(BedDesign):
    """Learn each target of a problem with so many samples of all sources, exploration included; a unit is a problem."""

    bed: LinearTasks = field(default_factory=LinearTasks)
    samples: int = 6000
    MINIATURE: ClassVar[Mapping[str, Any]] = {"samples": 400}

    def run(self, arm: Arm, key: RunKey, settings: Settings) -> Result:
        """Learn the targets of a unit under an arm."""
        own, seed = Configured(arm, settings), key.seed
        known = own.pop("known", False)
        method: ActiveSettings = own.fill(ActiveSettings(samples=self.samples, rank=self.bed.rank))
        own.check()
        sources, heads_KC = self.bed.sources(seed), self.bed.target_heads(seed)
        errors, drawn, shared = [], 0, []
        with peak_memory(torch.device("cpu")) as spent:
            for number in range(heads_KC.shape[1]):
                samples, true_D = self.bed.target(seed, number)
                nu = self._known(seed, method, heads_KC[:, number]) if known else None
                solution = method.solve(sources, samples, seed=seed, nu=nu)
                estimate_D = solution.predict(np.eye(self.bed.inputs))[:, 0]
                errors.append(float(np.square(estimate_D - true_D).sum()))
                drawn += int(solution.counts_RS[-1].sum())
                shared.append(true_D.round(9).tolist())
        values = {TARGET_ERROR.name: float(np.mean(errors[:-1])), DENSE_ERROR.name: errors[-1]}
        return Result(values, Cost(drawn, 0.0, 0, spent.seconds, spent.bytes), {"targets": digest(shared)})

    def _known(self, seed: int, method: ActiveSettings, head_K: np.ndarray) -> np.ndarray:
        W_KT = self.bed.truth(seed)[1]
        solve = basis_pursuit if method.strategy == "l1" else least_norm
        return solve(W_KT, head_K)[:, None]
