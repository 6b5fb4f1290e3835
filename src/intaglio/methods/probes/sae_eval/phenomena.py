"""Two ways in which sparse dictionaries miss a simple description: occlusion and over-splitting.

Occlusion: of two attributes at one site a dictionary learns the larger and misses the smaller; its features return as
the larger is shrunk. Over-splitting: many random features have a lower loss than the few that generated the data.

Dimension letters: N activations, D width, M latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from intaglio.dictionaries.sparse_autoencoder import SparseAutoencoder
from intaglio.methods.probes.sae_eval.interpretability import meanings
from intaglio.methods.probes.sae_eval.supervised import SupervisedDictionary

Properties = Mapping[str, Mapping[str, Tensor]]


def occlusion(
    x_ND: Tensor,
    attributes: Mapping[str, Tensor],
    properties: Properties,
    codes: SupervisedDictionary,
    method: SparseAutoencoder,
    shrunk: str = "io",
    shares: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    seed: int = 0,
) -> dict[float, dict[str, int]]:
    """Return the number of interpretable features of each kind, for a - α u of one attribute, by α.

    Args:
        x_ND: activations.
        attributes: int64 [N] each.
        properties: see `meanings`.
        codes: supervised codes u of the activations.
        method: dictionary that is trained on the shrunk activations.
        shrunk: attribute whose code is shrunk. Default `io`.
        shares: α. Default 0 to 1 in quarters.
        seed: of the trainings. Default 0.
    """
    counts = {}
    for share in shares:
        less_ND = x_ND - share * codes.codes[shrunk][attributes[shrunk].to(x_ND.device)]
        dictionary = method.model_copy().fit_activations(less_ND, seed=seed).dictionary()
        counts[float(share)] = meanings(dictionary.encode(less_ND) != 0, properties).counts()
    return counts


@dataclass(frozen=True)
class MixtureLoss:
    """Loss ||x - x̂||² + λ |f| of a dictionary on the mixture, and its two parts."""

    error: float
    penalty: float

    @property
    def total(self) -> float:
        """The sum of both parts."""
        return self.error + self.penalty


def mixture_losses(
    features: int, width: int = 10, distance: float = 3.0, l1: float = 0.1, samples: int = 4000, seed: int = 0
) -> tuple[MixtureLoss, MixtureLoss]:
    """Return the losses of the two ideal features and of random ones on a mixture of two Gaussians N(±μ, I).

    An input has one active feature, the one of the highest projection: the ideal features are ±μ / ||μ||, the random
    ones the directions of draws from the mixture itself.

    Args:
        features: number of random features.
        width: D. Default 10.
        distance: ||μ||. Default 3.
        l1: λ. Default 0.1.
        samples: inputs. Default 4,000.
        seed: of the draws. Default 0.
    """
    draws = torch.Generator().manual_seed(seed)
    centre_D = F.normalize(torch.randn(width, generator=draws), dim=0) * distance

    def mixture(count: int) -> Tensor:
        signs_N = torch.randint(0, 2, (count, 1), generator=draws) * 2.0 - 1
        return signs_N * centre_D + torch.randn(count, width, generator=draws)

    x_ND, random_MD = mixture(samples), F.normalize(mixture(features), dim=1)
    ideal_MD = F.normalize(torch.stack([centre_D, -centre_D]), dim=1)
    losses = []
    for rows_MD in (ideal_MD, random_MD):
        codes_N, best_N = (x_ND @ rows_MD.T).clamp_min(0).max(1)
        error = (x_ND - codes_N[:, None] * rows_MD[best_N]).square().sum(1).mean()
        losses.append(MixtureLoss(float(error), l1 * float(codes_N.mean())))
    return losses[0], losses[1]
