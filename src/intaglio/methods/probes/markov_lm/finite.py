"""Finite Markov kernels: row-stochastic matrices, divergences, categorical entropies, information surplus.

A kernel from A to B outcomes is a tensor [A, B] of rows that add up to 1. Everything is in nats.

Dimension letters: A, B outcomes, H encoder states, V tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

DivergenceName = Literal["kl", "tv", "hellinger", "renyi"]


def compose(first_AB: Tensor, second_BC: Tensor) -> Tensor:
    """Return the kernel that runs one after the other, [A, C]."""
    return first_AB @ second_BC


def product(first: Tensor, second: Tensor) -> Tensor:
    """Return the kernel that runs both side by side, on pairs of outcomes."""
    return torch.kron(first, second)


def copy(outcomes: int) -> Tensor:
    """Return the deterministic kernel x -> (x, x), float64 [A, A A]."""
    index_A = torch.arange(outcomes)
    result = torch.zeros(outcomes, outcomes**2, dtype=torch.float64)
    result[index_A, index_A * (outcomes + 1)] = 1
    return result


def discard(outcomes: int) -> Tensor:
    """Return the kernel to a single outcome, float64 [A, 1]."""
    return torch.ones(outcomes, 1, dtype=torch.float64)


def divergence(p: Tensor, q: Tensor, name: DivergenceName = "kl", order: float = 0.5) -> Tensor:
    """Return D(p || q) over the last dimension.

    Args:
        p: probabilities.
        q: probabilities of the same shape.
        name: `kl`; `tv`, half the sum of absolute differences; `hellinger`, 2 (1 - sum sqrt(p q)); or `renyi`,
            log(sum p^a q^(1 - a)) / (a - 1).
        order: a of `renyi`, above 0 and not 1. Default 0.5.
    """
    if name == "kl":
        return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum(-1)
    if name == "tv":
        return 0.5 * (p - q).abs().sum(-1)
    if name == "hellinger":
        return 2 - 2 * (p * q).sqrt().sum(-1)
    shared = torch.where(p > 0, p**order * q ** (1 - order), torch.zeros_like(p))
    return shared.sum(-1).log() / (order - 1)


def categorical_entropy(p: Tensor, name: DivergenceName = "kl", order: float = 0.5) -> Tensor:
    """Return D(P(Y, Y) || P of two independent draws of p) over the last dimension, in closed form.

    `kl` gives Shannon's entropy, `tv` 1 - sum p², `hellinger` 2 (1 - sum p^1.5), and `renyi` of order a Rényi's entropy
    of order 2 - a, log(sum p^(2 - a)) / (a - 1). It is 0 for a deterministic kernel.
    """
    if name == "kl":
        return -torch.special.xlogy(p, p).sum(-1)
    if name == "tv":
        return 1 - p.square().sum(-1)
    if name == "hellinger":
        return 2 - 2 * p.pow(1.5).sum(-1)
    powers = torch.where(p > 0, p ** (2 - order), torch.zeros_like(p))
    return powers.sum(-1).log() / (order - 1)


def direct_entropy(p_A: Tensor, name: DivergenceName = "kl", order: float = 0.5) -> Tensor:
    """Return the categorical entropy by its definition, from the joint distributions [A, A]."""
    return divergence(torch.diag(p_A).flatten(), torch.outer(p_A, p_A).flatten(), name, order)


def mutual_information(joint_AB: Tensor, name: DivergenceName = "kl", order: float = 0.5) -> Tensor:
    """Return D(joint || product of its marginals)."""
    marginals_AB = torch.outer(joint_AB.sum(1), joint_AB.sum(0))
    return divergence(joint_AB.flatten(), marginals_AB.flatten(), name, order)


def information_surplus(joint: Tensor) -> dict[str, float]:
    """Return the information of an encoder state about its next K tokens, by the chain rule.

        I(H; W_t .. W_{t+K-1}) = I(H; W_t) + Surplus_K,   Surplus_K = sum_j I(H; W_{t+j} | W_t .. W_{t+j-1})

    Args:
        joint: probabilities [H, V, ..., V] of the state and K tokens, of which the first is predicted from the state.

    Returns:
        `information` (all tokens), `next` (the first), `surplus`, and `term 1`, `term 2`, ... of the later tokens.
    """
    states = joint.shape[0]
    informed = [
        float(mutual_information(joint.reshape(states, *joint.shape[1 : 1 + count], -1).sum(-1).reshape(states, -1)))
        for count in range(1, joint.ndim)
    ]
    result = {"information": informed[-1], "next": informed[0], "surplus": informed[-1] - informed[0]}
    return result | {f"term {j}": informed[j] - informed[j - 1] for j in range(1, len(informed))}


def decompose_loss(data_AV: Tensor, model_AV: Tensor, weight_A: Tensor) -> dict[str, float]:
    """Return the expected cross-entropy of a model as `data_entropy` + `kl`, and the two entropies' `entropy_gap`.

    Args:
        data_AV: true next-token distributions of A contexts.
        model_AV: the model's.
        weight_A: probabilities of the contexts.
    """
    data_entropy, model_entropy = (float((weight_A * categorical_entropy(p)).sum()) for p in (data_AV, model_AV))
    kl = float((weight_A * divergence(data_AV, model_AV)).sum())
    loss = float(-(weight_A * torch.special.xlogy(data_AV, model_AV).sum(-1)).sum())
    return {"loss": loss, "data_entropy": data_entropy, "kl": kl, "entropy_gap": model_entropy - data_entropy}
