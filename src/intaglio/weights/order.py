"""The k-th smallest of many numbers, and the largest of them.

Dimension letters: N numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def kth_smallest(flat_N: Tensor, k: int) -> Tensor:
    """The k-th smallest value, found by selection, not by sorting.

    Args:
        flat_N: values without NaN; put into another order on the way.
        k: 1 to N.
    """
    if flat_N.device.type == "cpu" and flat_N.dtype in (torch.float32, torch.float64):
        # numpy's selection takes a third of the time of torch's on a CPU, and keeps no indices.
        flat_N.numpy().partition(k - 1)
        return flat_N[k - 1].clone()
    return flat_N.kthvalue(k).values


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
