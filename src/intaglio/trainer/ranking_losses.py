"""Losses of scores between queries and documents.

    info_nce      -log exp(s(q_i, p_i) / T) / sum_j exp(s(q_i, d_j) / T)            s(q, d) = <v_q, v_d>
    margin_mse    mean over i, j of ((s(q_i, p_i) - s(q_i, n_ij)) - (t_i - t_ij))^2
    distillation  mean over i of KL(softmax(t_i / T_t) || softmax(s(q_i, d) / T)), d: the texts of pair i

The d_j are the positives and negatives of the whole batch; those known to be relevant to q_i are left out.

Dimension letters: B queries, N documents, K negatives, R relevant texts of a query.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(
    scores_BN: Tensor,
    excluded_BN: Tensor,
    *,
    symmetric: bool = False,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Return the contrastive cross-entropy of scores; document i belongs to query i.

    Args:
        scores_BN: scores, divided by the temperature; N >= B.
        excluded_BN: True where a document is left out of a query's softmax; never on the diagonal.
        symmetric: whether to average with the cross-entropy of the first B documents over the queries. Default False.
        reduction: `mean`, or `none` for the losses [B] of the queries. Default `mean`.
    """
    scores_BN = scores_BN.float().masked_fill(excluded_BN, -torch.inf)
    target_B = torch.arange(len(scores_BN), device=scores_BN.device)
    rows = F.cross_entropy(scores_BN, target_B, reduction=reduction)
    if not symmetric:
        return rows
    return (rows + F.cross_entropy(scores_BN[:, : len(target_B)].T, target_B, reduction=reduction)) / 2


def margin_mse(scores_BN: Tensor, owner_N: Tensor, teacher_N: Tensor) -> Tensor:
    """Return the mean squared error of margins (Hofstätter et al., 2020, arXiv 2010.02666).

    Args:
        scores_BN: scores; the positive of query i is document i.
        owner_N: the query that a document belongs to.
        teacher_N: the teacher's score of each document for its query.
    """
    owner_K = owner_N[len(scores_BN) :]
    own_K = scores_BN[owner_K, torch.arange(len(scores_BN), scores_BN.shape[1], device=owner_K.device)]
    student_K = scores_BN.diagonal()[owner_K] - own_K
    return F.mse_loss(student_K, teacher_N[owner_K] - teacher_N[len(scores_BN) :])


def distillation(scores_BN: Tensor, owner_N: Tensor, teacher_N: Tensor) -> Tensor:
    """Return the mean divergence of the scores' softmax over a query's own documents from the teacher's.

    Args:
        scores_BN: scores, divided by their temperature; the positive of query i is document i.
        owner_N: the query that a document belongs to.
        teacher_N: the teacher's score of each document for its query, divided by its temperature.
    """
    own_BN = owner_N == torch.arange(len(scores_BN), device=owner_N.device)[:, None]
    student_BN, teacher_BN = (
        values.float().expand_as(own_BN).masked_fill(~own_BN, -torch.inf).log_softmax(1)
        for values in (scores_BN, teacher_N)
    )
    total = F.kl_div(student_BN[own_BN], teacher_BN[own_BN], reduction="sum", log_target=True)
    return total / len(scores_BN)


def excluded_documents(relevant_BR: Tensor, number_N: Tensor) -> Tensor:
    """Return True where a document is relevant to a query whose positive is another, bool [B, N]."""
    excluded_BN = torch.stack([torch.isin(number_N, relevant_R) for relevant_R in relevant_BR])
    return excluded_BN.fill_diagonal_(False)


def accuracy(scores_BN: Tensor) -> Tensor:
    """Return the share of queries whose own document has the highest score."""
    return (scores_BN.argmax(1) == torch.arange(len(scores_BN), device=scores_BN.device)).float().mean()
