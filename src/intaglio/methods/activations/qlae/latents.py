"""Latent spaces: a scalar codebook for each latent, one shared by all, vectors, and none.

Dimension letters: B rows, Z latents, V values of a codebook, E width of a latent's vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

LatentName = Literal["scalar", "global", "vector", "continuous"]


@dataclass(frozen=True)
class Latents:
    """Latents of a batch, [B, Z E].

    Args:
        continuous: the encoder's output x.
        quantized: the nearest codebook values q, with gradients to the codebook alone; equal to x where continuous.
        hat: q with the gradient of x (straight-through), the decoder's input.
        indices: of the values, int64 [B, Z]; None where continuous.
    """

    continuous: Tensor
    quantized: Tensor
    hat: Tensor
    indices: Tensor | None

    @property
    def codes(self) -> Tensor:
        """The latents as metrics read them: indices, or continuous values."""
        return self.continuous if self.indices is None else self.indices


def straight_through(continuous: Tensor, quantized: Tensor) -> Tensor:
    """Return exactly `quantized`, with the gradient of `continuous`."""
    return quantized.detach() + (continuous - continuous.detach())


def quantization_loss(latents: Latents) -> Tensor:
    """Return mean (stopgrad(x) - q)², which moves the codebooks to the encoder's outputs."""
    return (latents.continuous.detach() - latents.quantized).square().mean()


def commitment_loss(latents: Latents) -> Tensor:
    """Return mean (x - stopgrad(q))², which moves the encoder's outputs to the codebooks."""
    return (latents.continuous - latents.quantized.detach()).square().mean()


class Latent(nn.Module):
    """Base of latent spaces: `inputs` numbers of the encoder are Z latents of width E."""

    num_latents: int
    inputs: int

    def forward(self, x_BZ: Tensor) -> Latents:
        """Return the latents of the encoder's outputs."""
        raise NotImplementedError

    def sample(self, rows: int, generator: torch.Generator) -> Tensor:
        """Return decoder inputs of random latents, each value equally likely [rows, Z E]."""
        raise NotImplementedError


class Continuous(Latent):
    """Latents as the encoder gives them; draws are standard normal."""

    def __init__(self, num_latents: int) -> None:
        super().__init__()
        self.num_latents = self.inputs = num_latents

    def forward(self, x_BZ: Tensor) -> Latents:
        """Return the encoder's outputs."""
        return Latents(x_BZ, x_BZ, x_BZ, None)

    def sample(self, rows: int, generator: torch.Generator) -> Tensor:
        """Return normal latents."""
        return torch.randn(rows, self.num_latents, generator=generator)


class ScalarQuantizer(Latent):
    """A codebook of scalars for each latent (Hsu et al. 2023, section 3).

        idx_j = argmin_k |x_j - v_{j,k}|,   q_j = v_{j, idx_j},   hat_j = x_j + stopgrad(q_j - x_j)

    Args:
        num_latents: Z.
        num_values: V, or one for each latent.
        init: first and last value of a new codebook, evenly spaced. Default (-0.5, 0.5).
        learn: whether the values are trained. Default True.
        shared: whether all latents share one codebook (the paper's global codebook). Default False.
    """

    absent: Tensor

    def __init__(
        self,
        num_latents: int,
        num_values: int | Sequence[int] = 10,
        init: tuple[float, float] = (-0.5, 0.5),
        learn: bool = True,
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.num_latents = self.inputs = num_latents
        counts = [num_values] * (1 if shared else num_latents) if isinstance(num_values, int) else list(num_values)
        most = max(counts)
        values_CV = torch.zeros(len(counts), most)
        for row, count in zip(values_CV, counts, strict=True):
            row[:count] = torch.linspace(*init, count)
        self.values = nn.Parameter(values_CV, requires_grad=learn)
        self.register_buffer("absent", torch.arange(most) >= torch.tensor(counts)[:, None], persistent=False)

    def forward(self, x_BZ: Tensor) -> Latents:
        """Return the nearest values; of equally near ones the first."""
        distance_BZV = (x_BZ.detach()[..., None] - self.values.detach()).abs().masked_fill(self.absent, torch.inf)
        index_BZ = distance_BZV.argmin(-1)
        quantized_BZ = self.read(index_BZ)
        return Latents(x_BZ, quantized_BZ, straight_through(x_BZ, quantized_BZ), index_BZ)

    def read(self, index_BZ: Tensor) -> Tensor:
        """Return the values of indices [B, Z]."""
        return self.values.expand(self.num_latents, -1).gather(1, index_BZ.T).T

    def sample(self, rows: int, generator: torch.Generator) -> Tensor:
        """Return values of each codebook, drawn uniformly."""
        counts_Z = (~self.absent).sum(1).expand(self.num_latents)
        uniform_BZ = torch.rand(rows, self.num_latents, generator=generator).to(counts_Z.device)
        return self.read((uniform_BZ * counts_Z).long())


class VectorQuantizer(Latent):
    """A codebook of vectors that all latents share, as in VQ-VAE; the official ablation.

    Args:
        num_latents: Z.
        num_values: vectors V.
        width: E.
        generator: of the initial vectors, uniform in ±sqrt(3 / E).
    """

    def __init__(self, num_latents: int, num_values: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.num_latents, self.inputs, self.width = num_latents, num_latents * width, width
        limit = (3 / width) ** 0.5
        self.values = nn.Parameter(limit * (2 * torch.rand(num_values, width, generator=generator) - 1))

    def forward(self, x_BZ: Tensor) -> Latents:
        """Return the nearest vectors."""
        x_BZE = x_BZ.unflatten(1, (self.num_latents, self.width))
        index_BZ = (x_BZE.detach()[:, :, None] - self.values.detach()).square().sum(-1).argmin(-1)
        quantized_BZ = self.values[index_BZ].flatten(1)
        return Latents(x_BZ, quantized_BZ, straight_through(x_BZ, quantized_BZ), index_BZ)

    def sample(self, rows: int, generator: torch.Generator) -> Tensor:
        """Return random vectors of the codebook."""
        shape = rows, self.num_latents
        index_BZ = torch.randint(len(self.values), shape, generator=generator).to(self.values.device)
        return self.values[index_BZ].flatten(1)
