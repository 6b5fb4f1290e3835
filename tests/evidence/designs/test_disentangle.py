"""Sprites of known factors: the bed, the baselines' losses by hand, arms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from intaglio.evidence.baselines.autoencoders import Gaussian, bio_loss, tcvae_loss, vae_loss, with_gaussian
from intaglio.evidence.designs.disentangle import ACTIVE, MODULARITY, RECONSTRUCTION, Disentangle
from intaglio.evidence.engine.claim import Arm, Result, RunKey
from intaglio.evidence.testbeds.sprites import Sprites
from intaglio.methods.activations.qlae import QLAE, Autoencoder

DESIGN = Disentangle().toy()
SIZES = {"network": "dense", "width": 16, "num_latents": 4, "num_values": 4}
METHOD, PLAIN = QLAE(**SIZES), QLAE(**SIZES, latent="continuous")


def result(**settings: object) -> Result:
    return DESIGN.run(Arm("an arm", settings), RunKey("toy", 0), {})


def test_every_combination_is_another_image_and_sets_are_disjoint() -> None:
    bed = Sprites()
    data, validation, held_out = bed.training(3), bed.held_out(3, "validation"), bed.held_out(3, "evaluation")
    assert [len(part.sources) for part in (data, validation, held_out)] == [384, 192, 192]
    every = torch.cat([data.images, validation.images, held_out.images])
    assert len(every.flatten(1).unique(dim=0)) == 8 * 8 * 3 * 4 == len(every)
    rows = {tuple(row) for part in (data, validation, held_out) for row in part.sources.tolist()}
    assert len(rows) == 768
    assert [len(set(column)) for column in data.sources.T.tolist()] == [8, 8, 3, 4]
    assert 0 <= float(every.min()) < float(every.max()) == 1
    assert not torch.equal(bed.training(4).images, data.images)
    assert torch.equal(bed.held_out(3, "pilot").images, held_out.images)


def gaussian(seed: int = 0) -> Autoencoder:
    return with_gaussian(PLAIN.make((1, 8, 8), seed), 4, seed)


IMAGES = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_losses_of_the_baselines_by_hand() -> None:
    model = gaussian().eval()  # the draws are the means
    latent = model.latent
    assert isinstance(latent, Gaussian)
    x = model.encoder(IMAGES)[0]
    mean, deviation = x[:, :4], F.softplus(x[:, 4:])
    reconstruction = F.binary_cross_entropy_with_logits(model.decoder(mean), IMAGES)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, deviation), torch.distributions.Normal(0.0, 1.0)
    )
    expected = reconstruction + 3 * kl.sum(1).mean() / 64
    assert torch.allclose(vae_loss(3.0)(model, IMAGES)["total"], expected)
    total = 0.0
    for i in range(6):
        pairs = torch.stack([torch.distributions.Normal(mean[j], deviation[j]).log_prob(mean[i]) for j in range(6)])
        joint = pairs.sum(1).logsumexp(0) - math.log(6 * 50)
        product = (pairs.logsumexp(0) - math.log(6 * 50)).sum()
        prior = torch.distributions.Normal(0.0, 1.0).log_prob(mean[i]).sum()
        total += float((pairs[i].sum() - joint) + 2 * (joint - product) + (product - prior)) / 6
    found = tcvae_loss(2.0, 50)(model, IMAGES)
    assert found["penalty"].item() == pytest.approx(total / 64, rel=1e-4)
    plain = PLAIN.make((1, 8, 8))
    z = plain.encoder(IMAGES)[0]
    penalty = (-z).clamp(min=0).mean() + 0.1 * z.square().mean()
    assert torch.allclose(bio_loss()(plain, IMAGES)["penalty"], penalty)


def test_a_gaussian_is_drawn_while_training_alone() -> None:
    model = gaussian()
    assert torch.equal(model.eval()(IMAGES)[0].hat, model(IMAGES)[0].continuous)
    noisy = model.train()(IMAGES)[0]
    assert not torch.equal(noisy.hat, noisy.continuous)
    assert noisy.codes is noisy.continuous
    assert model.encode(IMAGES).shape == (6, 4)


def test_arms_share_their_images_and_are_measured_alike() -> None:
    arms = [
        result(method=METHOD),
        result(method=PLAIN),
        result(method=PLAIN, baseline="vae", strength=2.0),
        result(method=PLAIN, baseline="tcvae"),
        result(method=PLAIN, baseline="bio"),
    ]
    assert len({tuple(sorted(found.parity.items())) for found in arms}) == 1
    assert len({found.values[RECONSTRUCTION.name] for found in arms}) == 5
    for found in arms:
        assert -0.01 <= float(found.values[MODULARITY.name]) <= 1  # type: ignore[arg-type]
        assert 0 <= float(found.values[ACTIVE.name]) <= 4  # type: ignore[arg-type]
    assert result(method=METHOD, weight_decay=3.0).values != arms[0].values
