"""SparseGPT: against a slow version of the algorithm, and the facts that follow from it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.methods.weights.sparsegpt import SparseGPT, inverse_factor, sparsegpt
from intaglio.methods.weights.sparsity_target import prune_mask
from tests.alive import alive
from tests.families import tiny_model

EXAMPLES = ({"sparsity": 0.5, "block": 16}, {"pattern": "2:4", "block": 16})
ALIVE = {
    "sparsity": 0.25,
    "pattern": alive("1:4", sparsity=None, pattern="2:4"),
    "ignore": ["layers.0.*"],
    "dampening": 0.1,
    "block": 8,
}


def correlated(seed: int, tokens: int, inputs: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) / inputs**0.5 + 0.5 * torch.eye(inputs)
    return torch.randn(tokens, inputs, generator=generator) @ mix


def slow(
    weight_RI: torch.Tensor, hessian_II: torch.Tensor, amount: float | tuple[int, int], block: int
) -> torch.Tensor:
    """The algorithm one number at a time, in float64."""
    damped = hessian_II.double() + 0.01 * hessian_II.double().diagonal().mean() * torch.eye(len(hessian_II))
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    weight = weight_RI.double().clone()
    rows, inputs = weight.shape
    for low in range(0, inputs, block):
        high = min(low + block, inputs)
        pruned: set[tuple[int, int]] = set()
        if isinstance(amount, float):
            scored = [
                (float(weight[r, c] ** 2 / upper[c, c] ** 2), r * (high - low) + c - low, r, c)
                for r in range(rows)
                for c in range(low, high)
            ]
            pruned = {(r, c) for _, _, r, c in sorted(scored)[: int(rows * (high - low) * amount)]}
        for column in range(low, high):
            if isinstance(amount, tuple) and (column - low) % amount[1] == 0:
                for r in range(rows):
                    group = range(column, column + amount[1])
                    order = sorted(group, key=lambda c, r=r: (float((weight[r, c] / upper[c, c]) ** 2), c))
                    pruned |= {(r, c) for c in order[: amount[1] - amount[0]]}
            for r in range(rows):
                if (r, column) in pruned:
                    error = weight[r, column] / upper[column, column]
                    weight[r, column + 1 :] -= error * upper[column, column + 1 :]
        for r, c in pruned:
            weight[r, c] = 0
    return weight


@pytest.mark.parametrize("amount", [0.5, 0.7, (2, 4), (1, 4)])
def test_equals_the_slow_algorithm(amount: float | tuple[int, int]) -> None:
    x_NI = correlated(0, 200, 24)
    hessian_II = 2 * x_NI.T @ x_NI / 4
    weight_RI = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    found = sparsegpt(weight_RI, *inverse_factor(hessian_II), amount, block=8)
    expected = slow(weight_RI, hessian_II, amount, block=8)
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("amount", [0.5, (2, 4)])
def test_white_inputs_give_magnitude_pruning_by_block(amount: float | tuple[int, int]) -> None:
    weight_RI = torch.randn(6, 256, generator=torch.Generator().manual_seed(2))
    found = sparsegpt(weight_RI, *inverse_factor(torch.eye(256)), amount)
    for low in (0, 128):
        part = weight_RI[:, low : low + 128]
        expected = part.masked_fill(prune_mask(part.abs(), amount, per="layer"), 0)
        torch.testing.assert_close(found[:, low : low + 128], expected, rtol=0, atol=0)


def test_compensation_lowers_the_layer_loss() -> None:
    """Statistical, not a theorem for every row: each of 20 layers with correlated inputs, by a fifth on average."""
    shares = []
    for seed in range(20):
        x_NI = correlated(seed, 400, 64)
        weight_RI = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))
        found = sparsegpt(weight_RI, *inverse_factor(2 * x_NI.T @ x_NI), 0.5)
        same_mask = weight_RI.masked_fill(found == 0, 0)

        def loss(w: torch.Tensor, x_NI: torch.Tensor = x_NI, weight_RI: torch.Tensor = weight_RI) -> float:
            return float(((weight_RI - w) @ x_NI.T).square().sum())

        shares.append(loss(found) / loss(same_mask))
    assert max(shares) < 1
    assert sum(shares) / len(shares) < 0.8


@settings(max_examples=25)
@given(st.integers(0, 1000), st.sampled_from([0.0, 0.25, 0.5, 0.9]))
def test_share_of_zeros_is_exact_in_every_block(seed: int, sparsity: float) -> None:
    x_NI = correlated(seed, 60, 32)
    weight_RI = torch.randn(8, 32, generator=torch.Generator().manual_seed(seed))
    found = sparsegpt(weight_RI, *inverse_factor(x_NI.T @ x_NI), sparsity, block=16)
    for low in (0, 16):
        assert int((found[:, low : low + 16] == 0).sum()) == int(8 * 16 * sparsity)
    if sparsity == 0:
        assert torch.equal(found, weight_RI)


def test_dead_inputs_go_first() -> None:
    x_NI = correlated(0, 100, 16)
    x_NI[:, 5] = 0
    upper_II, dead_I = inverse_factor(x_NI.T @ x_NI)
    assert dead_I.nonzero().flatten().tolist() == [5]
    found = sparsegpt(torch.randn(4, 16), upper_II, dead_I, 0.25)
    assert (found[:, 5] == 0).all()


def test_few_samples_are_dampened_instead_of_failing() -> None:
    x_NI = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)).repeat(3, 1)
    upper_II, _ = inverse_factor(x_NI.T @ x_NI, dampening=1e-16)
    assert torch.isfinite(upper_II).all()


def test_statistics_that_are_not_finite_are_refused() -> None:
    hessian_II = torch.eye(4)
    hessian_II[0, 1] = float("nan")
    with pytest.raises(IntaglioError, match="not finite"):
        inverse_factor(hessian_II)


def test_a_block_that_cuts_groups_is_refused() -> None:
    ids = torch.randint(8, 150, (2, 16))
    with pytest.raises(IntaglioError, match="block of 6 columns is not a multiple of the pattern's 4"):
        SparseGPT(pattern="2:4", block=6).apply(Checkpoint(tiny_model("llama")), ids)


def test_the_block_fits_the_pattern_by_default() -> None:
    columns = {"2:4": 128, "2:3": 126, "5:7": 126, "100:200": 200}
    for pattern, expected in columns.items():
        method = SparseGPT(pattern=pattern)
        assert method.columns == expected
        method.check([("a", 8, 4 * 3 * 7 * 200)])
    assert SparseGPT(sparsity=0.5).columns == 128
    assert SparseGPT(sparsity=0.5, block=7).columns == 7
