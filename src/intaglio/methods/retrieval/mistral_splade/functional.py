"""Pure functions of SPLADE: pooling, regularisers, their schedule, pruning, and surface forms of tokens.

Dimension letters: N texts, S pooled tokens of all texts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from intaglio.data.vocabulary_terms import DAMAGED

Regularizer = Literal["flops", "l1"]
Forms = Literal["none", "space", "case"]


def splade_weights(logits_SV: Tensor, lengths: Sequence[int], pooling: Literal["max", "sum"] = "max") -> Tensor:
    """Return the term weights of texts, float32 [N, V]: pooled log(1 + relu(logit)).

    Args:
        logits_SV: logits of the pooled tokens, texts one after the other.
        lengths: pooled tokens of each text, which sum to S.
        pooling: `max` (log1p and relu are monotone, so they follow it) or `sum`. Default `max`.
    """
    parts = logits_SV.float().split(list(lengths))
    if pooling == "max":
        return torch.stack([part.max(0).values for part in parts]).relu().log1p()
    return torch.stack([part.relu().log1p().sum(0) for part in parts])


def flops(weights_NV: Tensor) -> Tensor:
    """Return sum_v (mean_n |w_nv|)^2 (Paria et al., 2020, arXiv 2004.05665)."""
    return weights_NV.abs().mean(0).square().sum()


def l1(weights_NV: Tensor) -> Tensor:
    """Return mean_n sum_v |w_nv|."""
    return weights_NV.abs().sum(1).mean()


REGULARIZERS = {"flops": flops, "l1": l1}


def quadratic_ramp(step: int, warmup: float) -> float:
    """Return min(1, step / warmup)^2; 1 without a warm-up."""
    return min(1.0, step / warmup) ** 2 if warmup > 0 else 1.0


def pruned(weights_NV: Tensor, terms: int | None, least: float = 0.0) -> Tensor:
    """Return vectors with the `terms` largest weights of each, and those above `least`; the others are zero."""
    kept_NV = torch.where(weights_NV > least, weights_NV, 0.0)
    if terms is None or terms >= weights_NV.shape[1]:
        return kept_NV
    top = kept_NV.topk(terms, dim=1)
    return torch.zeros_like(kept_NV).scatter(1, top.indices, top.values)


def nonzero_terms(weights_NV: Tensor) -> Tensor:
    """Return the number of nonzero weights of each text, float32 [N]."""
    return (weights_NV != 0).sum(1).float()


def surface_forms(texts: Sequence[str], terms_V: Tensor, forms: Forms) -> Tensor:
    """Return the token that stands for each token, int64 [V]: the first with the same text.

    Args:
        texts: text of each token.
        terms_V: tokens that may be terms; others stand for themselves.
        forms: `space` ignores white space around a text, `case` capital letters as well; `none`: all differ.
    """
    first: dict[str, int] = {}
    standing = list(range(len(texts)))
    for token, text in enumerate(texts):
        if forms != "none" and terms_V[token] and DAMAGED not in text:
            key = text.strip().lower() if forms == "case" else text.strip()
            standing[token] = first.setdefault(key, token)
    return torch.tensor(standing)


def merged(weights_NV: Tensor, standing_V: Tensor) -> Tensor:
    """Return weights in which each form's weight is the maximum over its tokens, at the token that stands for it."""
    target_NV = standing_V.expand(len(weights_NV), -1)
    return torch.zeros_like(weights_NV).scatter_reduce(1, target_NV, weights_NV, "amax")
