"""`PredictiveAlignment`: trains a small network on contexts of known distributions and measures its geometry.

Settings of an arm: `trains`, `distributions` (cross-entropy with the true distributions), `permuted` (with those of
other contexts), `targets` (squared error to random targets), `nothing`, or `oracle`, the distributions' own features
instead of a network; everything else is a field of `MarkovLM`, whose kernel is used.

Dimension letters: N contexts, D width of hidden states, V tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from intaglio.evidence.designs.base import BedDesign, Configured, Settings
from intaglio.evidence.engine.claim import Arm, Cost, Metric, Result, RunKey
from intaglio.evidence.testbeds.cache import digest
from intaglio.evidence.testbeds.finite_source import FiniteSource, MixtureDistributions
from intaglio.measures.memory import peak_memory
from intaglio.methods.probes.markov_lm import MarkovLM
from intaglio.methods.probes.markov_lm.finite import divergence
from intaglio.methods.probes.markov_lm.geometry import (
    fisher_weighted,
    kernel_alignment,
    mean_fisher_metric,
    predictive_kernel,
)

ALIGNMENT = Metric("alignment with the true kernel", "CKA", "higher")
HALF = Metric("alignment at half of the loss", "CKA", "higher")
TENTH = Metric("alignment at a tenth of the loss", "CKA", "higher")
WEIGHTED = Metric("Fisher-weighted alignment", "CKA", "higher")
PERMUTED = Metric("alignment with permuted contexts", "CKA", "higher")
LEFT = Metric("share of the reducible loss left", "share")
LEVELS = {0.5: HALF, 0.1: TENTH}
PASSES_A_CHECK = 5


class Network(nn.Module):
    """Embedding and perceptron to hidden states, and a linear head without bias."""

    def __init__(self, contexts: int, width: int, tokens: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, width))
        self.embedding = nn.Embedding(contexts, 32)
        self.head = nn.Linear(width, tokens, bias=False)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the hidden states [N, D] of all contexts and their logits [N, V]."""
        hidden_ND = self.encoder(self.embedding.weight)
        return hidden_ND, self.head(hidden_ND)


@dataclass(frozen=True)
class PredictiveAlignment(BedDesign):
    """Train until `remaining` of the reducible loss is left, at most `steps` full passes; a unit is a random source."""

    bed: MixtureDistributions = field(default_factory=MixtureDistributions)
    width: int = 16
    steps: int = 3000
    learning_rate: float = 3e-3
    remaining: float = 0.02
    MINIATURE: ClassVar[Mapping[str, Any]] = {"steps": 300, "width": 6}

    def run(self, arm: Arm, key: RunKey, settings: Settings) -> Result:
        """Train an arm on a source and measure it."""
        own = Configured(arm, settings)
        trains, method = own.pop("trains"), own.fill(MarkovLM())
        own.check()
        source = self.bed.source(key.seed)
        kernel = predictive_kernel(source.distributions_NV.double(), method.kernel, method.beta)
        with peak_memory(torch.device("cpu")) as spent:
            if trains == "oracle":
                features_ND = source.distributions_NV.sqrt()
                values, steps = self._measured(features_ND, features_ND, kernel, source, key.seed), 0
                values |= {HALF.name: values[ALIGNMENT.name], TENTH.name: values[ALIGNMENT.name], LEFT.name: 0.0}
            else:
                values, steps = self._trained(trains, kernel, source, key.seed)
        parity = {"source": digest(source.distributions_NV.double().sum(0).tolist())}
        return Result(values, Cost(steps * len(kernel), seconds=spent.seconds, peak_bytes=spent.bytes), parity)

    def _trained(self, trains: str, kernel: Tensor, source: FiniteSource, seed: int) -> tuple[dict[str, float], int]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = Network(len(kernel), self.width, source.distributions_NV.shape[1])
        optimizer = torch.optim.Adam(network.parameters(), lr=self.learning_rate)
        goal_NV = source.targets_NV if trains == "targets" else source.distributions_NV
        if trains == "permuted":
            goal_NV = goal_NV[torch.randperm(len(goal_NV), generator=torch.Generator().manual_seed(seed + 1))]
        first = float("nan")
        reached: dict[str, float] = {}
        share, step = 1.0, 0
        for step in range(self.steps if trains != "nothing" else 1):
            hidden_ND, logits_NV = network()
            if trains == "targets":
                loss_N = (logits_NV - goal_NV).square().sum(1)
            else:
                loss_N = divergence(goal_NV, logits_NV.softmax(1))  # cross-entropy minus the data's entropy
            loss = source.weight_N @ loss_N
            first = float(loss.detach()) if step == 0 else first
            share = float(loss.detach()) / first
            if step % PASSES_A_CHECK == 0:
                for level, metric in LEVELS.items():
                    if share <= level and metric.name not in reached:
                        reached[metric.name] = self._alignment(hidden_ND, kernel, source)
                if share <= self.remaining:
                    break
            if trains != "nothing":
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            hidden_ND, _ = network()
        values = self._measured(hidden_ND, network.head.weight.detach(), kernel, source, seed)
        return {HALF.name: values[ALIGNMENT.name], TENTH.name: values[ALIGNMENT.name], **values, **reached,
                LEFT.name: share}, step  # fmt: skip

    def _measured(
        self, hidden_ND: Tensor, head_VD: Tensor, kernel: Tensor, source: FiniteSource, seed: int
    ) -> dict[str, float]:
        order_N = torch.randperm(len(kernel), generator=torch.Generator().manual_seed(seed + 2))
        weighted_ND = hidden_ND.double()
        if head_VD.shape[0] == source.distributions_NV.shape[1]:
            probs_NV = (hidden_ND @ head_VD.T).softmax(1).double()
            metric_DD = mean_fisher_metric(head_VD.double(), probs_NV, source.weight_N.double())
            weighted_ND = fisher_weighted(weighted_ND, metric_DD)
        return {
            ALIGNMENT.name: self._alignment(hidden_ND, kernel, source),
            WEIGHTED.name: self._alignment(weighted_ND, kernel, source),
            PERMUTED.name: self._alignment(hidden_ND, kernel[order_N][:, order_N], source),
        }

    @staticmethod
    def _alignment(hidden_ND: Tensor, kernel: Tensor, source: FiniteSource) -> float:
        hidden_ND = hidden_ND.detach().double()
        return kernel_alignment(hidden_ND @ hidden_ND.T, kernel, source.weight_N.double())
