"""Thresholds from calibration text: some of the tokens that enter a projection, and the quantiles of their scores.

Dimension letters: N tokens, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from intaglio.errors import IntaglioError
from intaglio.methods.activations.r_sparse.linear import ALL, NONE
from intaglio.methods.activations.r_sparse.sizes import floor_share


class Sample:
    """Tokens that enter a linear, evenly spaced over the calibration data; a statistic of `intaglio.checkpoint.calibration`.

    Args:
        total: tokens of the data.
        wanted: tokens that are kept, or all where there are fewer.
    """

    def __init__(self, total: int, wanted: int) -> None:
        self.total, self.wanted = total, min(total, wanted)
        self._seen = 0
        self._parts: list[Tensor] = []

    def update(self, x_NI: Tensor, sequences: int) -> None:
        """Take in one batch.

        Args:
            x_NI: inputs, one row a token.
            sequences: not looked at.
        """
        place_N = torch.arange(self._seen, self._seen + len(x_NI))
        self._seen += len(x_NI)
        # Of wanted / total of the tokens: those at which the count rises.
        chosen_N = (place_N + 1) * self.wanted // self.total > place_N * self.wanted // self.total
        self._parts.append(x_NI[chosen_N.to(x_NI.device)].detach().clone())

    def inputs(self, name: str) -> Tensor:
        """The tokens [N, I].

        Args:
            name: of the projection, for the sentence.

        Raises:
            IntaglioError: a value is NaN or infinite.
        """
        x_NI = torch.cat(self._parts)
        if not bool(torch.isfinite(x_NI).all()):
            raise IntaglioError(
                f"what enters {name} on the calibration text is NaN or infinite, so it has no threshold: the weights "
                "or the data overflow"
            )
        self._parts = [x_NI]
        return x_NI


def scores(x_NI: Tensor, scale_I: Tensor | None) -> Tensor:
    """|x| times the scale, float32 [N, I].

    Args:
        x_NI: inputs.
        scale_I: norms of columns; None: ones.
    """
    size_NI = x_NI.abs().float()
    return size_NI if scale_I is None else size_NI * scale_I


def thresholds(score_NI: Tensor, shares: Sequence[float]) -> list[float]:
    """The thresholds that keep a share of all scores: each the int(n (1 - share))-th smallest of n.

    What is kept is above it; without equal scores that is the share to one in n. Where nothing is below, all is kept.

    Args:
        score_NI: of the calibration tokens.
        shares: that are kept, 0 to 1; 0 keeps nothing, on other text either.
    """
    flat = score_NI.flatten().cpu().numpy()
    counts = [floor_share(len(flat), 1 - share) for share in shares]
    inner = sorted({count - 1 for count, share in zip(counts, shares, strict=True) if count and share})
    ordered = np.partition(flat, inner) if inner else flat
    return [
        NONE if not share else float(ordered[count - 1]) if count else ALL
        for count, share in zip(counts, shares, strict=True)
    ]


__all__ = ["Sample", "scores", "thresholds"]
