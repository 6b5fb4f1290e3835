"""From a router's output to the scores of the experts.

    a = ReLU(raw),   n = a / sqrt(mean_e a_e^2 + eps),   score = n g        `relu` with the norm `rms`
    p = n / (sum_e n_e + 1e-5)                                             the part of each expert in a token

What is zero stays zero, so a token has as many experts as its router has positive outputs. A positive factor of the
input changes no score (but for eps). Beside it stand the routers that it is held against.

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
"""In the sum of a token's parts, and in the logarithm of the chunk loss, as in the authors' code."""


@dataclass(frozen=True)
class Form:
    """What a layer computes: the same for all layers of a model.

    Args:
        experts: E.
        expert_width: h, inner features of an expert.
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


def normalised(raw_BE: Tensor, form: Form) -> Tensor:
    """n [B, E] of the router `relu`, before g, in float32: not negative, and zero where `raw_BE` is not above zero.

    Args:
        raw_BE: the router's output.
        form: of the layer.
    """
    a_BE = F.relu(raw_BE.float())
    if form.norm == "rms":
        return a_BE * torch.rsqrt(a_BE.square().mean(-1, keepdim=True) + form.eps)
    if form.norm == "sum":
        return a_BE / (a_BE.sum(-1, keepdim=True) + form.eps)
    return a_BE


def parts(n_BE: Tensor) -> Tensor:
    """p [B, E]: n over its sum, so that the parts of a token make 1 (or 0 where no expert fires).

    Args:
        n_BE: not negative, before g.
    """
    return n_BE / (n_BE.sum(-1, keepdim=True) + EPS)


def scores(raw_BE: Tensor, form: Form, gain_E: Tensor | None = None) -> Tensor:
    """The score of each expert [B, E], float32.

    Args:
        raw_BE: the router's output.
        form: of the layer.
        gain_E: g; None: 1.
    """
    if form.router == "none":
        return torch.ones_like(raw_BE, dtype=torch.float32)
    if form.router == "remoe":
        return F.relu(raw_BE.float())
    if form.router == "topk":
        assert form.k is not None  # checked where the form was made
        share_BE = raw_BE.float().softmax(-1)
        best_BK, which_BK = share_BE.topk(form.k, dim=-1)
        best_BK = best_BK / best_BK.sum(-1, keepdim=True)
        return torch.zeros_like(share_BE).scatter(-1, which_BK, best_BK)
    n_BE = normalised(raw_BE, form)
    return n_BE if gain_E is None else n_BE * gain_E.float()


__all__ = ["EPS", "Form", "Norm", "Router", "normalised", "parts", "scores"]
