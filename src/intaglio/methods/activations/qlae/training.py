"""Training of quantized autoencoders and of QLInfoWGAN-GP: losses, parameter groups, loops.

Dimension letters: B rows, Z inputs of a latent space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.methods.activations.qlae.latents import Latent, Latents, commitment_loss, quantization_loss
from intaglio.methods.base import Progress, no_progress
from intaglio.trainer.rng import generator

REPORT_EVERY = 100
Losses = dict[str, Tensor]


class Autoencoder(nn.Module):
    """Encoder, latent space and decoder.

    Args:
        encoder: images to inputs of the latent space and features.
        latent: the latent space.
        decoder: latents to logits of images.

    Attributes:
        losses: last losses of the training, by name.
    """

    def __init__(self, encoder: nn.Module, latent: Latent, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.latent, self.decoder = encoder, latent, decoder
        self.losses: dict[str, float] = {}

    def forward(self, images: Tensor) -> tuple[Latents, Tensor]:
        """Return the latents of images, and the logits of their reconstructions."""
        latents: Latents = self.latent(self.encoder(images)[0])
        return latents, self.decoder(latents.hat)

    @torch.no_grad()
    def encode(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """Return the codes of images: indices of values [B, Z], or continuous latents."""
        self.eval()
        return torch.cat([self.latent(self.encoder(part)[0]).codes for part in images.split(batch_size)])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images, 0 to 1, of decoder inputs (codebook values)."""
        self.eval()
        images: Tensor = self.decoder(latents).sigmoid()
        return images


def qlae_loss(
    model: Autoencoder, images: Tensor, quantization_weight: float = 0.01, commitment_weight: float = 0.01
) -> Losses:
    """Return `total` = BCE + quantization and commitment losses by their weights, and the parts.

    BCE is a mean over pixels and channels; images are 0 to 1.
    """
    latents, logits = model(images)
    parts = {
        "reconstruction": F.binary_cross_entropy_with_logits(logits, images),
        "quantization": quantization_loss(latents),
        "commitment": commitment_loss(latents),
    }
    weighted = quantization_weight * parts["quantization"] + commitment_weight * parts["commitment"]
    return {"total": parts["reconstruction"] + weighted, **parts}


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the weights with decoupled decay, and biases and codebooks (modules named `latent`) without any."""
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in model.named_parameters():
        plain = name.endswith("bias") or "latent" in name.split(".")
        if parameter.requires_grad:
            groups[plain].append(parameter)
    return [{"params": groups[0], "weight_decay": weight_decay}, {"params": groups[1], "weight_decay": 0.0}]


class DecayedAdam:
    """AdamW on `param_groups`, whose decayed gradients are clipped element by element, as optax's `clip` does."""

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float,
        weight_decay: float,
        clip: float,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        groups = param_groups(model, weight_decay)
        self.clipped, self.clip = groups[0]["params"], clip
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=betas)

    def step(self, loss: Tensor) -> None:
        """Take a step on a loss."""
        self.optimizer.zero_grad()
        loss.backward()
        if self.clip:
            for parameter in self.clipped:
                if parameter.grad is not None:
                    parameter.grad.clamp_(-self.clip, self.clip)
        self.optimizer.step()


def batches(images: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yield endless batches, shuffled anew each epoch; small sets are drawn from several epochs."""
    epoch = 0
    rows = torch.empty(0, dtype=torch.int64)
    while True:
        while len(rows) < batch_size:
            rows = torch.cat([rows, torch.randperm(len(images), generator=generator(seed, "images", epoch))])
            epoch += 1
        yield images[rows[:batch_size]]
        rows = rows[batch_size:]


def train_autoencoder(
    model: Autoencoder,
    images: Tensor,
    loss: Callable[[Autoencoder, Tensor], Losses],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    clip: float,
    seed: int = 0,
    progress: Progress = no_progress,
) -> dict[str, float]:
    """Minimise a loss of images, and return the means of its parts over the last steps."""
    optimizer, drawn = DecayedAdam(model.train(), learning_rate, weight_decay, clip), batches(images, batch_size, seed)
    totals: dict[str, float] = {}
    first = max(0, steps - REPORT_EVERY)
    for step in range(steps):
        parts = loss(model, next(drawn))
        optimizer.step(parts["total"])
        if step >= first:
            for name, value in parts.items():
                totals[name] = totals.get(name, 0.0) + float(value.detach()) / (steps - first)
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == steps:
            progress(step + 1, steps, "qlae: training")
    return totals


def gradient_penalty(value: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, mix_B: Tensor) -> Tensor:
    """Return mean (|gradient of the value at mixed images| - 1)²."""
    mix = mix_B.view(-1, *[1] * (real.ndim - 1))
    mixed = (mix * real + (1 - mix) * fake).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(value(mixed).sum(), mixed, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def train_info_gan(
    model: Autoencoder,
    images: Tensor,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    clip: float,
    latent_weight: float,
    gradient_weight: float,
    quantization_weight: float,
    commitment_weight: float,
    generator_period: int,
    seed: int = 0,
    progress: Progress = no_progress,
) -> dict[str, float]:
    """Train a generator and a critic that recovers its latents (QLInfoWGAN-GP), and return the last losses.

        critic:     D(fake) - D(real) + penalty + latent loss + quantization and commitment losses
        generator:  -D(fake) + latent loss + quantization and commitment losses

    The model's encoder is a `Critic`; its codebooks are trained with the generator, every `generator_period` steps of
    the critic.
    """
    model.train()
    draws, drawn = generator(seed, "latents"), batches(images, batch_size, seed)
    given: dict[str, Any] = {"weight_decay": weight_decay, "clip": clip, "betas": (0.0, 0.9)}
    critic = DecayedAdam(model.encoder, learning_rate, **given)
    made = nn.ModuleDict({"decoder": model.decoder, "latent": model.latent})
    generate = DecayedAdam(made, learning_rate, **given)

    def recovered(fake: Tensor, sampled: Tensor) -> tuple[Tensor, Losses]:
        x_BZ, value_B = model.encoder(fake)
        latents: Latents = model.latent(x_BZ)
        parts = {
            "latent": (latents.hat - sampled).square().mean(),
            "quantization": quantization_loss(latents),
            "commitment": commitment_loss(latents),
        }
        weights = (latent_weight, quantization_weight, commitment_weight)
        total = sum(weight * part for weight, part in zip(weights, parts.values(), strict=True))
        return value_B, {"total": torch.as_tensor(total), **parts}

    last: dict[str, float] = {}
    for step in range(steps):
        real = next(drawn)
        sampled = model.latent.sample(len(real), draws).to(real.device)
        fake = model.decoder(sampled).sigmoid()
        value_B, parts = recovered(fake.detach(), sampled.detach())
        mix_B = torch.rand(len(real), generator=draws).to(real.device)
        penalty = gradient_penalty(lambda x: model.encoder(x)[1], real, fake.detach(), mix_B)
        wasserstein = value_B.mean() - model.encoder(real)[1].mean()
        critic.step(wasserstein + gradient_weight * penalty + parts["total"])
        last |= {"wasserstein": float(-wasserstein.detach()), "penalty": float(penalty.detach())}
        if (step + 1) % generator_period == 0:
            sampled = model.latent.sample(len(real), draws).to(real.device)
            value_B, parts = recovered(model.decoder(sampled).sigmoid(), sampled)
            generate.step(parts["total"] - value_B.mean())
            last |= {name: float(part.detach()) for name, part in parts.items() if name != "total"}
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == steps:
            progress(step + 1, steps, "qlae: training")
    return last
