"""Baselines of quantized autoencoders, with the official losses: beta-VAE, beta-TCVAE, BioAE.

Dimension letters: B rows, Z latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.methods.activations.qlae.latents import Latent, Latents
from intaglio.methods.activations.qlae.training import Autoencoder, Losses
from intaglio.trainer.rng import generator

LossFunction = Callable[[Autoencoder, Tensor], Losses]


class Gaussian(Latent):
    """Gaussian posterior: the encoder gives means and, through softplus, standard deviations; codes are the means."""

    def __init__(self, num_latents: int, seed: int = 0) -> None:
        super().__init__()
        self.num_latents, self.inputs = num_latents, 2 * num_latents
        self.generator = generator(seed, "gaussian")

    def split(self, x_BZ: Tensor) -> tuple[Tensor, Tensor]:
        """Return means and standard deviations."""
        mean_BZ, raw_BZ = x_BZ.chunk(2, dim=1)
        return mean_BZ, F.softplus(raw_BZ)

    def forward(self, x_BZ: Tensor) -> Latents:
        """Return means as codes, and draws (means while evaluating) as inputs of the decoder."""
        mean_BZ, deviation_BZ = self.split(x_BZ)
        hat_BZ = mean_BZ
        if self.training:
            hat_BZ = mean_BZ + deviation_BZ * torch.randn(mean_BZ.shape, generator=self.generator)
        return Latents(mean_BZ, mean_BZ, hat_BZ, None)


def with_gaussian(model: Autoencoder, num_latents: int, seed: int) -> Autoencoder:
    """Return a model with Gaussian latents and twice as many outputs of its encoder."""
    encoder: Any = model.encoder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder.head = nn.Linear(encoder.head.in_features, 2 * num_latents)
    return Autoencoder(encoder, Gaussian(num_latents, seed), model.decoder)


def vae_loss(beta: float) -> LossFunction:
    """Return BCE + beta KL / pixels, as the official code scales it."""

    def loss(model: Autoencoder, images: Tensor) -> Losses:
        mean_BZ, deviation_BZ, _, reconstruction = _gaussian_pass(model, images)
        kl_BZ = 0.5 * (mean_BZ.square() + deviation_BZ.square() - 1) - deviation_BZ.log()
        kl = kl_BZ.sum(1).mean() / images[0].numel()
        return {"total": reconstruction + beta * kl, "reconstruction": reconstruction, "kl": kl}

    return loss


def tcvae_loss(beta: float, examples: int) -> LossFunction:
    """Return BCE + (MI + beta TC + dimension-wise KL) / pixels, by minibatch-weighted sampling of `examples` images."""

    def loss(model: Autoencoder, images: Tensor) -> Losses:
        mean_BZ, deviation_BZ, z_BZ, reconstruction = _gaussian_pass(model, images)
        posterior = torch.distributions.Normal(mean_BZ, deviation_BZ)
        log_own_B = posterior.log_prob(z_BZ).sum(1)
        log_prior_B = torch.distributions.Normal(0.0, 1.0).log_prob(z_BZ).sum(1)
        log_pairs_BBZ = posterior.log_prob(z_BZ[:, None])
        offset = math.log(len(z_BZ) * examples)
        log_joint_B = log_pairs_BBZ.sum(2).logsumexp(1) - offset
        log_product_B = (log_pairs_BBZ.logsumexp(1) - offset).sum(1)
        terms = (log_own_B - log_joint_B) + beta * (log_joint_B - log_product_B) + (log_product_B - log_prior_B)
        penalty = terms.mean() / images[0].numel()
        return {"total": reconstruction + penalty, "reconstruction": reconstruction, "penalty": penalty}

    return loss


def bio_loss(nonnegative: float = 1.0, activity: float = 0.1) -> LossFunction:
    """Return BCE + nonnegative mean(max(-z, 0)) + activity mean(z²)."""

    def loss(model: Autoencoder, images: Tensor) -> Losses:
        latents, logits = model(images)
        z_BZ = latents.continuous
        reconstruction = F.binary_cross_entropy_with_logits(logits, images)
        penalty = nonnegative * (-z_BZ).clamp(min=0).mean() + activity * z_BZ.square().mean()
        return {"total": reconstruction + penalty, "reconstruction": reconstruction, "penalty": penalty}

    return loss


def _gaussian_pass(model: Autoencoder, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return means, deviations, draws and the reconstruction loss."""
    latent: Any = model.latent
    x_BZ = model.encoder(images)[0]
    mean_BZ, deviation_BZ = latent.split(x_BZ)
    z_BZ = latent(x_BZ).hat
    return mean_BZ, deviation_BZ, z_BZ, F.binary_cross_entropy_with_logits(model.decoder(z_BZ), images)
