"""Routing: expected sparsity of the experts, the choice, and the loss that balances their loads.

Dimension letters: T tokens, E experts, K chosen experts of a token, F units of an expert, D width.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Gates = Literal["chosen", "all"]

EPS = 1e-6
"""Lower bound of the variance of a pre-activation, so that a token of zeros has a score, 0."""


def moments(encoder_EFD: Tensor, bias_EF: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return mean and population variance over the units of every expert, for each input and the bias.

    The rows of an expert's encoder are taken for draws of one random vector, whose moments these are.

    Args:
        encoder_EFD: the encoders.
        bias_EF: of the units. Default: none.

    Returns:
        mean [E, D], variance [E, D], and of the bias mean [E] and variance [E], zeros where there is none; in float32
        or wider.
    """
    wide = encoder_EFD.to(torch.promote_types(encoder_EFD.dtype, torch.float32))
    variance_ED, mean_ED = torch.var_mean(wide, dim=1, correction=0)
    if bias_EF is None:
        zeros_E = wide.new_zeros(len(wide))
        return mean_ED, variance_ED, zeros_E, zeros_E
    variance_E, mean_E = torch.var_mean(bias_EF.to(wide.dtype), dim=1, correction=0)
    return mean_ED, variance_ED, mean_E, variance_E


def sparsity_scores(x_TD: Tensor, known: tuple[Tensor, ...]) -> Tensor:
    """Return r_e(x) = -erf(m_e / sqrt(2 v_e)) [T, E], higher where an expert is expected to be sparser.

        m_e = mean_e · x + mean of the bias,   v_e = Σ_i variance_ei x_i² + variance of the bias

    The probability that a unit of the expert fires is (1 - r_e) / 2: its pre-activation is taken for normal.

    Args:
        x_TD: input of the experts.
        known: from `moments`.
    """
    mean_ED, variance_ED, mean_E, variance_E = known
    x_TD = x_TD.to(mean_ED.dtype)
    m_TE = x_TD @ mean_ED.T + mean_E
    v_TE = x_TD.square() @ variance_ED.T + variance_E
    return -torch.erf(m_TE / (2 * v_TE.clamp_min(EPS)).sqrt())


def firing_probability(scores_TE: Tensor) -> Tensor:
    """Return the probability that a unit of each expert fires, (1 - r) / 2 [T, E], from `sparsity_scores`."""
    return (1 - scores_TE) / 2


def choose(scores_TE: Tensor, active: int, gates: Gates = "chosen") -> tuple[Tensor, Tensor]:
    """Return the experts with the highest scores, of equal ones the first, and their gates.

    Args:
        scores_TE: higher is better.
        active: K.
        gates: `chosen`, a softmax over the chosen scores alone (default), or `all`, over all of them.

    Returns:
        chosen experts, int64 [T, K], and gates [T, K].
    """
    best_TE, order_TE = scores_TE.sort(dim=-1, descending=True, stable=True)
    chosen_TK = order_TE[:, :active]
    if gates == "all":
        return chosen_TK, scores_TE.softmax(-1).gather(-1, chosen_TK)
    return chosen_TK, best_TE[:, :active].softmax(-1)


def loads(chosen_TK: Tensor, experts: int) -> Tensor:
    """Return each expert's share of all choices, float32 [E]."""
    return torch.bincount(chosen_TK.flatten(), minlength=experts).float() / max(1, chosen_TK.numel())


def balance_loss(scores_TE: Tensor, chosen_TK: Tensor) -> Tensor:
    """Return E Σ_e f_e p_e, with f_e the expert's share of the choices and p_e its mean probability over all tokens.

    Probabilities are a softmax over all experts. The loss is 1 where both are even, E where one expert gets everything.
    The gradient passes through p alone.

    Source: Fedus et al., Switch Transformers, JMLR 2022, section 2.2.
    """
    experts = scores_TE.shape[-1]
    share_E = loads(chosen_TK, experts).to(scores_TE.dtype)
    return experts * (share_E * scores_TE.softmax(-1).mean(0)).sum()


def entropy(share_E: Tensor) -> float:
    """Return the entropy of loads over that of even ones: 1 where all experts are used alike, 0 where one is."""
    if len(share_E) == 1:
        return 1.0
    return float(torch.special.entr(share_E.double()).sum()) / math.log(len(share_E))
