"""Pure functions of BT2: the pseudo old classifier, orthogonal Procrustes, and the losses beside the task's.

Dimension letters: N texts, H inputs of the head, M old dimensions, D new dimensions, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pseudo_classifier(old_NM: Tensor, labels_N: Tensor, classes: int) -> Tensor:
    """Return A, [K, M]: row k is the mean of the old vectors of class k, not renormalised; 0 for an empty class."""
    sums_KM = old_NM.new_zeros(classes, old_NM.shape[1]).index_add_(0, labels_N, old_NM)
    return sums_KM / torch.bincount(labels_N, minlength=classes).clamp(min=1)[:, None]


def procrustes(inputs_NH: Tensor, old_NM: Tensor) -> Tensor:
    """Return the rotation [H, max(H, M)] whose first M outputs are nearest to the old vectors.

    Of two widths the smaller side is padded with zeros, so that inner products of inputs are kept in any case.
    """
    from scipy.linalg import orthogonal_procrustes

    width = max(inputs_NH.shape[1], old_NM.shape[1])
    padded = [F.pad(x.double(), (0, width - x.shape[1])).numpy() for x in (inputs_NH, old_NM)]
    rotation, _ = orthogonal_procrustes(*padded)
    return torch.from_numpy(rotation)[: inputs_NH.shape[1]].float().contiguous()


def cosine_loss(vectors_ND: Tensor, target_ND: Tensor) -> Tensor:
    """Return 1 minus the mean cosine."""
    return 1 - F.cosine_similarity(vectors_ND.float(), target_ND.float(), dim=-1).mean()
