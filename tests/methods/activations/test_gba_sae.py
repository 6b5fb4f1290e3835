"""GBA: the controller of the biases, its schedule, and what becomes of a trained dictionary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.dictionaries.training import TrainingRun
from intaglio.methods.activations.gba_sae import GBASAE, adapted_biases, group_of_latents, target_frequencies
from intaglio.recipe.schema import Recipe
from tests.families import tiny_model, tiny_tokenizer

BASE = {
    "layer": 0,
    "width": 24,
    "tokens": 120,
    "length": 12,
    "batch_tokens": 20,
    "buffer": 60,
    "groups": 3,
    "adapt_every": 2,
}
EXAMPLES = (
    BASE,
    {**BASE, "layer": [0, 1], "site": "mlp", "seeds": 2, "beside": [{"topk_sae": {"k": 3}}]},
    {**BASE, "activation": "relu", "tied": False, "spherical": True, "site": "z"},
)
ALIVE = {
    "layer": 1,
    "site": "attention",
    "width": 32,
    "tokens": 90,
    "length": 16,
    "skip": 2,
    "batch_tokens": 30,
    "buffer": 30,
    "learning_rate": 0.01,
    "warmup": 3,
    "decay": 0.5,
    "seeds": 2,
    "beside": [{"topk_sae": {"k": 3}}],
    "groups": 2,
    "highest_frequency": 0.3,
    "lowest_frequency": 0.1,
    "step_down": 0.05,
    "step_up": "test_step_up_acts_on_latents_that_never_fire",
    "adapt_every": 1,
    "min_frequency": "test_only_latents_below_the_least_frequency_are_raised",
    "start_scale": 1.0,
    "activation": "relu",
    "tied": False,
    "spherical": True,
}
TEXTS = [
    "the quick brown fox jumps over the lazy dog and then the dog sleeps in the sun, as it did the day before",
    "she said that the other thing is there, and that there is no river that runs through the town in the north",
    "what is the name of the river that runs through the town? it is in the north, and nobody knows its name",
]


def observe(method: Any) -> Any:
    ckpt = Checkpoint(tiny_model("llama", layers=2), tiny_tokenizer("llama"), "tiny")
    method.fit(ckpt, TEXTS, seed=1)
    attachment = ckpt.attachments[method.slug]
    return attachment.tensors, attachment.about, ckpt.record.steps[-1].model_dump()


def gaussian(rows: int = 2000, width: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def run_of(method: GBASAE, x_ND: Tensor, steps: int = 100) -> TrainingRun:
    return TrainingRun(method, x_ND, 0, steps)


def test_a_step_of_the_controller() -> None:
    """Step example: b = (-.2,-.2,-.2), p = (.3, .05, 0), p_k = .1, r = (.5,.4,0), gamma .01, rbar = .45."""
    bias = adapted_biases(
        torch.full((3,), -0.2),
        torch.tensor([0.3, 0.05, 0.0]),
        torch.tensor([0.5, 0.4, 0.0]),
        torch.full((3,), 0.1),
        torch.zeros(3, dtype=torch.int64),
        step_down=0.01,
        step_up=0.01,
        min_frequency=1e-6,
    )
    torch.testing.assert_close(bias, torch.tensor([-0.205, -0.2, -0.1955]))


def adapt(bias: list[float], frequency: list[float], peak: list[float], **fields: Any) -> list[float]:
    options = {"step_down": 0.1, "step_up": 0.2, "min_frequency": 0.01, **fields}
    groups = options.pop("groups", [0] * len(bias))
    targets = options.pop("targets", [0.5] * len(bias))
    result = adapted_biases(
        torch.tensor(bias), torch.tensor(frequency), torch.tensor(peak), torch.tensor(targets), torch.tensor(groups),
        **options,
    )  # fmt: skip
    return [round(value, 6) for value in result.tolist()]


def test_a_latent_at_its_target_or_at_the_least_frequency_keeps_its_bias() -> None:
    assert adapt([-0.5], [0.5], [1.0], targets=[0.5]) == [-0.5]
    assert adapt([-0.5], [0.25], [1.0], targets=[0.5], min_frequency=0.25) == [-0.5]


def test_the_mean_peak_is_that_of_the_group_without_silent_latents() -> None:
    peaks = [1.0, 3.0, 0.0, 10.0, 0.0]
    raised = adapt([-0.9] * 5, [0.1, 0.1, 0.0, 0.1, 0.0], peaks, groups=[0, 0, 0, 1, 1], step_up=0.1)
    assert raised == [-0.9, -0.9, -0.7, -0.9, 0.0]


def test_a_group_without_a_peak_raises_nothing() -> None:
    assert adapt([-0.5, -0.5], [0.0, 0.0], [0.0, 0.0]) == [-0.5, -0.5]


def test_step_up_acts_on_latents_that_never_fire() -> None:
    assert adapt([-0.5, -0.5], [0.0, 0.2], [0.0, 1.0], step_up=0.2) == [-0.3, -0.5]
    assert adapt([-0.5, -0.5], [0.0, 0.2], [0.0, 1.0], step_up=0.0) == [-0.5, -0.5]
    method = GBASAE(width=4, groups=1, step_up=0.25, adapt_every=1, highest_frequency=1.0)
    run = run_of(method, gaussian())
    run.state["bias"].copy_(torch.tensor([-0.9, 0.0, 0.0, 0.0]))
    run.state["positive"].copy_(torch.tensor([0, 5, 5, 5]))
    run.state["peak"].copy_(torch.tensor([0.0, 1.0, 1.0, 1.0]))
    run.state["samples"].fill_(10)
    run.step = 1
    with torch.no_grad():
        method.after_step(run, gaussian())
    torch.testing.assert_close(run.state["bias"], torch.tensor([-0.65, 0.0, 0.0, 0.0]))


def test_only_latents_below_the_least_frequency_are_raised() -> None:
    """Raising the bias for every p_m < p_k would be a two-sided controller."""
    assert adapt([-0.5, -0.5], [0.02, 0.2], [1.0, 1.0], min_frequency=0.01) == [-0.5, -0.5]
    assert adapt([-0.5, -0.5], [0.02, 0.2], [1.0, 1.0], min_frequency=0.05) == [-0.3, -0.5]
    method = GBASAE(width=2, groups=1, min_frequency=0.3, step_up=0.2, adapt_every=1)
    run = run_of(method, gaussian())
    run.state["bias"].fill_(-0.5)
    run.state["positive"].copy_(torch.tensor([2, 4]))
    run.state["peak"].fill_(1.0)
    run.state["samples"].fill_(10)
    run.step = 1
    with torch.no_grad():
        method.after_step(run, gaussian())
    torch.testing.assert_close(run.state["bias"], torch.tensor([-0.3, -0.5]))


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(-1, 0), st.floats(0, 1), st.floats(0, 200), st.floats(0, 1)), min_size=1, max_size=12),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_biases_stay_between_minus_one_and_zero(rows: list[Any], down: float, up: float) -> None:
    bias, frequency, peak, target = (list(column) for column in zip(*rows, strict=True))
    after = adapt(bias, frequency, peak, targets=target, step_down=down, step_up=up)
    for before, p, goal, value in zip(bias, frequency, target, after, strict=True):
        assert -1 <= value <= 0
        if 0.01 <= p <= goal:
            assert value == pytest.approx(before, abs=1e-6)


def test_targets_are_geometric_and_groups_partition_the_latents() -> None:
    """TAFs: geomspace(.5,1e-3,10): ratio .5013; groups partition the neurons."""
    targets = target_frequencies(0.5, 1e-3, 10)
    torch.testing.assert_close(
        targets[1:] / targets[:-1], torch.full((9,), 0.5013, dtype=torch.float64), atol=5e-5, rtol=0
    )
    assert (float(targets[0]), float(targets[-1])) == (0.5, pytest.approx(1e-3))
    sizes = group_of_latents(23, 10).bincount().tolist()
    assert sum(sizes) == 23
    assert set(sizes) == {2, 3}
    method = GBASAE(width=20, groups=10)
    assert method.targets.unique().flip(0).tolist() == pytest.approx(targets.tolist())


def test_one_group_is_ba() -> None:
    """K=1 gives BA."""
    assert GBASAE.single(0.03, width=6).targets.tolist() == [0.03] * 6
    assert GBASAE(groups=1, highest_frequency=0.2, width=6).targets.tolist() == [0.2] * 6


def test_biases_change_in_adaptations_alone_and_receive_no_gradient() -> None:
    """After training steps only, b is bit-unchanged and b.grad is None; after adaptation only b changes, in [-1,0]."""
    method = GBASAE(width=16, groups=2, adapt_every=3, batch_tokens=50)
    x_ND = gaussian()
    run = run_of(method, x_ND)
    for step in range(1, 7):
        before = run.state["bias"].clone()
        weights = {name: tensor.detach().clone() for name, tensor in run.parameters.items()}
        run.update(x_ND[50 * step : 50 * step + 50])
        assert "bias" not in run.parameters
        assert run.state["bias"].grad is None
        assert torch.equal(run.state["bias"], before) == (step % 3 != 0)
        assert all(not torch.equal(weights[name], tensor) for name, tensor in run.parameters.items())
    assert -1 <= float(run.state["bias"].min()) < 0
    assert float(run.state["bias"].max()) <= 0
    weights = {name: tensor.detach().clone() for name, tensor in run.parameters.items()}
    run.state["samples"].fill_(1)
    with torch.no_grad():
        method.after_step(run, x_ND)
    assert all(torch.equal(weights[name], tensor) for name, tensor in run.parameters.items())
    assert run.state["samples"] == 0
    assert not run.state["positive"].any()
    assert not run.state["peak"].any()


def test_frequencies_and_peaks_are_those_of_all_batches_since_the_last_adaptation() -> None:
    method = GBASAE(width=8, groups=1, adapt_every=100, learning_rate=1e-12, batch_tokens=100)
    x_ND = gaussian()
    run = run_of(method, x_ND)
    run.state["bias"].fill_(-0.1)
    for part in x_ND[:300].split(100):
        run.update(part)
    pre_NM = run.pre(x_ND[:300] * run.scale, bias=run.state["bias"])
    assert run.state["samples"] == 300
    assert run.state["positive"].tolist() == (pre_NM > 0).sum(0).tolist()
    torch.testing.assert_close(run.state["peak"], pre_NM.amax(0).clamp_min(0), atol=1e-5, rtol=1e-5)


def test_a_latent_whose_pre_activation_is_zero_does_not_fire() -> None:
    method, zeros = GBASAE(width=6, groups=1, tokens=8), torch.zeros(4, 5)
    run = run_of(method, zeros)
    method.loss(run, zeros)
    assert run.state["positive"].tolist() == [0] * 6
    assert run.state["silent"].tolist() == [4] * 6
    assert method.rate == 1e-3


def test_the_controller_reaches_the_target_and_revives_dead_latents() -> None:
    """With frozen W and Gaussian inputs, adaptation drives p_m to <= p_k within one step; dead neurons rise."""
    method = GBASAE(width=12, groups=1, highest_frequency=0.1, lowest_frequency=0.1, adapt_every=1, learning_rate=1e-12)
    x_ND = gaussian(4000)
    run = run_of(method, x_ND)
    run.state["bias"][:2] = -1.0
    with torch.no_grad():
        run["W_enc"][0] = 0  # never fires, whatever the input, until its bias is 0
        dead = float((run.pre(x_ND * run.scale, bias=run.state["bias"])[:, 1] > 0).float().mean())
    assert dead < 0.01
    for _ in range(200):
        pre_NM = run.pre(x_ND * run.scale, bias=run.state["bias"])
        run.state["positive"].copy_((pre_NM > 0).sum(0))
        run.state["peak"].copy_(pre_NM.amax(0).clamp_min(0))
        run.state["samples"].fill_(len(x_ND))
        run.step = 1
        with torch.no_grad():
            method.after_step(run, x_ND)
    frequency_M = (run.pre(x_ND * run.scale, bias=run.state["bias"]) > 0).float().mean(0)
    assert float(run.state["bias"][0]) == 0
    assert float(frequency_M[2:].max()) < 0.1
    assert float(frequency_M[2:].min()) > 0.07


def test_without_steps_it_is_a_relu_autoencoder_that_fires_for_half_of_the_inputs() -> None:
    """gamma=0 with b=0 is a plain ReLU autoencoder firing ~50%."""
    method = GBASAE(width=32, groups=4, step_down=0.0, step_up=0.0, tokens=4000, batch_tokens=100, adapt_every=1)
    dictionary = method.fit_activations(gaussian(4000)).dictionary()
    codes = dictionary.encode(gaussian(4000))
    assert not dictionary.tensors["threshold"].any()
    assert 0.4 < float((codes > 0).float().mean()) < 0.6


def trained(**fields: Any) -> tuple[TrainingRun, Tensor]:
    method = GBASAE(**{"width": 16, "groups": 2, "adapt_every": 1, "step_down": 0.1, "batch_tokens": 100, **fields})
    x_ND = 3 * gaussian() + 5
    run = run_of(method, x_ND)
    for part in x_ND.split(100):
        run.update(part)
    return run, x_ND


@pytest.mark.parametrize("tied", [True, False])
def test_the_jump(tied: bool) -> None:
    """JumpReLU form: at y just above 0 the output is w.(x-b_pre) = -b_m > 0 (a jump)."""
    run, _ = trained(tied=tied)
    dictionary = run.dictionary()
    m = int(run.state["bias"].argmin())
    w_D, threshold = dictionary.tensors["W_enc"][:, m], float(dictionary.tensors["threshold"][m])
    assert threshold == pytest.approx(-float(run.state["bias"][m]) / run.scale)
    offset_D = dictionary.tensors["b_dec"]
    just = {sign: dictionary.encode(offset_D + (1 + sign * 1e-3) * threshold * w_D)[m] for sign in (-1, 1)}
    assert float(just[-1]) == 0
    assert float(just[1]) == pytest.approx(threshold, rel=2e-3)


@pytest.mark.parametrize("activation", ["jumprelu", "relu"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_dictionary_reconstructs_what_the_training_did(activation: str, tied: bool) -> None:
    """Inputs are scaled in training; the dictionary takes raw ones."""
    run, x_ND = trained(activation=activation, tied=tied)
    x_BD, bias_M = x_ND[:50] * run.scale, run.state["bias"]
    rows_MD, scale_M, offset_D = run["W_enc"].detach(), run["scale"].detach(), run["b_dec"].detach()
    projected = (x_BD - offset_D) @ rows_MD.T
    codes = projected * (projected + bias_M > 0) if activation == "jumprelu" else torch.relu(projected + bias_M)
    decoder_MD = rows_MD if tied else run["W_dec"].detach()
    expected = ((codes * scale_M) @ decoder_MD + offset_D) / run.scale
    dictionary = run.dictionary()
    torch.testing.assert_close(dictionary.decode(dictionary.encode(x_ND[:50])), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rows_MD.norm(dim=1), torch.ones(16))
    torch.testing.assert_close(decoder_MD.norm(dim=1), torch.ones(16))
    assert float(bias_M.min()) < -0.1


def test_the_loss_is_half_the_squared_error_with_the_gradients_of_dense_autograd() -> None:
    for activation in ("jumprelu", "relu"):
        method = GBASAE(width=16, groups=2, activation=activation, batch_tokens=40)
        x_ND = gaussian()
        run = run_of(method, x_ND)
        run.state["bias"].copy_(torch.linspace(-0.4, 0, 16))
        x_BD = x_ND[:40] * run.scale
        loss = method.loss(run, x_BD)
        loss.backward()
        sparse = {name: tensor.grad.clone() for name, tensor in run.parameters.items()}
        for tensor in run.parameters.values():
            tensor.grad = None
        projected = (x_BD - run["b_dec"]) @ run["W_enc"].T
        shifted = projected + run.state["bias"]
        codes = (projected if activation == "jumprelu" else shifted) * (shifted > 0) * run["scale"]
        dense = 0.5 * (codes @ run["W_enc"] + run["b_dec"] - x_BD).square().sum(1).mean()
        dense.backward()
        assert float(loss) == pytest.approx(float(dense), rel=1e-5)
        for name, tensor in run.parameters.items():
            torch.testing.assert_close(sparse[name], tensor.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"width": 4, "groups": 5}, "width is 4 and groups is 5; a group needs at least one latent"),
        ({"lowest_frequency": 0.6}, "lowest_frequency is 0.6 and highest_frequency 0.5"),
        ({"beside": [{"wanda": {}}]}, "beside names 'wanda', not one dictionary"),
        ({"beside": [{"topk_sae": {"tokens": 9}}]}, "topk_sae names tokens, which is that of the whole pass"),
        ({"beside": [{"topk_sae": {"beside": []}}]}, "topk_sae names beside, which is that of the whole pass"),
        ({"tokens": "some"}, "valid integer"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        GBASAE(**fields)


def test_a_recipe_may_write_thousands_with_a_letter() -> None:
    recipe = Recipe.from_dict({"steps": [{"fit": {"gba_sae": {"layer": 15, "width": 2048, "tokens": "300k"}}}]})
    assert recipe.steps[0].method == GBASAE(layer=15, width=2048, tokens=300_000)  # type: ignore[union-attr]
    assert GBASAE(tokens="1.5M").tokens == 1_500_000
