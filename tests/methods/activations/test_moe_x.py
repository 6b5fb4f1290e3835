"""MoE-X: what is exactly true of experts and of the router that expects them to be sparse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from intaglio.methods.activations.moe_x.layers import MoELayer, MoELayerConfig
from intaglio.methods.activations.moe_x.routing import (
    balance_loss,
    choose,
    entropy,
    firing_probability,
    loads,
    moments,
    sparsity_scores,
)
from tests.alive import modified

EXAMPLES = (
    {},
    {"experts": 3, "active": 1, "router": "linear", "activation": "own", "gates": "all", "layers": [0], "reset": 0.5},
    {"experts": 4, "active": 3, "start": "split", "gated": "drop", "noise": 0.2, "temperature": 0.5, "balance": 0.0},
)
BASE = {"experts": 4, "active": 2}
ALIVE = {
    "experts": 3,
    "active": 1,
    "router": "linear",
    "activation": "gelu",
    "gated": "drop",
    "start": "split",
    "noise": 0.2,
    "reset": 0.5,
    "layers": [0],
    "gates": "all",
    "temperature": 0.5,
    "balance": 1.0,
}


def observe(method: Any) -> Any:
    return modified(method, layers=2)


DOUBLE = torch.float64


def random(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


def layer(seed: int = 0, dtype: torch.dtype = DOUBLE, **config: Any) -> MoELayer:
    """A layer with random weights, biases too where its config has them."""
    made = MoELayer(MoELayerConfig(**{"hidden": 5, "units": 7, "experts": 4, "active": 2, **config}), dtype=dtype)
    for place, parameter in enumerate(made.parameters()):
        parameter.data.copy_(random(*parameter.shape, seed=seed + place, dtype=dtype))
    return made.eval()


def biases(made: MoELayer) -> list[Tensor | None]:
    return [made.bias("encoder"), made.bias("factor"), made.bias("decoder")]


def by_the_loop(made: MoELayer, x_TD: Tensor, act: Any = F.relu) -> Tensor:
    """The definition, a token and an expert at a time."""
    chosen_TK, gates_TK = choose(made.scores(x_TD), made.config.active, made.config.gates)
    encoder, factor, decoder = ([None] * made.config.experts if b is None else b for b in biases(made))
    found = []
    for x_D, chosen_K, gates_K in zip(x_TD, chosen_TK, gates_TK, strict=True):
        y_D = torch.zeros_like(x_D)
        for e, gate in zip(chosen_K.tolist(), gates_K, strict=True):
            z_F = act(F.linear(x_D, made.encoder[e], encoder[e]))
            if made.factor is not None:
                z_F = z_F * F.linear(x_D, made.factor[e], factor[e])
            out_D = F.linear(z_F, made.decoder[e], decoder[e])
            y_D = y_D + gate * out_D
        found.append(y_D)
    return torch.stack(found)


CONFIGS: list[dict[str, Any]] = [
    {},
    {"biases": (True, False, True)},
    {"factor": True, "biases": (True, True, True)},
    {"router": "linear", "activation": "gelu", "factor": True},
    {"experts": 3, "active": 3, "gates": "all", "temperature": 0.3},
    {"hidden": 8, "units": 12, "experts": 5, "active": 1},
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
@torch.no_grad()
def test_all_experts_at_once_are_the_loop_over_tokens_and_experts(config: dict[str, Any], dtype: torch.dtype) -> None:
    made = layer(dtype=dtype, **config)
    x_BLD = random(2, 9, made.width, seed=50, dtype=dtype)
    act = F.gelu if config.get("activation") == "gelu" else F.relu
    expected = by_the_loop(made, x_BLD.view(-1, made.width), act).view_as(x_BLD)
    torch.testing.assert_close(made(x_BLD), expected, atol=1e-5 if dtype is torch.float32 else 1e-12, rtol=1e-5)


@pytest.mark.parametrize("config", [{}, {"factor": True, "biases": (True, True, False)}, {"router": "linear"}])
@torch.no_grad()
def test_the_layer_is_one_wide_sparse_mlp(config: dict[str, Any]) -> None:
    made = layer(**config)
    x = random(3, 6, 5, seed=9)
    z_BLN = made.features(x)
    assert z_BLN.shape == (3, 6, 4 * 7)
    torch.testing.assert_close(z_BLN @ made.wide_decoder().T, made(x), atol=1e-9, rtol=1e-6)
    # A unit's activation has its expert's gate in it, and is zero where the expert was not chosen.
    used = (z_BLN.unflatten(-1, (4, 7)) != 0).any(-1).sum(-1)
    assert int(used.max()) <= 2


@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_units_that_rest_are_those_of_other_experts_and_those_at_zero(config: dict[str, Any]) -> None:
    made = layer(**config)
    x_BLD = random(2, 9, made.width, seed=51)
    chosen_TK, _ = choose(made.scores(x_BLD.flatten(0, 1)), made.config.active, made.config.gates)
    encoder = made.bias("encoder")
    pre_TEF = torch.einsum("td,efd->tef", x_BLD.flatten(0, 1), made.encoder) + (0 if encoder is None else encoder)
    taken_TE1 = F.one_hot(chosen_TK, made.config.experts).sum(1).bool()[..., None]
    expected_TEF = taken_TE1 & (pre_TEF > 0 if made.config.activation == "relu" else F.gelu(pre_TEF) != 0)
    assert torch.equal(made.active_units(x_BLD), expected_TEF.view(2, 9, -1))


def test_exactly_k_experts_and_gates_that_sum_to_one() -> None:
    chosen, gates = choose(random(40, 6), 3)
    assert all(len(set(row)) == 3 for row in chosen.tolist())
    torch.testing.assert_close(gates.sum(-1), torch.ones(40, dtype=DOUBLE))
    assert bool((gates > 0).all())
    # Of equal scores the first; over all, the gates are those of the whole softmax.
    assert choose(torch.zeros(2, 5), 2)[0].tolist() == [[0, 1], [0, 1]]
    scores = random(40, 6)
    torch.testing.assert_close(choose(scores, 3, "all")[1], scores.softmax(-1).sort(-1, descending=True)[0][:, :3])


def test_what_decays_are_matrices() -> None:
    made = layer(factor=True, biases=(True, True, True), router="linear")
    assert {name for name, p in made.named_parameters() if p.ndim > 1} == {"encoder", "factor", "decoder", "router"}
    assert [b.shape for b in biases(made) if b is not None] == [(4, 7), (4, 7), (4, 5)]


@torch.no_grad()
def test_one_expert_is_the_plain_mlp() -> None:
    made = layer(experts=1, active=1, biases=(True, False, True))
    encoder, _, decoder = biases(made)
    assert encoder is not None
    assert decoder is not None
    x = random(11, 5, seed=3)
    expected = F.linear(F.relu(F.linear(x, made.encoder[0], encoder[0])), made.decoder[0], decoder[0])
    torch.testing.assert_close(made(x), expected)


@pytest.mark.parametrize("active", [1, 2, 4])
@torch.no_grad()
def test_equal_experts_have_equal_scores_and_even_gates_and_are_the_dense_mlp(active: int) -> None:
    made = layer(active=active)
    made.encoder.copy_(made.encoder[:1].expand_as(made.encoder).clone())
    made.decoder.copy_(made.decoder[:1].expand_as(made.decoder).clone())
    x = random(11, 5, seed=3)
    scores = made.scores(x)
    torch.testing.assert_close(scores, scores[:, :1].expand_as(scores), atol=0, rtol=1e-12)
    torch.testing.assert_close(choose(scores, active)[1], torch.full((11, active), 1 / active, dtype=DOUBLE))
    torch.testing.assert_close(made(x), F.relu(x @ made.encoder[0].T) @ made.decoder[0].T)


def test_the_worked_example() -> None:
    encoder = torch.tensor([[[1.0, 0.0], [-1.0, 2.0], [3.0, -2.0]]])
    x = torch.tensor([[1.0, 2.0]])
    mean, variance, *_ = moments(encoder)
    assert mean.tolist() == [[1.0, 0.0]]
    torch.testing.assert_close(variance, torch.full((1, 2), 8 / 3))  # over the units, of the population
    assert float(x.square() @ variance.T) == pytest.approx(13.3333, abs=1e-4)
    score = sparsity_scores(x, moments(encoder))
    assert float(score) == pytest.approx(-0.2158, abs=1e-4)
    assert float(firing_probability(score)) == pytest.approx(0.6079, abs=1e-4)
    assert (x @ encoder[0].T).tolist() == [[1.0, 3.0, -1.0]]  # two of three fire
    # A bias adds its own mean and variance: m is 1 + 2, v is 13.3333 + 2/3.
    biased = sparsity_scores(x, moments(encoder, torch.tensor([[1.0, 2.0, 3.0]])))
    assert float(biased) == pytest.approx(-math.erf(3 / math.sqrt(2 * 14)), abs=1e-6)


SIZES = st.tuples(st.integers(1, 5), st.integers(2, 6), st.integers(2, 6), st.integers(0, 999))


@settings(max_examples=30, deadline=None)
@given(SIZES, st.floats(0.5, 30), st.floats(0.5, 30))
def test_scores_are_odd_bounded_and_of_no_scale(sizes: tuple[int, int, int, int], c: float, d: float) -> None:
    experts, units, width, seed = sizes
    encoder, x = random(experts, units, width, seed=seed), random(9, width, seed=seed + 1)
    scores = sparsity_scores(x, moments(encoder))
    assert float(scores.abs().max()) <= 1
    torch.testing.assert_close(sparsity_scores(-x, moments(encoder)), -scores)
    torch.testing.assert_close(sparsity_scores(x, moments(-encoder)), -scores)
    torch.testing.assert_close(sparsity_scores(c * x, moments(d * encoder)), scores)
    centred = encoder - encoder.mean(1, keepdim=True)
    torch.testing.assert_close(sparsity_scores(x, moments(centred)), torch.zeros_like(scores), atol=1e-7, rtol=0)


def test_a_token_of_zeros_has_a_score_and_a_gradient() -> None:
    encoder = random(3, 4, 5).requires_grad_(True)
    scores = sparsity_scores(torch.zeros(2, 5, dtype=DOUBLE), moments(encoder))
    assert scores.tolist() == [[0.0] * 3] * 2
    scores.sum().backward()
    assert encoder.grad is not None
    assert bool(torch.isfinite(encoder.grad).all())


def test_scores_say_which_experts_will_be_sparsest() -> None:
    """With rows that are drawn about each expert's own mean, as the router assumes."""
    E, units, width, tokens = 8, 256, 64, 400
    encoder = random(E, units, width, seed=1) + 0.05 * math.sqrt(width) * random(E, 1, width, seed=2) / 2
    x = random(tokens, width, seed=3)
    fired_TE = (torch.einsum("td,efd->tef", x, encoder) > 0).double().sum(-1)
    scores = sparsity_scores(x, moments(encoder))
    correlation = torch.corrcoef(torch.stack([scores.flatten(), fired_TE.flatten()]))[0, 1]
    assert float(correlation) < -0.95
    assert float((units * firing_probability(scores) - fired_TE).abs().mean()) / units < 0.03
    chosen, _ = choose(scores, 2)
    best = fired_TE.argsort(-1)[:, :2]
    overlap = (chosen[:, :, None] == best[:, None]).any(-1).double().mean()
    assert float(overlap) > 0.85
    assert float(fired_TE.gather(1, chosen).mean()) < 0.85 * float(fired_TE.mean())


def test_gradients_reach_the_encoders_through_the_gates_alone() -> None:
    made = layer()
    x = random(6, 5, seed=4)
    _, gates = choose(made.scores(x), 2)
    (gates * random(6, 2, seed=5)).sum().backward()  # whatever the experts gave: it is a constant here
    assert made.encoder.grad is not None
    assert float(made.encoder.grad.abs().sum()) > 0
    assert made.decoder.grad is None


def test_the_moments_follow_the_weights() -> None:
    made = layer()
    x = random(6, 5, seed=4)
    with torch.no_grad():
        before = made.scores(x)
        assert made.moments() is made.moments()  # kept in evaluation
        made.encoder.mul_(-1)
        torch.testing.assert_close(made.scores(x), -before)
        made.encoder.data = made.encoder.data.neg()
        torch.testing.assert_close(made.scores(x), before)
        made.train()
        assert made.moments() is not made.moments()
    made.eval()
    assert made.moments()[0].requires_grad  # and never where a gradient is to pass
    with torch.inference_mode():
        torch.testing.assert_close(made.scores(x).clone(), before)


def test_the_balance_loss() -> None:
    # Everything to one expert that is sure of it: E. Even: 1.
    sure = torch.tensor([[50.0, 0.0, 0.0, 0.0]]).expand(8, 4)
    assert float(balance_loss(sure, choose(sure, 1)[0])) == pytest.approx(4)
    even = torch.zeros(4, 4)
    assert float(balance_loss(even, torch.arange(4)[:, None])) == pytest.approx(1)
    # By hand: half the choices each for experts 0 and 1, p = (0.5, 0.25, 0.25).
    scores = torch.tensor([[0.5, 0.25, 0.25]]).log().expand(2, 3)
    assert float(balance_loss(scores, torch.tensor([[0, 1], [0, 1]]))) == pytest.approx(3 * (0.5 * 0.5 + 0.5 * 0.25))
    share = loads(torch.tensor([[0, 1], [0, 2]]), 4)
    assert share.tolist() == [0.5, 0.25, 0.25, 0.0]
    assert entropy(torch.full((4,), 0.25)) == pytest.approx(1)
    assert entropy(torch.tensor([1.0, 0.0])) == 0.0
    assert entropy(torch.ones(1)) == 1.0
    # An expert that never fires is the router's ideal; the loss is what pulls tokens away from it.
    scores = torch.tensor([[1.0, -0.1, 0.1]]).requires_grad_(True)
    balance_loss(scores, torch.tensor([[0]])).backward()
    assert scores.grad is not None
    assert float(scores.grad[0, 0]) > 0 > float(scores.grad[0, 1])


def test_what_a_pass_leaves_behind_for_who_watches() -> None:
    made = layer(biases=(True, False, False))
    encoder = made.bias("encoder")
    assert encoder is not None
    x = random(2, 8, 5, seed=7)
    made(x)
    assert made.routed is None
    made.watched = True
    made(x)
    routed = made.routed
    assert routed is not None
    x_TD = x.view(16, 5)
    pre_TEF = torch.einsum("td,efd->tef", x_TD, made.encoder) + encoder
    fired_TE = (pre_TEF > 0).sum(-1)
    assert torch.equal(routed.fired_TK, fired_TE.gather(1, routed.chosen_TK))
    chosen_TE = torch.zeros(16, 4, dtype=torch.bool).scatter_(1, routed.chosen_TK, True)
    assert torch.equal(routed.fired_EF.long(), ((pre_TEF > 0) & chosen_TE[..., None]).sum(0))
    assert routed.scores_TE.requires_grad
    summary = routed.summary(made.config)
    assert summary["L0"] == pytest.approx(float(routed.fired_TK.sum(1).double().mean()))
    assert summary["expected L0"] == pytest.approx(
        7 * float(firing_probability(routed.scores_TE.detach()).gather(1, routed.chosen_TK).sum(1).mean())
    )
    real = torch.arange(16) < 5
    assert len(routed.masked(real).scores_TE) == 5
    assert routed.masked(real[:3]) is routed


def test_half_precision_routes_as_full_precision_does() -> None:
    made = layer(hidden=8, units=16, dtype=torch.float32)
    half = layer(hidden=8, units=16, dtype=torch.bfloat16)
    x = random(32, 8, seed=8, dtype=torch.bfloat16)
    assert half(x).dtype is torch.bfloat16
    assert half.scores(x).dtype is torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = made(x.float())
        assert made.scores(x.float()).dtype is torch.float32
    with torch.no_grad():
        torch.testing.assert_close(found.float(), made(x.float()), atol=0.3, rtol=0.1)
