"""Thresholds from calibration text: a sample of a projection's inputs, and quantiles of their scores.

Dimension letters: N tokens, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from intaglio.errors import IntaglioError
from intaglio.methods.activations.r_sparse.budget import floor_share
from intaglio.methods.activations.r_sparse.layers import ALL, NONE


class InputSample:
    """Inputs of a linear, evenly spaced over the calibration data; a statistic of `intaglio.checkpoint.calibration`.

    Args:
        total: tokens of the data.
        size: tokens to keep; all where there are fewer.
    """

    def __init__(self, total: int, size: int) -> None:
        self.total, self.size = total, min(total, size)
        self._seen = 0
        self._parts: list[Tensor] = []

    def update(self, x_NI: Tensor, sequences: int) -> None:
        """Take in one batch, a row a token."""
        index_N = torch.arange(self._seen, self._seen + len(x_NI))
        self._seen += len(x_NI)
        # Keep size / total of the tokens: those at which the running count rises.
        chosen_N = (index_N + 1) * self.size // self.total > index_N * self.size // self.total
        self._parts.append(x_NI[chosen_N.to(x_NI.device)].detach().clone())

    def inputs(self, name: str) -> Tensor:
        """Return the sampled inputs [N, I] of a projection.

        Raises:
            IntaglioError: a value is NaN or infinite.
        """
        x_NI = torch.cat(self._parts)
        if not bool(torch.isfinite(x_NI).all()):
            raise IntaglioError(
                f"an input of {name} on the calibration text is NaN or infinite, so it has no threshold: the weights "
                "or the data overflow"
            )
        self._parts = [x_NI]
        return x_NI


def scores(x_NI: Tensor, scale_I: Tensor | None) -> Tensor:
    """Return |x| times the scale (None: ones), float32 [N, I]."""
    size_NI = x_NI.abs().float()
    return size_NI if scale_I is None else size_NI * scale_I


def thresholds(score_NI: Tensor, shares: Sequence[float]) -> list[float]:
    """Return the thresholds that keep a share of all scores: each the int(n (1 - share))-th smallest of n.

    What is kept is above it; without equal scores that is the share to one in n. Where nothing is below, all is kept.

    Args:
        score_NI: of the calibration tokens.
        shares: to keep, 0 to 1; 0 keeps nothing, on other text either.
    """
    flat = score_NI.flatten().cpu().numpy()
    counts = [floor_share(len(flat), 1 - share) for share in shares]
    ranks = sorted({count - 1 for count, share in zip(counts, shares, strict=True) if count and share})
    ordered = np.partition(flat, ranks) if ranks else flat
    return [
        NONE if not share else float(ordered[count - 1]) if count else ALL
        for count, share in zip(counts, shares, strict=True)
    ]
