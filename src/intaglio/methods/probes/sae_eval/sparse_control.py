"""Sparse control: edits of few features that should make an activation behave like a counterfactual one's.

Dimension letters: N prompts, D width, M latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from intaglio.dictionaries.dictionary import Dictionary


def feature_weights(codes_NM: Tensor, decoder_MD: Tensor) -> Tensor:
    """Return the share of each feature in the reconstruction [N, M]: f_j u_j · r / ||r||², r = Σ f_j u_j; sums to 1."""
    shift_ND = codes_NM @ decoder_MD
    return codes_NM * (shift_ND @ decoder_MD.T) / shift_ND.square().sum(1, keepdim=True).clamp_min(1e-12)


def greedy_edit(
    source_ND: Tensor, target_ND: Tensor, dictionary: Dictionary, decoder_MD: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Return edited activations [N, D], and the share of the source's reconstruction that was removed [N].

    Each of k rounds adds the change δ_j = (f_j(t) - f_j(s)) u_j of the feature that brings the sum of changes nearest
    to a_t - a_s; a feature is used once. As in the authors' code a feature without a change may be picked, which leaves
    the sum as it is, so the distance rises only in a first round in which every feature changes.

    Args:
        source_ND: activations of the prompts.
        target_ND: activations of the counterfactual prompts.
        dictionary: gives the codes f.
        decoder_MD: u, the features' directions.
        k: features that are changed.
    """
    codes_s, codes_t = dictionary.encode(source_ND), dictionary.encode(target_ND)
    change_NM = codes_t - codes_s
    norms_M = decoder_MD.square().sum(1)
    rows = torch.arange(len(source_ND), device=source_ND.device)
    weights_NM = feature_weights(codes_s, decoder_MD)
    edited_ND, removed_N = source_ND.clone(), torch.zeros(len(source_ND), device=source_ND.device)
    for _ in range(min(k, change_NM.shape[1])):
        left_ND = target_ND - edited_ND
        # ||left - δ||² - ||left||²
        gain_NM = change_NM.square() * norms_M - 2 * change_NM * (left_ND @ decoder_MD.T)
        best_N = gain_NM.argmin(1)
        picked_N = change_NM[rows, best_N]
        edited_ND += picked_N[:, None] * decoder_MD[best_N]
        removed_N += weights_NM[rows, best_N] * (picked_N != 0)
        change_NM[rows, best_N] = 0
    return edited_ND, removed_N


def guided_edit(
    source_ND: Tensor,
    target_ND: Tensor,
    dictionary: Dictionary,
    decoder_MD: Tensor,
    k: int,
    f1_VM: Tensor,
    before_N: Tensor,
    after_N: Tensor,
) -> Tensor:
    """Return activations [N, D] without the k active features of highest F1 for the source's value, with the target's.

    Args:
        source_ND: activations of the prompts.
        target_ND: activations of the counterfactual prompts.
        dictionary: gives the codes.
        decoder_MD: the features' directions.
        k: features that are removed, and that are added.
        f1_VM: F1 of each feature for each value of the attribute; -inf for dead ones.
        before_N: the source's values.
        after_N: the target's values.
    """
    edited_ND = source_ND.clone()
    for x_ND, value_N, sign in ((source_ND, before_N, -1.0), (target_ND, after_N, 1.0)):
        codes_NM = dictionary.encode(x_ND)
        score_NM = f1_VM[value_N].masked_fill(codes_NM == 0, -torch.inf)
        best_NK = score_NM.topk(min(k, score_NM.shape[1]), dim=1).indices
        kept_NM = torch.zeros_like(codes_NM).scatter_(1, best_NK, codes_NM.gather(1, best_NK))
        edited_ND += sign * kept_NM @ decoder_MD
    return edited_ND
