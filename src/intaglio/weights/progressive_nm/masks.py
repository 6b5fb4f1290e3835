"""Which weights are kept: N of every M by magnitude, or a share of a whole tensor; taken anew in every pass.

Dimension letters: G groups, M weights of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from intaglio.weights.amount import lowest, lowest_of_groups, pruned_count

Amount = float | tuple[int, int]
"""A share of zeros of the whole tensor, or (N, M)."""

RANKED = 16
"""Groups of up to so many weights are ranked by comparing their members; a sort is faster for larger ones."""


def keep_mask(weight: Tensor, amount: Amount, axis: int = 1) -> Tensor:
    """True at the weights that are kept, bool in the weight's shape: the largest |w| of each group.

    The same choice as the pruning steps make: among equal magnitudes the first are pruned. It depends on nothing but
    the order of the magnitudes, so neither on scale nor on signs.

    Args:
        weight: of any shape with two dimensions or more.
        amount: (N, M), where M divides the size along `axis`, or a share of zeros of the tensor as a whole.
        axis: the dimension along which groups run. Default 1: the inputs of a linear layer or of a convolution.
    """
    score = weight.detach().abs().movedim(axis, -1)
    if isinstance(amount, tuple):
        kept = _of_groups(score.reshape(-1, amount[1]), amount[0])
    else:
        flat = score.reshape(1, -1)
        kept = ~lowest(flat, pruned_count(flat.shape[1], amount))
    return kept.reshape(score.shape).movedim(-1, axis)


def _of_groups(score_GM: Tensor, keep: int) -> Tensor:
    """True at the `keep` largest of each group; among equal ones the last are kept."""
    of = score_GM.shape[1]
    if keep >= of:
        return torch.ones_like(score_GM, dtype=torch.bool)
    if of > RANKED:
        return ~lowest_of_groups(score_GM, keep, of)
    # One row a place in the group: whole rows are compared at a time.
    score_MG = score_GM.t().contiguous()
    if keep == 1:
        place_M1 = torch.arange(of, dtype=torch.int8, device=score_GM.device)[:, None]
        last_G = torch.where(score_MG == score_MG.amax(0), place_M1, -1).amax(0)
        return (place_M1 == last_G).t()
    before_MG = torch.zeros_like(score_MG, dtype=torch.int8)  # how many would be pruned earlier
    for place in range(of - 1):
        later = score_MG[place] <= score_MG[place + 1 :]
        before_MG[place + 1 :] += later
        before_MG[place] += (~later).sum(0, dtype=torch.int8)
    return (before_MG >= of - keep).t()
