"""Geometry of hidden states: pullback Fisher metric, predictive-similarity kernels, spectral alignment.

Dimension letters: N contexts, D width of hidden states, V tokens, M directions.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KernelName = Literal["bhattacharyya", "hellinger", "linear", "jensen_shannon", "prototype"]
MAX_MIXTURES = 1 << 24
"""Most probabilities of mixtures of two contexts that are held at a time."""


# --- Fisher metric ----------------------------------------------------------------------------------------------------


def fisher_metric(head_VD: Tensor, probs_V: Tensor) -> Tensor:
    """Return the metric that the softmax of a linear head pulls back to hidden states, [D, D].

        g(h) = W^T (diag p - p p^T) W = Cov_{w ~ p}(W_w),   KL(p_{h+ev} || p_h) = e²/2 v^T g v + O(e³)

    The hidden state is the head's input, after any final norm.

    Args:
        head_VD: W, with logits = W h + b.
        probs_V: p at h.
    """
    mean_D = probs_V @ head_VD
    return (head_VD * probs_V[:, None]).T @ head_VD - torch.outer(mean_D, mean_D)


def mean_fisher_metric(head_VD: Tensor, probs_NV: Tensor, weight_N: Tensor | None = None) -> Tensor:
    """Return the metric averaged over contexts, [D, D]; `weight_N` are their probabilities (default: equal)."""
    weight_N = _weights(weight_N, probs_NV)
    mean_ND = probs_NV @ head_VD
    second_DD = (head_VD * (weight_N @ probs_NV)[:, None]).T @ head_VD
    return second_DD - (mean_ND * weight_N[:, None]).T @ mean_ND


def participation_ratio(spectrum_M: Tensor) -> float:
    """Return (sum l)² / sum l², the effective number of directions."""
    total = float(spectrum_M.square().sum())
    return float(spectrum_M.sum()) ** 2 / total if total > 0 else 0.0


def sensitivity(metric_DD: Tensor, direction_D: Tensor) -> float:
    """Return v^T g v of the direction scaled to unit length."""
    unit_D = direction_D / direction_D.norm()
    return float(unit_D @ metric_DD @ unit_D)


# --- Kernels ----------------------------------------------------------------------------------------------------------


def predictive_kernel(
    probs_NV: Tensor, name: KernelName = "bhattacharyya", beta: float = 1.0, prototypes_VD: Tensor | None = None
) -> Tensor:
    """Return the similarity of contexts by their next-token distributions, [N, N].

    Args:
        probs_NV: next-token distributions.
        name: `bhattacharyya`, sum sqrt(p p'); `hellinger`, exp(-beta d²) with d² = 2 (1 - sum sqrt(p p')); `linear`,
            <p, p'>; `jensen_shannon`, exp(-beta JS); `prototype`, <g, g'> with g = sum_w p(w) prototype_w.
        beta: of the exponentials. Default 1.
        prototypes_VD: rows of the head, scaled to unit length here. Needed by `prototype`.
    """
    if name == "linear":
        return probs_NV @ probs_NV.T
    if name == "prototype":
        assert prototypes_VD is not None
        mean_ND = probs_NV @ torch.nn.functional.normalize(prototypes_VD, dim=1)
        return mean_ND @ mean_ND.T
    if name == "jensen_shannon":
        return (-beta * _jensen_shannon(probs_NV)).exp()
    root_NV = probs_NV.sqrt()
    coefficient_NN = root_NV @ root_NV.T
    return coefficient_NN if name == "bhattacharyya" else (-2 * beta * (1 - coefficient_NN)).exp()


def _jensen_shannon(probs_NV: Tensor) -> Tensor:
    entropy_N = -torch.special.xlogy(probs_NV, probs_NV).sum(1)
    rows, group = [], max(1, MAX_MIXTURES // probs_NV.numel())
    for part_BV, own_B in zip(probs_NV.split(group), entropy_N.split(group), strict=True):
        mixed_BNV = 0.5 * (part_BV[:, None] + probs_NV)
        mixture_BN = -torch.special.xlogy(mixed_BNV, mixed_BNV).sum(2)
        rows.append(mixture_BN - 0.5 * (own_B[:, None] + entropy_N))
    return torch.cat(rows)


def induced_kernel(kernel_NN: Tensor, state_N: Tensor, weight_N: Tensor) -> Tensor:
    """Return the kernel on encoder states: the mean over the contexts that share each state, by their probabilities."""
    one_hot_NS = torch.nn.functional.one_hot(state_N).to(kernel_NN.dtype) * weight_N[:, None]
    weights_NS = one_hot_NS / one_hot_NS.sum(0)
    return weights_NS.T @ kernel_NN @ weights_NS


# --- Alignment --------------------------------------------------------------------------------------------------------


def _weights(weight_N: Tensor | None, like: Tensor) -> Tensor:
    return torch.full((len(like),), 1 / len(like), dtype=like.dtype) if weight_N is None else weight_N


def _centred(kernel_NN: Tensor, weight_N: Tensor) -> Tensor:
    """Return the kernel of centred features, scaled on both sides by the square roots of the probabilities."""
    mean_N = kernel_NN @ weight_N
    centred_NN = kernel_NN - mean_N[:, None] - mean_N + weight_N @ mean_N
    root_N = weight_N.sqrt()
    return centred_NN * root_N[:, None] * root_N


def kernel_alignment(a_NN: Tensor, b_NN: Tensor, weight_N: Tensor | None = None) -> float:
    """Return the centred alignment (CKA) of two kernels on the same contexts, weighted by their probabilities."""
    weight_N = _weights(weight_N, a_NN)
    a_NN, b_NN = _centred(a_NN, weight_N), _centred(b_NN, weight_N)
    scale = float(a_NN.norm() * b_NN.norm())
    return float((a_NN * b_NN).sum()) / scale if scale > 0 else 0.0


def subspace_overlap(hidden_ND: Tensor, kernel_NN: Tensor, directions: int, weight_N: Tensor | None = None) -> float:
    """Return the mean squared cosine between the leading `directions` of centred hidden states and centred kernel."""
    weight_N = _weights(weight_N, kernel_NN)
    centred_ND = (hidden_ND - weight_N @ hidden_ND) * weight_N.sqrt()[:, None]
    directions = min(directions, *hidden_ND.shape)
    left_NM = torch.linalg.svd(centred_ND, full_matrices=False).U[:, :directions]
    own_NM = torch.linalg.eigh(_centred(kernel_NN, weight_N)).eigenvectors[:, -directions:]
    return float((left_NM.T @ own_NM).square().sum()) / directions


def fisher_weighted(hidden_ND: Tensor, metric_DD: Tensor) -> Tensor:
    """Return hidden states in coordinates of the metric, h L with L L^T = G."""
    values_D, vectors_DD = torch.linalg.eigh(metric_DD)
    return hidden_ND @ (vectors_DD * values_D.clamp(min=0).sqrt())


def whiten(hidden_ND: Tensor, mean_D: Tensor, covariance_DD: Tensor, ridge: float = 1e-6) -> Tensor:
    """Return centred hidden states of unit covariance; mean and covariance come from other contexts than those."""
    values_D, vectors_DD = torch.linalg.eigh(covariance_DD)
    floor = ridge * float(values_D[-1])
    return (hidden_ND - mean_D) @ (vectors_DD / values_D.clamp(min=floor).sqrt())


def spectral_functional(white_ND: Tensor, kernel_NN: Tensor, weight_N: Tensor | None = None) -> float:
    """Return J = E_{x, x'} [<h_x, h_x'> K(x, x')] of whitened hidden states, the functional of Theorem 7.6."""
    weight_N = _weights(weight_N, kernel_NN)
    return float(weight_N @ ((white_ND @ white_ND.T) * kernel_NN) @ weight_N)


def dirichlet_energy(kernel_NN: Tensor, feature_N: Tensor, weight_N: Tensor | None = None) -> float:
    """Return 1/2 sum_{x, x'} mu mu' K (phi - phi')² = phi^T (degrees - K) phi, K weighted by contexts."""
    weight_N = _weights(weight_N, kernel_NN)
    weighted_NN = kernel_NN * torch.outer(weight_N, weight_N)
    return float(feature_N @ (weighted_NN.sum(1) * feature_N - weighted_NN @ feature_N))


def alignment_and_uniformity(
    hidden_ND: Tensor, head_VD: Tensor, data_NV: Tensor, weight_N: Tensor | None = None, bias_V: Tensor | None = None
) -> dict[str, float]:
    """Return the two terms of the cross-entropy of a linear head: CE = -E <g, h> + E log Z(h).

    Args:
        hidden_ND: hidden states.
        head_VD: the head's rows.
        data_NV: true next-token distributions, one-hot for observed tokens; g = sum_w p(w) W_w.
        weight_N: probabilities of the contexts. Default: equal.
        bias_V: of the head, counted with the alignment. Default: none.
    """
    weight_N = _weights(weight_N, hidden_ND)
    logits_NV = hidden_ND @ head_VD.T
    logits_NV = logits_NV if bias_V is None else logits_NV + bias_V
    alignment = float(weight_N @ (data_NV * logits_NV).sum(1))
    uniformity = float(weight_N @ logits_NV.logsumexp(1))
    return {"alignment": -alignment, "uniformity": uniformity, "loss": uniformity - alignment}
