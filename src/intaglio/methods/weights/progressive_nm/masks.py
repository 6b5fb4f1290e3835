"""N:M masks by magnitude, or masks of a share of a whole tensor; recomputed in every pass.

Dimension letters: G groups, M weights of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from intaglio.methods.weights.sparsity_target import lowest_k_mask, lowest_of_groups, pruned_count
from intaglio.methods.weights.topk import keep_largest

Amount = float | tuple[int, int]
"""A share of zeros of the whole tensor, or (N, M)."""

RANKED = 16
"""Largest group that is ranked by comparing its members; larger ones are sorted."""


def keep_mask(weight: Tensor, amount: Amount, axis: int = 1) -> Tensor:
    """Return the mask of the largest |w| of each group, bool in the weight's shape, True = kept.

    As in the pruning steps, the first of equal magnitudes are pruned. Only the order of the magnitudes matters, neither
    scale nor signs.

    Args:
        weight: of any shape with two dimensions or more.
        amount: (N, M), where M divides the size along `axis`, or a share of zeros of the tensor as a whole.
        axis: the dimension along which groups run. Default 1: the inputs of a linear layer or of a convolution.
    """
    score = weight.detach().abs().movedim(axis, -1)
    if isinstance(amount, tuple):
        kept = _of_groups(score.reshape(-1, amount[1]), amount[0])
    else:
        count = pruned_count(score.numel(), amount)
        if _can_read_back(score):
            (kept,) = keep_largest([score.contiguous()], count)
        else:
            kept = ~lowest_k_mask(score.reshape(1, -1), count)
    return kept.reshape(score.shape).movedim(-1, axis)


def _of_groups(score_GM: Tensor, keep: int) -> Tensor:
    """Return True at the `keep` largest of each group; among equal magnitudes the last are kept."""
    of = score_GM.shape[1]
    if keep >= of:
        return torch.ones_like(score_GM, dtype=torch.bool)
    least_G1 = _least_kept(score_GM, keep)
    if least_G1 is not None:
        kept_GM = score_GM >= least_G1
        if int(kept_GM.count_nonzero()) != keep * len(score_GM):  # some magnitudes tie, or are NaN
            odd_G = kept_GM.view(torch.int8).sum(1, dtype=torch.int32) != keep
            kept_GM[odd_G] = _by_rank(score_GM[odd_G], keep)
        return kept_GM
    return _by_rank(score_GM, keep)


def _by_rank(score_GM: Tensor, keep: int) -> Tensor:
    """Return the same for any pattern."""
    of = score_GM.shape[1]
    if of > RANKED:
        return ~lowest_of_groups(score_GM, keep, of)
    # One row for each position in the group, to compare whole rows at a time.
    score_MG = score_GM.t().contiguous()
    if keep == 1:
        index_M1 = torch.arange(of, dtype=torch.int8, device=score_GM.device)[:, None]
        last_G = torch.where(score_MG == score_MG.amax(0), index_M1, -1).amax(0)
        return (index_M1 == last_G).t()
    before_MG = torch.zeros_like(score_MG, dtype=torch.int8)  # how many would be pruned earlier
    for index in range(of - 1):
        later = score_MG[index] <= score_MG[index + 1 :]
        before_MG[index + 1 :] += later
        before_MG[index] += (~later).sum(0, dtype=torch.int8)
    return (before_MG >= of - keep).t()


def _can_read_back(score: Tensor) -> bool:
    """Return whether reading a value back is cheap: on a GPU it waits, in a compiled graph it breaks the graph."""
    return score.device.type == "cpu" and not torch.compiler.is_compiling()


def _least_kept(score_GM: Tensor, keep: int) -> Tensor | None:
    """Return the least kept magnitude of each group, [G, 1], where it is cheaper than ranks; None elsewhere."""
    if not _can_read_back(score_GM):
        return None
    if keep == 1:
        return score_GM.amax(1, keepdim=True)
    if score_GM.shape[1] == 4 and keep == 2:
        a_G, b_G, c_G, d_G = score_GM.unbind(1)
        # The second of four is the lesser of both pairs' winners, or the greater of their losers.
        winners_G = torch.minimum(torch.maximum(a_G, b_G), torch.maximum(c_G, d_G))
        losers_G = torch.maximum(torch.minimum(a_G, b_G), torch.minimum(c_G, d_G))
        return torch.maximum(winners_G, losers_G)[:, None]
    return None
