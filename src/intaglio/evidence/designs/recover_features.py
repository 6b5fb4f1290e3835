"""Design that trains dictionaries on sums of known directions and counts those that are recovered: `RecoverFeatures`.

Settings of an arm: `dictionaries`, methods of which each is trained and the measures averaged; `oracle`, the true
directions instead; everything else is a field of the methods.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from intaglio.evidence.designs.base import BedDesign, Configured, Settings
from intaglio.evidence.engine.claim import Arm, Cost, Metric, Result, RunKey
from intaglio.evidence.testbeds.cache import digest
from intaglio.evidence.testbeds.sparse_features import SparseFeatures
from intaglio.measures.dictionaries import feature_recovery_rate, reconstruction
from intaglio.measures.memory import peak_memory

RECOVERED = Metric("features recovered", "share", "higher", continuous=False)
LOOSELY = Metric("features recovered, cosine above .8", "share", "higher", continuous=False)
UNEXPLAINED = Metric("variance unexplained", "share")
ACTIVE = Metric("active latents", "latents", continuous=False)
ALIVE = Metric("latents alive", "share", "higher", continuous=False)
MEASURED = 4096
"""Samples on which reconstruction is measured."""


@dataclass(frozen=True)
class RecoverFeatures(BedDesign):
    """Train dictionaries of `width` latents for `steps` steps of `batch_tokens` samples; a unit is a seed."""

    bed: SparseFeatures = field(default_factory=SparseFeatures)
    width: int = 256
    steps: int = 1000
    batch_tokens: int = 512
    MINIATURE: ClassVar[Mapping[str, Any]] = {"width": 64, "steps": 100, "batch_tokens": 64}

    def run(self, arm: Arm, key: RunKey, settings: Settings) -> Result:
        """Train an arm's dictionaries on a unit's samples and compare them with the true directions."""
        own, seed = Configured(arm, settings), key.seed
        methods = own.pop("dictionaries", ())
        oracle = own.pop("oracle", False)
        true_KD, x_ND = self.bed.directions(seed), self.bed.activations(seed)
        sizes = {"width": self.width, "batch_tokens": self.batch_tokens, "tokens": self.steps * self.batch_tokens}
        rows = []
        with peak_memory(torch.device("cpu")) as spent:
            for method in methods:
                given = own.fill(method)
                trained = type(given)(**{**given.model_dump(exclude_unset=True), **sizes})
                dictionary = trained.fit_activations(x_ND, seed=seed % 2**32).dictionary()
                measured = reconstruction(dictionary, x_ND[:MEASURED])
                rows.append(
                    {
                        RECOVERED.name: feature_recovery_rate(true_KD, dictionary.decoder_MD, 0.9),
                        LOOSELY.name: feature_recovery_rate(true_KD, dictionary.decoder_MD, 0.8),
                        UNEXPLAINED.name: measured.fvu,
                        ACTIVE.name: measured.l0,
                        ALIVE.name: dictionary.about["alive"],
                    }
                )
        own.check()
        if oracle:
            rows = [{RECOVERED.name: feature_recovery_rate(true_KD, true_KD), UNEXPLAINED.name: 0.0}]
        values = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        tokens = self.steps * self.batch_tokens
        parameters = 2 * self.width * self.bed.width
        cost = Cost(tokens, 6.0 * parameters * tokens, parameters, spent.seconds, spent.bytes)
        return Result(values, cost, {"samples": digest([float(value) for value in x_ND[0]])})

    def toy(self, **changes: Any) -> RecoverFeatures:
        """Return the design on few features; `changes` are its own fields."""
        small: RecoverFeatures = super().toy()
        return dataclasses.replace(small, **changes)
