"""Scores of the experts from a router's output.

    a = ReLU(raw),   n = a / sqrt(mean_e a_e^2 + eps),   score = n g        `relu` with the norm `rms`
    p = n / (sum_e n_e + 1e-5)                                             the share of each expert in a token

What is zero stays zero, so a token has as many experts as its router has positive outputs. A positive factor of the
input changes no score (but for eps). The baselines' routers are here, too.

Dimension letters: B any leading dimensions, E experts, K chosen experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Router = Literal["relu", "topk", "remoe", "none"]
Norm = Literal["rms", "sum", "none"]

EPS = 1e-5
"""In the sum of a token's shares, and in the logarithm of the chunk loss, as in the authors' code."""


@dataclass(frozen=True)
class BlockFFNConfig:
    """Sizes and router of the layers, the same for all of a model.

    Args:
        experts: E.
        expert_width: H, inner features of an expert.
        router: `relu`; `topk`: a softmax over all, the K largest kept and divided by their sum; `remoe`: ReLU alone,
            which a penalty holds at K experts; `none`: every score is 1.
        norm: of `relu`: `rms`, `sum` (a over its sum) or `none`.
        k: K, of `topk` and `remoe`.
        eps: of the norm.
    """

    experts: int
    expert_width: int
    router: Router = "relu"
    norm: Norm = "rms"
    k: int | None = None
    eps: float = 1e-5

    @property
    def has_gain(self) -> bool:
        """Whether scores are multiplied with a learned g."""
        return self.router == "relu" and self.norm == "rms"


def normalize(raw_BE: Tensor, config: BlockFFNConfig) -> Tensor:
    """Return n [B, E] of the router `relu`, before g, in float32: zero where `raw_BE` is not positive."""
    a_BE = F.relu(raw_BE.float())
    if config.norm == "rms":
        return a_BE * torch.rsqrt(a_BE.square().mean(-1, keepdim=True) + config.eps)
    if config.norm == "sum":
        return a_BE / (a_BE.sum(-1, keepdim=True) + config.eps)
    return a_BE


def expert_shares(n_BE: Tensor) -> Tensor:
    """Return p [B, E]: n over its sum, so that a token's shares add up to 1 (or 0 where no expert fires)."""
    return n_BE / (n_BE.sum(-1, keepdim=True) + EPS)


def scores(raw_BE: Tensor, config: BlockFFNConfig, gain_E: Tensor | None = None) -> Tensor:
    """Return the score of each expert [B, E], float32; without a gain, g is 1."""
    if config.router == "none":
        return torch.ones_like(raw_BE, dtype=torch.float32)
    if config.router == "remoe":
        return F.relu(raw_BE.float())
    if config.router == "topk":
        assert config.k is not None  # checked by `BlockFFN`
        probs_BE = raw_BE.float().softmax(-1)
        best_BK, chosen_BK = probs_BE.topk(config.k, dim=-1)
        best_BK = best_BK / best_BK.sum(-1, keepdim=True)
        return torch.zeros_like(probs_BE).scatter(-1, chosen_BK, best_BK)
    n_BE = normalize(raw_BE, config)
    return n_BE if gain_E is None else n_BE * gain_E.float()
