"""Baselines of the evaluation: principal components. (Random directions are a dictionary with a frozen decoder.)

Dimension letters: N activations, D width, C components.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from intaglio.errors import IntaglioError


@dataclass(frozen=True, eq=False)
class Components:
    """Signed halves of principal components: codes [N, 2C] are not negative, as those of a dictionary."""

    mean_D: Tensor
    decoder_MD: Tensor

    def encode(self, x_ND: Tensor) -> Tensor:
        """Return the positive parts of the projections on each component and on its opposite."""
        return torch.relu((x_ND.float() - self.mean_D) @ self.decoder_MD.T)

    def decode(self, codes_NM: Tensor) -> Tensor:
        """Return the reconstructions."""
        return codes_NM @ self.decoder_MD + self.mean_D


def principal_components(x_ND: Tensor, count: int) -> Components:
    """Return the first components of activations.

    Raises:
        IntaglioError: more components than features or activations.
    """
    if count > min(x_ND.shape):
        raise IntaglioError(f"components is {count}; {len(x_ND)} activations of width {x_ND.shape[1]} have fewer")
    mean_D = x_ND.double().mean(0)
    _, _, rows_DD = torch.linalg.svd(x_ND.double() - mean_D, full_matrices=False)
    axes_CD = rows_DD[:count].float()
    return Components(mean_D.float(), torch.cat([axes_CD, -axes_CD]))
