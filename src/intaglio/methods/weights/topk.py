"""Fast selection: the k-th smallest of many numbers, and masks of the largest.

Dimension letters: N numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MANY = 1 << 20
"""From this many numbers on, a sample bounds the range to search."""
SAMPLED = 1 << 16


def kth_smallest(flat_N: Tensor, k: int) -> Tensor:
    """Return the k-th smallest value, by selection instead of sorting; may reorder `flat_N`."""
    if flat_N.device.type == "cpu" and flat_N.dtype in (torch.float32, torch.float64):
        # numpy's selection is three times as fast as torch's on a CPU, and keeps no indices.
        return torch.tensor(_select(flat_N.numpy(), k), dtype=flat_N.dtype)
    return flat_N.kthvalue(k).values


def kth_smallest_of_rows(value_RN: Tensor, k: int) -> Tensor:
    """Return the k-th smallest value of each row [R, 1]."""
    if value_RN.device.type != "cpu" or value_RN.dtype not in (torch.float32, torch.float64):
        return value_RN.kthvalue(k, dim=1, keepdim=True).values
    if len(value_RN) == 1:
        return kth_smallest(value_RN.detach().flatten().clone(), k).view(1, 1)
    # Six times as fast as torch's kthvalue.
    return torch.from_numpy(np.partition(value_RN.detach().numpy(), k - 1, axis=1)[:, k - 1 : k].copy())


def _select(flat_N: np.ndarray, k: int) -> float:
    """Select in place; of many numbers only those between two sample quantiles are moved (Floyd and Rivest)."""
    if len(flat_N) >= MANY:
        sample = np.sort(flat_N[:: len(flat_N) // SAMPLED])
        position, margin = k * len(sample) // len(flat_N), 2 * math.isqrt(len(sample))
        least = sample[position - margin] if position >= margin else -np.inf
        most = sample[position + margin] if position + margin < len(sample) else np.inf
        candidates = flat_N[(flat_N >= least) & (flat_N <= most)]
        rank = k - int(np.count_nonzero(flat_N < least))
        if 0 < rank <= len(candidates):  # else the sample is not representative
            flat_N, k = candidates, rank
    flat_N.partition(k - 1)
    return float(flat_N[k - 1])


def keep_largest(parts: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return masks that drop the `count` smallest entries of all parts together; ties drop the first ones."""
    if count <= 0:
        return [torch.ones_like(part, dtype=torch.bool) for part in parts]
    flat_N = torch.cat([part.reshape(-1) for part in parts])
    cut = kth_smallest(flat_N, count)
    del flat_N
    kept = [part > cut for part in parts]
    tied = [part == cut for part in parts]
    # `sum` would make a copy of eight bytes per entry.
    quota = sum(int(mask.count_nonzero()) for mask in (*kept, *tied))
    quota -= sum(part.numel() for part in parts) - count  # tied entries to drop
    for mask, ties in zip(kept, tied, strict=True):
        here = int(ties.count_nonzero())
        if here > quota:
            positions = ties.reshape(-1).nonzero().flatten()[max(0, quota) :]
            mask.view(-1)[positions] = True
        quota -= here
    return kept
