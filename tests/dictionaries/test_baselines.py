"""The baselines of GBA: what their cards say exactly, their gradients, and every field of theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from intaglio.dictionaries import baselines
from intaglio.dictionaries.baselines import L1SAE, BatchTopKSAE, GatedSAE, JumpReLUSAE, TopKSAE
from intaglio.dictionaries.sparse_autoencoder import SparseAutoencoder
from intaglio.dictionaries.training import TrainingRun, geometric_median
from intaglio.errors import IntaglioError
from intaglio.methods.registry import list_fitted, list_methods

SIZES = {"width": 16, "tokens": 2000, "batch_tokens": 50}
CLASSES = (L1SAE, TopKSAE, BatchTopKSAE, JumpReLUSAE, GatedSAE)


def data(rows: int = 1000, width: int = 8, seed: int = 0) -> Tensor:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return 2 * x + 1


def method_of(cls: type[SparseAutoencoder], **fields: Any) -> SparseAutoencoder:
    sparse = {TopKSAE: {"k": 3}, BatchTopKSAE: {"k": 3}, JumpReLUSAE: {"l0": 3.0}}.get(cls, {})
    return cls(**SIZES | sparse | fields)


def run_of(method: SparseAutoencoder, x_ND: Tensor | None = None, steps: int = 40, updates: int = 0) -> TrainingRun:
    x_ND = data() if x_ND is None else x_ND
    run = TrainingRun(method, x_ND, 0, steps)
    for index in range(updates):
        run.update(x_ND[50 * (index % 20) : 50 * (index % 20) + 50])
    return run


@pytest.mark.parametrize("cls", CLASSES)
def test_the_start(cls: type[SparseAutoencoder]) -> None:
    """Decoder rows unit norm, encoder initialised to decoder^T, b_dec init = geometric median; mean square norm 1."""
    run, x_ND = run_of(method_of(cls)), data()
    assert torch.equal(run["W_enc"], run["W_dec"])
    torch.testing.assert_close(run["W_dec"].norm(dim=1), torch.ones(16))
    median_D = geometric_median(x_ND)
    torch.testing.assert_close(run["b_dec"].detach().double() / run.scale, median_D, atol=1e-4, rtol=1e-4)
    centred = (x_ND.double() - median_D) * run.scale
    assert float(centred.square().sum(1).mean()) == pytest.approx(1)
    assert not torch.equal(run["W_dec"], TrainingRun(method_of(cls), x_ND, 1, 40)["W_dec"])


def test_the_geometric_median_ignores_an_outlier() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.5, 0.5], [1e4, 1e4]])
    assert float((geometric_median(x) - 0.5).norm()) < 0.5
    assert float(geometric_median(torch.ones(3, 2)).sum()) == 2


@pytest.mark.parametrize("cls", CLASSES)
def test_the_decoder_keeps_norm_one_and_loses_the_radial_part_of_its_gradient(cls: type[SparseAutoencoder]) -> None:
    run = run_of(method_of(cls), updates=12)
    torch.testing.assert_close(run["W_dec"].norm(dim=1), torch.ones(16))
    x_BD = data()[:50] * run.scale
    run.optimizer.zero_grad(set_to_none=True)
    method_of(cls).loss(run, x_BD).backward()
    before = run["W_dec"].grad.clone()
    with torch.no_grad():
        run._remove_radial("W_dec")
    assert float((run["W_dec"].grad * run["W_dec"]).sum(1).abs().max()) < 1e-5
    assert float((before * run["W_dec"]).sum(1).abs().max()) > 1e-4


@pytest.mark.parametrize("cls", CLASSES)
def test_training_lowers_the_error(cls: type[SparseAutoencoder]) -> None:
    method, x_ND = method_of(cls, tokens=20_000, learning_rate=3e-3), data()
    run = run_of(method)
    before = run.dictionary()
    after = method.fit_activations(x_ND).dictionary()
    errors = [float((one.decode(one.encode(x_ND)) - x_ND).square().mean()) for one in (before, after)]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("cls", CLASSES)
def test_a_frozen_decoder_keeps_its_directions_while_the_encoder_learns(cls: type[SparseAutoencoder]) -> None:
    """Frozen-decoder SAE as the random-features control."""
    run = run_of(method_of(cls, frozen_decoder=True))
    start = {name: run[name].detach().clone() for name in ("W_enc", "W_dec")}
    for part in data().split(50):
        run.update(part)
    assert float((run["W_dec"].detach() - start["W_dec"]).abs().max()) < 1e-6
    assert float((run["W_enc"].detach() - start["W_enc"]).abs().max()) > 1e-4


# --- TopK and BatchTopK -----------------------------------------------------------------------------------------------


def codes_of(run: TrainingRun, x_ND: Tensor) -> Tensor:
    return run.dictionary().encode(x_ND)


def test_topk_keeps_k_latents_and_fewer_where_some_are_negative() -> None:
    """TopK: exactly k nonzeros (fewer if negatives)."""
    run = run_of(method_of(TopKSAE), updates=3)
    assert (codes_of(run, data()) != 0).sum(1).tolist() == [3] * 1000
    with torch.no_grad():
        run["b_enc"].fill_(-10.0)
        run["b_enc"][0] = 10.0
    assert (codes_of(run, data()) != 0).sum(1).tolist() == [1] * 1000


def test_batch_topk_keeps_k_latents_an_input_on_average() -> None:
    """BatchTopK: exactly kB in total."""
    method = method_of(BatchTopKSAE)
    run = run_of(method)
    pre_BM = run.pre(data()[:40] * run.scale, bias=run["b_enc"])
    at = method.chosen(pre_BM)
    assert len(at.rows_E) == 3 * 40
    assert at.rows_E.tolist() == sorted(at.rows_E.tolist())
    chosen = at.to_dense(torch.ones(120)).bool()
    assert float(pre_BM[chosen].min()) >= float(pre_BM[~chosen].max())
    assert len(set(chosen.sum(1).tolist())) > 1


def test_the_threshold_of_batch_topk_is_the_average_of_the_smallest_kept_activation() -> None:
    """Inference uses a global threshold = EMA (beta .999, from step 1000) of the smallest kept activation."""
    method = method_of(BatchTopKSAE, threshold_start=2)
    run = run_of(method)
    for step, smallest in enumerate((9.0, 8.0, 0.5, 0.7)):
        run.step = step
        method.observe(run, torch.tensor([smallest, 5 + smallest, 0.0]))
    expected = 0.999 * 0.5 + 0.001 * 0.7
    assert float(run.state["threshold"]) == pytest.approx(expected)
    threshold = run.dictionary().tensors["threshold"]
    torch.testing.assert_close(threshold, torch.full((16,), expected / run.scale))


@pytest.mark.parametrize(("steps", "start"), [(40, 20), (10_000, 1000)])
def test_the_average_starts_at_step_1000_or_half_way(steps: int, start: int) -> None:
    method = method_of(BatchTopKSAE)
    run = run_of(method, steps=steps)
    for step, expected in ((start - 1, -1.0), (start, 2.0)):
        run.step = step
        method.observe(run, torch.tensor([2.0]))
        assert float(run.state["threshold"]) == expected


def test_dead_latents_learn_the_residual() -> None:
    """aux loss 1/32 * normalised error of predicting the residual with the top d/2 dead latents."""
    method = method_of(TopKSAE, dead_after=500)
    run, x_BD = run_of(method), data()[:50]
    x_BD = x_BD * run.scale
    pre_BM = run.pre(x_BD, bias=run["b_enc"])
    residual_BD = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    run.state["silent"].fill_(499)
    assert method._auxiliary_loss(run, x_BD, pre_BM, residual_BD) == 0.0
    run.state["silent"][:6] = 500
    dead_BM = torch.relu(pre_BM.clone())
    dead_BM[:, 6:] = 0
    kept = dead_BM.topk(4, dim=1)
    codes_BM = torch.zeros_like(dead_BM).scatter_(1, kept.indices, kept.values)
    error = (residual_BD - codes_BM @ run["W_dec"].detach()).square().sum()
    variance = (residual_BD - residual_BD.mean(0)).square().sum()
    loss = method._auxiliary_loss(run, x_BD, pre_BM, residual_BD)
    assert float(loss) == pytest.approx(float(error / variance) / 32, rel=1e-4)
    assert method_of(TopKSAE, dead_after=500, auxiliary=0.0)._auxiliary_loss(run, x_BD, pre_BM, residual_BD) == 0.0
    doubled = method_of(TopKSAE, dead_after=500, auxiliary=1 / 16)._auxiliary_loss(run, x_BD, pre_BM, residual_BD)
    assert float(doubled) == pytest.approx(2 * float(loss), rel=1e-4)
    loss.backward()
    assert bool((run["W_dec"].grad[:6] != 0).any())
    assert not bool((run["W_dec"].grad[6:] != 0).any())
    assert run["b_dec"].grad is not None


@pytest.mark.parametrize(("tokens", "dead"), [(2000, 200), (10**9, 10_000_000)])
def test_a_latent_is_dead_after_ten_million_activations_or_a_tenth(tokens: int, dead: int) -> None:
    method = method_of(TopKSAE, tokens=tokens)
    run, x_BD = run_of(method), data()[:50]
    pre_BM = run.pre(x_BD, bias=run["b_enc"])
    run.state["silent"].fill_(dead - 1)
    assert method._auxiliary_loss(run, x_BD, pre_BM, x_BD) == 0.0
    run.state["silent"].fill_(dead)
    assert method._auxiliary_loss(run, x_BD, pre_BM, x_BD) != 0.0


def test_silence_is_counted_in_activations() -> None:
    method = method_of(TopKSAE)
    run = run_of(method)
    with torch.no_grad():
        run["b_enc"][5] = -100.0
    run.update(data()[:50])
    run.update(data()[50:80])
    assert int(run.state["silent"][5]) == 80
    assert int(run.state["silent"].min()) == 0
    assert run.alive(80) == pytest.approx(15 / 16)


# --- L1 ---------------------------------------------------------------------------------------------------------------


def test_without_a_penalty_l1_is_a_plain_autoencoder_with_dense_gradients() -> None:
    """L1 lam=0 plain AE."""
    method = method_of(L1SAE, l1=0.0)
    run, x_BD = run_of(method, updates=2), data()[:50]
    x_BD = x_BD * run.scale
    run.optimizer.zero_grad(set_to_none=True)
    loss = method.loss(run, x_BD)
    loss.backward()
    mine = {name: tensor.grad.clone() for name, tensor in run.parameters.items()}
    run.optimizer.zero_grad(set_to_none=True)
    codes = torch.relu((x_BD - run["b_dec"]) @ run["W_enc"].T + run["b_enc"])
    dense = (x_BD - codes @ run["W_dec"] - run["b_dec"]).square().sum(1).mean()
    dense.backward()
    assert float(loss) == pytest.approx(float(dense), rel=1e-5)
    for name, tensor in run.parameters.items():
        torch.testing.assert_close(mine[name], tensor.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cls", [L1SAE, GatedSAE])
def test_the_penalty_rises_over_its_warmup(cls: type[SparseAutoencoder]) -> None:
    method, plain = method_of(cls, l1=2.0, l1_warmup=0.25), method_of(cls, l1=0.0)
    run, x_BD = run_of(method, steps=40), data()[:50]
    penalties = []
    for step in (0, 4, 9, 30):
        run.step = step
        penalties.append(float(method.loss(run, x_BD) - plain.loss(run, x_BD)))
    assert [value / penalties[-1] for value in penalties] == pytest.approx([0.1, 0.5, 1.0, 1.0], rel=1e-3)
    bias = "b_enc" if cls is L1SAE else "b_gate"
    sums = torch.relu(run.pre(x_BD, bias=run[bias])).sum(1).mean()
    assert penalties[-1] == pytest.approx(2 * float(sums), rel=1e-3)


def test_dead_latents_are_resampled_from_inputs_with_large_losses() -> None:
    method = method_of(L1SAE, resamplings=3)
    x_ND = data(50)
    x_ND[7] = 60.0
    run = run_of(method, x_ND, steps=50)
    run.update(x_ND)
    with torch.no_grad():
        run["b_enc"][2] = -100.0
    run.state["fired"].fill_(True)
    run.state["fired"][2] = False
    run.step = 10  # the first of three in 60 % of 50 steps
    with torch.no_grad():
        method.after_step(run, x_ND * run.scale)
    direction = x_ND[7] * run.scale - run["b_dec"]
    torch.testing.assert_close(run["W_dec"][2].detach(), (direction / direction.norm()).detach())
    others = [m for m in range(16) if m != 2]
    assert float(run["W_enc"][2].norm()) == pytest.approx(
        0.2 * float(run["W_enc"][others].norm(dim=1).mean()), rel=1e-5
    )
    assert float(run["b_enc"][2]) == 0
    assert not run.optimizer.state[run["W_dec"]]["exp_avg"][2].any()
    assert run.optimizer.state[run["W_dec"]]["exp_avg"][3].any()
    assert not run.state["fired"].any()
    for step, count in ((11, 3), (40, 3), (10, 0)):
        method = method_of(L1SAE, resamplings=count)
        run.step, before = step, run["W_dec"].clone()
        with torch.no_grad():
            method.after_step(run, x_ND * run.scale)
        assert torch.equal(run["W_dec"], before)


@pytest.mark.parametrize(("steps", "count"), [(50, 3), (100, 7), (9, 4), (40, 1)])
def test_latents_are_resampled_so_many_times_within_60_percent_of_the_steps(steps: int, count: int) -> None:
    method, x_ND = method_of(L1SAE, resamplings=count), data(50)
    run, when = run_of(method, x_ND, steps=steps), []
    run.update(x_ND)
    for step in range(1, steps + 1):
        run.step = step
        run.state["fired"].fill_(True)
        with torch.no_grad():
            method.after_step(run, x_ND * run.scale)
        if not run.state["fired"].any():
            when.append(step)
    assert len(when) == count
    assert when[-1] <= 0.6 * steps


# --- JumpReLU ---------------------------------------------------------------------------------------------------------


def test_a_threshold_of_zero_is_a_relu() -> None:
    """JumpReLU theta=0 equals ReLU."""
    run = run_of(method_of(JumpReLUSAE, start_threshold=0.0))
    x_ND = data()
    torch.testing.assert_close(
        codes_of(run, x_ND) * run.scale, torch.relu(run.pre(x_ND * run.scale, bias=run["b_enc"])), atol=1e-5, rtol=1e-5
    )


def test_the_straight_through_gradients() -> None:
    """dz/dtheta = -(theta/eps) 1[|pre-theta| < eps/2], dL0/dtheta = -(1/eps) 1[...]."""
    pre = torch.tensor([0.2996, 0.3004, 0.3006, 0.9], requires_grad=True)
    threshold = torch.full((4,), 0.3, requires_grad=True)
    codes = baselines._Jump.apply(pre, threshold)
    assert codes.tolist() == pytest.approx([0.0, 0.3004, 0.3006, 0.9])
    codes.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert pre.grad.tolist() == [0.0, 2.0, 3.0, 4.0]
    assert threshold.grad.tolist() == pytest.approx([-300.0, -600.0, 0.0, 0.0], rel=1e-4)
    pre.grad = threshold.grad = None
    steps = baselines._Step.apply(pre, threshold)
    assert steps.tolist() == [0.0, 1.0, 1.0, 1.0]
    steps.backward(torch.ones(4))
    assert pre.grad is None or not pre.grad.any()
    assert threshold.grad.tolist() == pytest.approx([-1000.0, -1000.0, 0.0, 0.0], rel=1e-4)


def test_the_sparsity_loss_is_the_squared_distance_to_the_target_or_the_count() -> None:
    """sparsity loss ((L0/target)-1)^2 (or lam*L0)."""
    run = run_of(method_of(JumpReLUSAE), steps=10)
    x_BD = data()[:50] * run.scale
    run.step = 5
    l0 = float((run.pre(x_BD, bias=run["b_enc"]) > run["threshold"]).float().sum(1).mean())
    plain = float(method_of(JumpReLUSAE, sparsity=0.0).loss(run, x_BD))
    penalty = {
        name: float(method_of(JumpReLUSAE, **fields).loss(run, x_BD)) - plain
        for name, fields in {
            "quadratic": {"l0": 2.0, "sparsity": 3.0},
            "linear": {"quadratic": False, "sparsity": 3.0},
            "slow": {"l0": 2.0, "sparsity": 3.0, "sparsity_warmup": 12},
        }.items()
    }
    assert penalty["quadratic"] == pytest.approx(3 * (l0 / 2 - 1) ** 2, rel=1e-4)
    assert penalty["linear"] == pytest.approx(3 * l0, rel=1e-4)
    assert penalty["slow"] == pytest.approx(penalty["quadratic"] / 2, rel=1e-4)


def test_thresholds_start_at_a_thousandth_and_stay_positive() -> None:
    run = run_of(method_of(JumpReLUSAE))
    assert float(run["threshold"].min()) == pytest.approx(0.001)
    with torch.no_grad():
        run["threshold"].fill_(-1.0)
    run.update(data()[:50])
    assert float(run["threshold"].min()) >= 0
    assert run.optimizer.defaults["betas"] == (0.0, 0.999)
    assert method_of(JumpReLUSAE).rate == 7e-5


# --- Gated ------------------------------------------------------------------------------------------------------------


def test_the_gated_loss_has_the_gradients_of_dense_autograd_with_a_frozen_decoder() -> None:
    method = method_of(GatedSAE, l1=0.3, l1_warmup=0.0)
    run = run_of(method, updates=3)
    with torch.no_grad():
        for name, seed in (("b_gate", 1), ("b_mag", 2), ("r_mag", 3)):
            run[name].copy_(0.2 * torch.randn(16, generator=torch.Generator().manual_seed(seed)))
    x_BD = data()[:50] * run.scale
    run.optimizer.zero_grad(set_to_none=True)
    loss = method.loss(run, x_BD)
    loss.backward()
    mine = {name: tensor.grad.clone() for name, tensor in run.parameters.items()}
    run.optimizer.zero_grad(set_to_none=True)
    q = (x_BD - run["b_dec"]) @ run["W_enc"].T
    gate = torch.relu(q + run["b_gate"])
    codes = (gate > 0) * torch.relu(q * run["r_mag"].exp() + run["b_mag"])
    dense = (x_BD - codes @ run["W_dec"] - run["b_dec"]).square().sum(1).mean() + 0.3 * gate.sum(1).mean()
    frozen = gate @ run["W_dec"].detach() + run["b_dec"].detach()
    dense = dense + (x_BD - frozen).square().sum(1).mean()
    dense.backward()
    assert float(loss) == pytest.approx(float(dense), rel=1e-5)
    for name, tensor in run.parameters.items():
        torch.testing.assert_close(mine[name], tensor.grad, atol=1e-4, rtol=1e-3)
    scaled = codes_of(run, data()[:50]) * run.scale
    torch.testing.assert_close(scaled, codes.detach(), atol=1e-5, rtol=1e-4)


# --- schedules, and what is refused -----------------------------------------------------------------------------------


def test_the_learning_rate() -> None:
    """lr rule TopK/BatchTopK: 2e-4 / sqrt(M/2^14), warm-up 1000, grad clip 1."""
    assert TopKSAE(width=2**14).rate == pytest.approx(2e-4)
    assert BatchTopKSAE(width=2**12).rate == pytest.approx(4e-4)
    assert TopKSAE(learning_rate=0.5).rate == 0.5
    assert TopKSAE().max_grad_norm == BatchTopKSAE().max_grad_norm == 1.0
    assert L1SAE().max_grad_norm is None
    assert [TopKSAE().warmup_steps(steps) for steps in (100, 50_000)] == [10, 1000]
    assert TopKSAE(warmup=7).warmup_steps(100) == 7
    method = method_of(TopKSAE, learning_rate=1.0, warmup=4, decay=0.5)
    run, rates = run_of(method, steps=10), []
    for _ in range(10):
        run.update(data()[:50])
        rates.append(run.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize(
    ("cls", "fields", "says"),
    [
        (TopKSAE, {"width": 8, "k": 9}, "width is 8 and k is 9; a code needs as many latents as are active"),
        (BatchTopKSAE, {"width": 8, "k": 9}, "width is 8 and k is 9"),
        (JumpReLUSAE, {"width": 8, "l0": 9.0}, "width is 8 and l0 is 9.0"),
    ],
)
def test_a_width_below_the_active_latents_is_refused(cls: Any, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        cls(**fields)


def test_what_is_not_finite_stops_the_training() -> None:
    x_ND = data()
    x_ND[3, 2] = torch.nan
    with pytest.raises(IntaglioError, match="NaN or infinite values in row 3"):
        method_of(TopKSAE).fit_activations(x_ND)
    with pytest.raises(IntaglioError, match=r"the shape \[3\]"):
        method_of(TopKSAE).fit_activations(torch.ones(3))
    run = run_of(method_of(TopKSAE))
    with pytest.raises(IntaglioError, match="the loss of topk_sae is not finite at step 0"):
        run.update(x_ND[:10])


def test_each_is_a_fit_step() -> None:
    assert {cls.slug for cls in CLASSES} <= set(list_fitted()) & set(list_methods("dictionary"))
