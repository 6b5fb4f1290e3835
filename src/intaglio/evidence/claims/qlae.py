"""QLAE: modularity of quantized latents, against an autoencoder with its best weight decay."""

from __future__ import annotations

from typing import Any

from intaglio.evidence.designs.disentangle import (
    ACTIVE,
    COMPACTNESS,
    EXPLICITNESS,
    MODULARITY,
    RECONSTRUCTION,
    Disentangle,
)
from intaglio.evidence.engine.claim import Arm, Claim
from intaglio.methods.activations.qlae import QLAE

SIZES: dict[str, Any] = {"network": "dense", "width": 256, "num_latents": 8, "num_values": 8}
QUANTIZED, PLAIN = QLAE(**SIZES), QLAE(**SIZES, latent="continuous")

CLAIM = Claim(
    slug="qlae",
    version=1,
    says="Quantizing each latent to a few values of its own, with high weight decay, makes an autoencoder's latents"
    " more modular on combinations of factors that it has not seen, at equal steps.",
    metric=MODULARITY,
    delta=0.10,
    design=Disentangle(),
    arms={
        "autoencoder": Arm("autoencoder with its best weight decay", {"method": PLAIN}),
        "qlae": Arm("scalar codebooks and weight decay", {"method": QUANTIZED}),
        "no decay": Arm("scalar codebooks without weight decay", {"method": QUANTIZED, "weight_decay": 0.0}),
        "global": Arm("one codebook for all latents", {"method": QUANTIZED, "latent": "global"}),
        "vae": Arm("beta-VAE, beta 4, without weight decay",
                   {"method": PLAIN, "baseline": "vae", "strength": 4.0, "weight_decay": 0.0}),
        "bio": Arm("BioAE", {"method": PLAIN, "baseline": "bio", "strength": 0.1, "weight_decay": 0.0}),
    },
    baseline="autoencoder",
    method="qlae",
    ablations=("no decay", "global"),
    reported=("vae", "bio"),
    looks=(5, 10),
    tune={"weight_decay": (0.1, 0.3, 1.0, 3.0, 10.0), "learning_rate": (1e-3, 3e-3)},
    closed=("learning_rate",),
    unit_names=("half of the combinations and training seed",),
    metrics=(EXPLICITNESS, COMPACTNESS, ACTIVE, RECONSTRUCTION),
    parity="Equal networks, steps and batches; the same half of the combinations is trained on, another quarter is"
    " measured. Ten trials each, judged by InfoM on validation combinations. Continuous latents are measured by"
    " neighbours, not by bins; latents are pruned alike. A run takes longer than 20 seconds, so there are two looks.",
    minutes=60,
    use_when="latents are to hold one factor of variation each, and few values of each are enough",
    otherwise="an autoencoder with tuned weight decay",
    toy={"places": 3},
    golden={"autoencoder": {RECONSTRUCTION.name: 0.141777}, "qlae": {RECONSTRUCTION.name: 0.101425}},
)  # fmt: skip
