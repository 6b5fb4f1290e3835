"""Design that autoencodes images of known factors and measures InfoMEC on held-out combinations: `Disentangle`.

Settings of an arm: `method`, a `QLAE`; `baseline`, `vae`, `tcvae` or `bio` with its `strength`; everything else is a
field of the method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from intaglio.evidence.baselines.autoencoders import LossFunction, bio_loss, tcvae_loss, vae_loss, with_gaussian
from intaglio.evidence.designs.base import BedDesign, Configured, Settings
from intaglio.evidence.engine.claim import Arm, Cost, Metric, Result, RunKey
from intaglio.evidence.testbeds.cache import digest
from intaglio.evidence.testbeds.sprites import Sprites
from intaglio.measures.infomec import infomec
from intaglio.measures.memory import peak_memory
from intaglio.methods.activations.qlae import QLAE
from intaglio.methods.activations.qlae.training import train_autoencoder

MODULARITY = Metric("InfoM", "share", "higher", continuous=False)
EXPLICITNESS = Metric("InfoE, held out", "share", "higher", continuous=False)
COMPACTNESS = Metric("InfoC", "share", "higher", continuous=False)
ACTIVE = Metric("active latents", "latents", "higher", continuous=False)
RECONSTRUCTION = Metric("reconstruction loss", "nats a pixel")


@dataclass(frozen=True)
class Disentangle(BedDesign):
    """Train an autoencoder on a random half of all combinations; a unit is such a half with a training seed."""

    bed: Sprites = field(default_factory=Sprites)
    steps: int = 4000
    batch_size: int = 64
    MINIATURE: ClassVar[Mapping[str, Any]] = {"steps": 40, "batch_size": 16}

    def run(self, arm: Arm, key: RunKey, settings: Settings) -> Result:
        """Train an arm on a unit and measure it."""
        own, seed = Configured(arm, settings), key.seed
        data, test = self.bed.training(seed), self.bed.held_out(seed, key.split)
        baseline, strength = own.pop("baseline"), own.pop("strength", 1.0)
        method: QLAE = own.pop("method", QLAE())
        method = own.fill(method.model_copy(update={"steps": self.steps, "batch_size": self.batch_size}))
        own.check()
        model = method.make(tuple(data.images.shape[1:]), seed)  # type: ignore[arg-type]
        loss: LossFunction = method.loss
        if baseline in ("vae", "tcvae"):
            model = with_gaussian(model, method.num_latents, seed)
            loss = vae_loss(strength) if baseline == "vae" else tcvae_loss(strength, len(data.images))
        elif baseline == "bio":
            loss = bio_loss(activity=strength)
        names = ("steps", "batch_size", "learning_rate", "weight_decay", "clip")
        with peak_memory(torch.device("cpu")) as spent:
            given: dict[str, Any] = {name: getattr(method, name) for name in names}
            train_autoencoder(model, data.images, loss, seed=seed, **given)
        discrete = baseline is None and method.latent != "continuous"
        codes, seen = (model.encode(images).numpy() for images in (test.images, data.images))
        scores = infomec(test.sources, codes, discrete=discrete)
        fitted = infomec(data.sources, seen, discrete=discrete, held_out=(test.sources, codes))
        with torch.no_grad():
            reconstruction = F.binary_cross_entropy_with_logits(model(test.images)[1], test.images)
        values = {
            MODULARITY.name: scores.infom,
            EXPLICITNESS.name: fitted.infoe_held_out,
            COMPACTNESS.name: scores.infoc,
            ACTIVE.name: float(scores.active.sum()),
            RECONSTRUCTION.name: float(reconstruction),
        }
        parameters = sum(p.numel() for p in model.parameters())
        cost = Cost(self.steps * self.batch_size, 0.0, parameters, spent.seconds, spent.bytes)
        parity = {"training": digest(data.sources.tolist()), "test": digest(test.sources.tolist())}
        return Result(values, cost, parity)
