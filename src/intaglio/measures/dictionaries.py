"""Measures of dictionaries: reconstruction, sparsity, and directions recovered.

Dimension letters: N activations, D width, M and R latents, K true directions.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from intaglio.errors import IntaglioError

CHUNK = 4096
"""Activations that are encoded at a time."""


class Reconstruction:
    """Fraction of variance unexplained and mean number of active latents, over batches of activations.

    FVU = Σ ||x - x̂||² / Σ ||x - mean x||²,  L0 = mean number of codes that are not zero.
    """

    def __init__(self) -> None:
        self.count = 0
        self._error = self._active = self._square = 0.0
        self._sum_D: Tensor | None = None
        self._fired_M: Tensor | None = None

    def update(self, x_ND: Tensor, codes_NM: Tensor, reconstructed_ND: Tensor) -> None:
        """Add a batch."""
        x_ND = x_ND.double()
        self.count += len(x_ND)
        self._error += float((x_ND - reconstructed_ND.double()).square().sum())
        self._square += float(x_ND.square().sum())
        self._active += float((codes_NM != 0).sum())
        total_D, fired_M = x_ND.sum(0), (codes_NM != 0).any(0)
        self._sum_D = total_D if self._sum_D is None else self._sum_D + total_D
        self._fired_M = fired_M if self._fired_M is None else self._fired_M | fired_M

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained."""
        assert self._sum_D is not None
        variance = self._square - float(self._sum_D.square().sum()) / self.count
        if variance <= 1e-12 * self._square:
            raise IntaglioError("the activations are all equal, so no share of their variance can be explained")
        return self._error / variance

    @property
    def l0(self) -> float:
        """Mean number of active latents of an activation."""
        return self._active / self.count

    @property
    def fired(self) -> float:
        """Share of latents that were active at least once."""
        assert self._fired_M is not None
        return float(self._fired_M.double().mean())


def reconstruction(dictionary: object, x_ND: Tensor) -> Reconstruction:
    """Return the reconstruction measures of a dictionary on activations."""
    measured = Reconstruction()
    for part_ND in x_ND.split(CHUNK):
        codes_NM = dictionary.encode(part_ND)  # type: ignore[attr-defined]
        measured.update(part_ND, codes_NM, dictionary.decode(codes_NM))  # type: ignore[attr-defined]
    return measured


def max_cosines(x_MD: Tensor, y_RD: Tensor, signed: bool = True) -> Tensor:
    """Return for each row of x the highest cosine to a row of y [M]; rows of zeros have 0.

    Args:
        x_MD: directions.
        y_RD: directions to find them among.
        signed: False takes the absolute value of cosines. Default true.
    """
    cosines_MR = F.normalize(x_MD.float(), dim=-1) @ F.normalize(y_RD.float(), dim=-1).T
    highest: Tensor = (cosines_MR if signed else cosines_MR.abs()).amax(1)
    return highest


def feature_recovery_rate(true_KD: Tensor, decoder_MD: Tensor, threshold: float = 0.9, signed: bool = True) -> float:
    """Return the share of true directions with a latent of a cosine above the threshold."""
    return float((max_cosines(true_KD, decoder_MD, signed) > threshold).double().mean())


def shared_latents(decoders: Iterable[Tensor], threshold: float = 0.9, counted_M: Tensor | None = None) -> float:
    """Return the share of the first decoder's latents that every other one has, with a cosine above the threshold.

    Args:
        decoders: rows [M, D] of each dictionary.
        threshold: of the cosine. Default 0.9.
        counted_M: bool, latents of the first one that count, such as those of `strongest`. Default None: all.
    """
    first_MD, *others = decoders
    common_M = torch.ones(len(first_MD), dtype=torch.bool, device=first_MD.device)
    for other_MD in others:
        common_M &= max_cosines(first_MD, other_MD) > threshold
    return float((common_M if counted_M is None else common_M[counted_M]).double().mean())


def strongest(activation_M: Tensor, share: float) -> Tensor:
    """Return which latents [M] are among the share, at least one, with the highest activations."""
    highest = activation_M.topk(max(1, round(share * len(activation_M)))).indices
    return torch.zeros_like(activation_M, dtype=torch.bool).index_fill_(0, highest, True)
