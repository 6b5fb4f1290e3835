"""QLAE: gradients, quantizers and decay by the card, latent spaces, networks, the adversarial form, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from intaglio.errors import IntaglioError
from intaglio.methods.activations.qlae import QLAE, Autoencoder, qlae_loss, training
from intaglio.methods.activations.qlae.latents import (
    Continuous,
    ScalarQuantizer,
    VectorQuantizer,
    commitment_loss,
    quantization_loss,
)
from intaglio.methods.activations.qlae.networks import Critic, Decoder, Encoder
from intaglio.methods.activations.qlae.training import (
    DecayedAdam,
    batches,
    gradient_penalty,
    param_groups,
)
from tests.alive import alive

EXAMPLES = (
    {"network": "dense", "width": 12, "num_latents": 3, "num_values": 4, "steps": 3, "batch_size": 8},
    {"network": "conv", "num_latents": 2, "num_values": 3, "steps": 1, "batch_size": 4, "latent": "global"},
)
GAN = {"training": "gan", "generator_period": 1}
ALIVE = {
    "latent": "global",
    "num_latents": 2,
    "num_values": 5,
    "value_limit": 1.0,
    "learn_values": False,
    "vector_dim": alive(3, latent="vector"),
    "network": "conv_small",
    "width": 10,
    "training": "gan",
    "quantization_weight": 0.5,
    "commitment_weight": 0.5,
    "weight_decay": 0.5,
    "learning_rate": 1e-2,
    "clip": 1e-6,
    "steps": 4,
    "batch_size": 5,
    "latent_weight": alive(1.0, **GAN),
    "gradient_weight": alive(1.0, **GAN),
    "generator_period": alive(2, training="gan"),
}
IMAGES = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
X = torch.tensor([[0.3, -0.1]])


def observe(method: Any) -> Any:
    model = method.fit(IMAGES, seed=1)
    return model.state_dict(), model.losses, model.encode(IMAGES)


def three() -> ScalarQuantizer:
    """Two latents of the values -0.5, 0, 0.5."""
    return ScalarQuantizer(2, 3)


# --- Faithful means ---------------------------------------------------------------------------------------------------


def test_the_worked_quantizer() -> None:
    """zq=(.5,0); L_quant=L_commit=.025; dL_quant/dv_{1,3} = .2, dL_commit/dx_1 = -.2."""
    latent, x = three(), X.clone().requires_grad_()
    latents = latent(x)
    assert latents.quantized.tolist() == [[0.5, 0.0]]
    assert latents.indices is not None
    assert latents.indices.tolist() == [[2, 1]]
    quantization, commitment = quantization_loss(latents), commitment_loss(latents)
    assert quantization.item() == pytest.approx(0.025) == commitment.item()
    quantization.backward()
    assert latent.values.grad is not None
    assert float(latent.values.grad[0, 2]) == pytest.approx(0.2)
    assert x.grad is None
    latent.values.grad = None
    commitment.backward()
    assert x.grad is not None
    assert x.grad[0].tolist() == pytest.approx([-0.2, -0.1])
    assert latent.values.grad is None


def test_the_reconstruction_moves_the_encoder_alone_with_an_identity_jacobian() -> None:
    """d loss_rec / d codebook = 0; the encoder gets exactly the decoder-input gradient."""
    latent, x = three(), X.clone().requires_grad_()
    weight = torch.tensor([[2.0, -3.0]])
    (latent(x).hat * weight).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, weight)
    assert latent.values.grad is None


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
def test_codes_are_values_of_each_latents_codebook(count: int, latents: int, seed: int) -> None:
    """zhat numerically equals zq; each column of zq takes at most n_v values; fixed points have no loss."""
    latent = ScalarQuantizer(latents, count)
    x = torch.randn(50, latents, generator=torch.Generator().manual_seed(seed))
    made = latent(x)
    assert torch.equal(made.hat, made.quantized)
    assert made.indices is not None
    assert int(made.indices.max()) < count
    expected = (x[..., None] - latent.values).abs().argmin(-1)
    assert torch.equal(made.indices, expected)
    again = latent(made.quantized.detach())
    assert quantization_loss(again).item() == commitment_loss(again).item() == 0
    assert torch.equal(again.hat, made.quantized)


def test_one_value_makes_a_constant_code_and_the_mean_image() -> None:
    """n_v = 1: constant code, reconstruction = data mean (logit of it) at optimum."""
    images = IMAGES.round()
    method = QLAE(
        network="dense", width=8, num_latents=2, num_values=1, steps=800, weight_decay=0.0, learning_rate=0.02
    )
    model = method.fit(images)
    assert len(model.encode(images).unique(dim=0)) == 1
    _, logits = model(images)
    assert torch.allclose(logits[0].sigmoid(), images.mean(0), atol=0.02)


def test_decay_multiplies_weights_and_leaves_biases_and_codebooks() -> None:
    """One step with zero gradient maps w -> (1 - lr*wd) w = 0.9999 w; biases/codebooks unchanged."""
    model = QLAE(network="dense", width=6, num_latents=2).make((1, 8, 8))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    DecayedAdam(model, 1e-3, 0.1, 1.0).step(sum(0.0 * p.sum() for p in model.parameters()))
    for name, value in model.named_parameters():
        plain = name.endswith("bias") or name.startswith("latent.")
        assert torch.allclose(value, before[name] * (1.0 if plain else 0.9999), rtol=1e-6, atol=0)


def test_only_decayed_gradients_are_clipped_element_by_element() -> None:
    layer = nn.Linear(2, 1)
    optimizer = DecayedAdam(layer, 1e-3, 0.1, 0.5)
    optimizer.step(3 * layer.weight.sum() + 0.2 * layer.weight[0, 0] * 0 - 7 * layer.bias.sum())
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None
    assert layer.weight.grad.tolist() == [[0.5, 0.5]]
    assert layer.bias.grad.tolist() == [-7.0]
    DecayedAdam(layer, 1e-3, 0.1, 0.0).step(3 * layer.weight.sum())
    assert layer.weight.grad.tolist() == [[3.0, 3.0]]


@pytest.mark.parametrize("network", ["conv", "conv_small", "dense"])
def test_the_groups_hold_every_parameter_once(network: Any) -> None:
    model = QLAE(network=network, num_latents=2).make((3, 16, 16))
    decayed, plain = param_groups(model, 0.3)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    names = {id(value): name for name, value in model.named_parameters()}
    assert {names[id(p)] for p in plain["params"]} == {
        name for name in names.values() if name.endswith("bias") or name == "latent.values"
    }
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    fixed = param_groups(QLAE(network="dense", learn_values=False).make((1, 8, 8)), 0.1)[1]["params"]
    assert all(p.ndim == 1 for p in fixed)


# --- Latent spaces ----------------------------------------------------------------------------------------------------


def test_codebooks_of_several_sizes_and_a_shared_one() -> None:
    latent = ScalarQuantizer(3, [1, 2, 4], init=(0.0, 3.0))
    codes = latent(torch.full((1, 3), 2.9)).quantized
    assert codes.tolist() == [[0.0, 3.0, 3.0]]
    drawn = latent.sample(300, torch.Generator().manual_seed(0))
    assert [sorted(set(column.tolist())) for column in drawn.T] == [[0.0], [0.0, 3.0], [0.0, 1.0, 2.0, 3.0]]
    shared = ScalarQuantizer(5, 3, shared=True)
    assert shared.values.shape == (1, 3)
    assert shared(torch.full((2, 5), 0.4)).quantized.tolist() == [[0.5] * 5] * 2
    shared.sample(4, torch.Generator()).sum().backward()
    assert shared.values.grad is not None


def test_the_first_of_two_equally_near_values_is_taken() -> None:
    latent = ScalarQuantizer(1, 2, init=(0.0, 1.0))
    assert latent(torch.tensor([[0.5]])).quantized.tolist() == [[0.0]]


def test_vectors_are_shared_by_the_latents() -> None:
    latent = VectorQuantizer(2, 7, 3, torch.Generator().manual_seed(0))
    assert latent.inputs == 6
    assert latent.values.abs().max().item() <= 1
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    made = latent(x)
    expected = torch.cdist(x.view(10, 3), latent.values).argmin(1).view(5, 2)
    assert made.indices is not None
    assert torch.equal(made.indices, expected)
    assert torch.equal(made.quantized, latent.values[expected].flatten(1))
    assert latent.sample(4, torch.Generator()).shape == (4, 6)
    continuous = Continuous(2)(X)
    assert continuous.hat is X is continuous.codes
    one, again = (torch.Generator().manual_seed(4) for _ in range(2))
    assert torch.equal(Continuous(2).sample(3, one), torch.randn(3, 2, generator=again))
    wide = VectorQuantizer(1, 500, 12, torch.Generator().manual_seed(0))
    assert 0.49 < wide.values.abs().max().item() <= 0.5  # +-sqrt(3 / size)


# --- Networks ---------------------------------------------------------------------------------------------------------


def test_the_papers_convolutions() -> None:
    encoder = Encoder("conv", (3, 64, 64), 12)
    convolutions = [module for module in encoder.body if isinstance(module, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [32] * 3 + [64] * 3 + [128] * 3 + [256] * 3
    assert [(c.kernel_size[0], c.stride[0]) for c in convolutions] == [(3, 1), (3, 1), (4, 2)] * 4
    assert [layer.out_features for layer in encoder.dense if isinstance(layer, nn.Linear)] == [256, 256]
    decoder = Decoder("conv", (3, 64, 64), 12, encoder.map_shape)
    body: Any = decoder.body
    assert [c.out_channels for c in body.convolutions] == [256] * 3 + [128] * 3 + [64] * 3 + [32] * 3
    assert [(c.kernel_size[0], c.stride[0]) for c in body.convolutions] == [(3, 1), (3, 1), (4, 2)] * 4
    assert body.map.shape == (1, 256, 4, 4)
    small = Encoder("conv_small", (3, 64, 64), 12)
    assert [m.out_channels for m in small.body if isinstance(m, nn.Conv2d)] == [64, 128, 256, 512]


@pytest.mark.parametrize(("network", "side"), [("conv", 16), ("conv_small", 32), ("dense", 5)])
def test_reconstructions_have_the_images_shape_and_every_weight_a_gradient(network: Any, side: int) -> None:
    model = QLAE(network=network, num_latents=3, width=7).make((2, side, side))
    images = torch.rand(4, 2, side, side, generator=torch.Generator().manual_seed(0))
    losses = qlae_loss(model, images)
    losses["total"].backward()
    assert model(images)[1].shape == images.shape
    assert all(p.grad is not None for p in model.parameters())
    expected = losses["reconstruction"] + 0.01 * losses["quantization"] + 0.01 * losses["commitment"]
    assert float(losses["total"].detach()) == pytest.approx(float(expected.detach()))


def test_styles_scale_after_instance_norm_and_never_negatively() -> None:
    decoder = Decoder("conv_small", (1, 8, 8), 2, (4, 4))
    body: Any = decoder.body
    seen: list[Tensor] = []
    body.styles[0].register_forward_hook(lambda module, args, out: seen.append(out))
    decoder(torch.randn(3, 2, generator=torch.Generator().manual_seed(0)))
    x = nn.functional.leaky_relu(body.convolutions[0](body.map.expand(3, -1, -1, -1)))
    scale, shift = seen[0].relu().chunk(2, 1)
    normed = nn.functional.instance_norm(x, eps=1e-6)
    expected = decoder.last(normed * scale[..., None, None] + shift[..., None, None])
    found = decoder(torch.randn(3, 2, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(found, expected, atol=1e-5)


# --- Training ---------------------------------------------------------------------------------------------------------


def test_two_independent_bits_are_separated_into_two_latents() -> None:
    """Bars: the two sources of an image are read from one latent each."""
    from intaglio.measures.infomec import infomec

    sources = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    images = torch.zeros(16, 1, 8, 8)
    for row, (a, b) in enumerate(sources.tolist()):
        images[row, 0, a, :] = images[row, 0, 4 + b, :] = 1
    method = QLAE(network="dense", width=32, num_latents=2, num_values=4, steps=600, weight_decay=0.1, batch_size=16)
    model = method.fit(images, seed=2)
    assert model.losses["reconstruction"] < 0.35
    found = infomec(sources.numpy(), model.encode(images).numpy(), discrete=True)
    assert found.infoe > 0.5


def test_fits_are_equal_seeds_differ_and_the_global_generator_is_left_alone() -> None:
    method, state = QLAE(**EXAMPLES[0]), torch.random.get_rng_state()
    one, two, other = (method.fit(IMAGES, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_small_sets_fill_a_batch_and_every_image_comes_once_an_epoch() -> None:
    images = torch.arange(5.0)
    drawn = batches(images, 4, 0)
    rows = torch.cat([next(drawn) for _ in range(5)])
    assert all(sorted(rows[start : start + 5].tolist()) == [0, 1, 2, 3, 4] for start in (0, 5, 10, 15))
    assert next(batches(images, 12, 0)).shape == (12,)


def test_the_gradient_penalty_of_a_linear_value() -> None:
    real, fake = torch.rand(6, 1, 2, 2), torch.rand(6, 1, 2, 2)
    weight = torch.tensor([3.0, 0.0, 4.0, 0.0]).view(1, 2, 2)
    penalty = gradient_penalty(lambda x: (x * weight).sum((1, 2, 3)), real, fake, torch.rand(6))
    assert float(penalty) == pytest.approx(16)  # (5 - 1)²


def test_the_critic_recovers_the_generators_latents() -> None:
    sources = torch.cartesian_prod(torch.arange(4), torch.arange(2))
    images = torch.zeros(8, 1, 4, 4)
    for row, (a, b) in enumerate(sources.tolist()):
        images[row, 0, a, 2 * b : 2 * b + 2] = 1
    method = QLAE.gan(network="dense", width=32, num_latents=2, num_values=[4, 2], steps=500, learning_rate=3e-3)
    assert (method.weight_decay, method.batch_size, method.training) == (1e-4, 64, "gan")
    model = method.fit(images)
    z = model.latent.sample(200, torch.Generator().manual_seed(3)).detach()
    codes = model.encode(model.decode(z))
    latent: Any = model.latent
    assert torch.equal(codes, latent(z).indices) or float((codes == latent(z).indices).float().mean()) > 0.9
    assert set(model.losses) == {"wasserstein", "penalty", "latent", "quantization", "commitment"}
    frozen = QLAE.gan(network="dense", steps=1, num_latents=2).fit(IMAGES)
    fresh = QLAE.gan(network="dense", steps=1, num_latents=2).make((1, 8, 8))
    assert all(torch.equal(a, b) for a, b in zip(frozen.decoder.parameters(), fresh.decoder.parameters(), strict=True))


def test_the_adversarial_losses_have_their_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """generator: -value + 200 latent + 0.01 quant + 0.01 commit; critic: Wasserstein + penalty + the same."""
    monkeypatch.setattr(training, "quantization_loss", lambda latents: 2 + 0 * latents.hat.sum())
    monkeypatch.setattr(training, "commitment_loss", lambda latents: 3 + 0 * latents.hat.sum())
    monkeypatch.setattr(training, "gradient_penalty", lambda value, real, fake, mix: 5 + 0 * value(real).sum())
    monkeypatch.setattr(DecayedAdam, "step", lambda self, loss: totals.append(float(loss.detach())))
    weights = {"latent_weight": 0.0, "gradient_weight": 0.0, "quantization_weight": 0.0, "commitment_weight": 0.0}
    found = {}
    for name in ("none", "quantization_weight", "commitment_weight", "gradient_weight"):
        totals: list[float] = []
        changed = {} if name == "none" else {name: 10.0}
        method = QLAE.gan(
            network="dense", width=6, num_latents=2, steps=1, generator_period=1, **{**weights, **changed}
        )
        model = method.fit(IMAGES)
        found[name] = torch.tensor(totals)
    extra = {name: (own - found["none"]).tolist() for name, own in found.items()}
    assert extra["quantization_weight"] == pytest.approx([20, 20], abs=1e-3)
    assert extra["commitment_weight"] == pytest.approx([30, 30], abs=1e-3)
    assert extra["gradient_weight"] == pytest.approx([50, 0], abs=1e-3)
    # Without the other terms the critic's loss is value(fake) - value(real), the generator's -value(fake).
    assert found["none"][0] == pytest.approx(-model.losses["wasserstein"], abs=1e-5)


def test_the_generator_raises_the_critics_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """generator loss = -value + ...: a value higher by four everywhere lowers it by four, and not the critic's."""
    own, totals = Critic.forward, list[float]()
    monkeypatch.setattr(DecayedAdam, "step", lambda self, loss: totals.append(float(loss.detach())))
    for more in (0, 4):
        monkeypatch.setattr(Critic, "forward", lambda self, x, more=more: (own(self, x)[0], own(self, x)[1] + more))
        QLAE.gan(network="dense", width=6, num_latents=2, steps=1, generator_period=1).fit(IMAGES)
    assert [totals[2] - totals[0], totals[3] - totals[1]] == pytest.approx([0, -4], abs=1e-3)


@pytest.mark.parametrize("kind", ["autoencoder", "gan"])
def test_progress_is_reported_at_intervals_and_at_the_end(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    monkeypatch.setattr(training, "REPORT_EVERY", 2)
    steps: list[int] = []
    method = QLAE(network="dense", width=6, num_latents=2, steps=5, batch_size=4, training=kind)
    method.fit(IMAGES, progress=lambda done, total, label: steps.append(done))
    assert steps == [2, 4, 5]


# --- Files and refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [*EXAMPLES, {**EXAMPLES[0], **GAN}, {**EXAMPLES[0], "latent": "vector"}])
def test_a_saved_model_comes_back(fields: dict[str, Any], tmp_path: Path) -> None:
    method = QLAE(**fields)
    model = method.fit(IMAGES)
    method.save(model, tmp_path / "a.safetensors")
    again, back = QLAE.load(tmp_path / "a.safetensors")
    assert again == method
    assert isinstance(back, Autoencoder)
    assert torch.equal(back.encode(IMAGES), model.encode(IMAGES))
    hat = model(IMAGES)[0].hat
    assert torch.equal(back.decode(hat), model.decode(hat))
    assert QLAE.model_validate(json.loads(json.dumps(method.model_dump()))) == method


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("no")
    from safetensors import safe_open
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "c")
    tiny = QLAE(**EXAMPLES[0])
    tiny.save(tiny.make((1, 8, 8)), tmp_path / "d")
    with safe_open(tmp_path / "d", framework="pt") as file:
        save_file({"a": torch.zeros(1)}, tmp_path / "e", file.metadata())
    small = QLAE(num_latents=2, steps=1)
    for call, says in (
        (lambda: small.fit(IMAGES[0]), r"the images are torch.float32 \[1, 8, 8\]"),
        (lambda: small.fit(IMAGES[:0]), "at least one is accepted"),
        (lambda: small.fit(IMAGES.round().long()), "the images are torch.int64"),
        (lambda: small.fit(IMAGES * 2), "the images have values from .* 0 to 1 is accepted"),
        (lambda: small.fit(IMAGES + torch.nan), "the images have values from nan"),
        (lambda: small.fit(IMAGES[..., :6]), "the images have 8 x 6 pixels; conv needs squares"),
        (lambda: small.fit(torch.rand(2, 1, 24, 24)), "the images have 24 x 24 pixels"),
        (lambda: QLAE.load(tmp_path / "none"), "cannot read the model"),
        (lambda: QLAE.load(tmp_path / "b"), "cannot read the model"),
        (lambda: QLAE.load(tmp_path / "c"), "is not a model that QLAE.save has written"),
        (lambda: QLAE.load(tmp_path / "e"), "the model .* is damaged: its tensors and hyperparameters do not"),
    ):
        with pytest.raises(IntaglioError, match=says) as caught:
            call()
        assert "\n" not in str(caught.value)
    for fields in ({"num_values": [2, 3]}, {"num_latents": 2, "num_values": [2, 3], "latent": "global"}):
        with pytest.raises(ValidationError, match="num_values has 2 numbers; one for each"):
            QLAE(**fields)
