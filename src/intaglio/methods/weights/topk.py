"""The k-th smallest of many numbers, and the largest of them.

Dimension letters: N numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MANY = 1 << 20
"""From so many numbers on a sample says between which bounds to look."""
SAMPLED = 1 << 16


def kth_smallest(flat_N: Tensor, k: int) -> Tensor:
    """The k-th smallest value, found by selection, not by sorting.

    Args:
        flat_N: values without NaN; put into another order on the way.
        k: 1 to N.
    """
    if flat_N.device.type == "cpu" and flat_N.dtype in (torch.float32, torch.float64):
        # numpy's selection takes a third of the time of torch's on a CPU, and keeps no indices.
        return torch.tensor(_selected(flat_N.numpy(), k), dtype=flat_N.dtype)
    return flat_N.kthvalue(k).values


def _selected(flat_N: np.ndarray, k: int) -> float:
    """The same in place; of many numbers those alone are moved that lie between two of a sample (Floyd and Rivest)."""
    if len(flat_N) >= MANY:
        sample = np.sort(flat_N[:: len(flat_N) // SAMPLED])
        place, room = k * len(sample) // len(flat_N), 2 * math.isqrt(len(sample))
        least = sample[place - room] if place >= room else -np.inf
        most = sample[place + room] if place + room < len(sample) else np.inf
        among = flat_N[(flat_N >= least) & (flat_N <= most)]
        rank = k - int(np.count_nonzero(flat_N < least))
        if 0 < rank <= len(among):  # else the sample does not look like the whole
            flat_N, k = among, rank
    flat_N.partition(k - 1)
    return float(flat_N[k - 1])


def keep_largest(parts: Sequence[Tensor], count: int) -> list[Tensor]:
    """True at all entries but the `count` smallest of all parts together; among equal values the first go first.

    Args:
        parts: magnitudes of any shapes, contiguous, without NaN.
        count: how many to leave out, fewer than there are entries.
    """
    if count <= 0:
        return [torch.ones_like(part, dtype=torch.bool) for part in parts]
    flat_N = torch.cat([part.reshape(-1) for part in parts])
    cut = kth_smallest(flat_N, count)
    del flat_N
    kept = [part > cut for part in parts]
    tied = [part == cut for part in parts]
    # `sum` would make a copy of eight bytes an entry.
    spare = sum(int(mask.count_nonzero()) for mask in (*kept, *tied))
    spare -= sum(part.numel() for part in parts) - count  # tied entries that go
    for mask, ties in zip(kept, tied, strict=True):
        here = int(ties.count_nonzero())
        if here > spare:
            places = ties.reshape(-1).nonzero().flatten()[max(0, spare) :]
            mask.view(-1)[places] = True
        spare -= here
    return kept
