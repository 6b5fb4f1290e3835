"""Products with sparse codes equal dense ones, values and gradients alike."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.dictionaries import active_entries
from intaglio.dictionaries.active_entries import ActiveEntries, decode, pre_activations


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 7), st.floats(0, 1), st.booleans(), st.integers(0, 99))
def test_values_and_gradients_are_those_of_dense_products(
    batch: int, latents: int, width: int, share: float, dense: bool, seed: int
) -> None:
    """Sparse products and dense ones give the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(active_entries, "DENSE", -1.0 if dense else 2.0)
        x_BD = random(batch, width, seed=seed)
        names = {"W": random(latents, width, seed=seed + 1), "b": random(latents, seed=seed + 2)}
        names |= {"c": random(width, seed=seed + 3), "V": random(latents, width, seed=seed + 4)}
        mask_BM = torch.rand(batch, latents, generator=torch.Generator().manual_seed(seed)) < share
        weights = random(batch, width, seed=seed + 5)
        grads = []
        for sparse in (True, False):
            own = {name: tensor.clone().requires_grad_() for name, tensor in names.items()}
            full_BM = (x_BD - own["c"]) @ own["W"].T + own["b"]
            if sparse:
                at = ActiveEntries.from_mask(mask_BM)
                codes_E = pre_activations(full_BM.detach(), x_BD, own["W"], own["b"], own["c"], at)
                assert torch.equal(at.to_dense(codes_E.detach()), full_BM.detach() * mask_BM)
                out_BD = decode(codes_E.square(), own["V"], own["c"], at)
            else:
                out_BD = (full_BM * mask_BM).square() @ own["V"] + own["c"]
            (out_BD * weights).sum().backward()
            grads.append((out_BD.detach(), *(tensor.grad for tensor in own.values())))
        for mine, other in zip(*grads, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-3, rtol=1e-3)


def test_entries_of_the_largest_latents() -> None:
    at = ActiveEntries.from_topk(torch.tensor([[2, 0], [1, 2]]), 3)
    assert at.to_dense(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [[2, 0, 1], [0, 3, 4]]
    assert at.where(torch.tensor([True, False, False, True])).to_dense(torch.ones(2)).tolist() == [[0, 0, 1], [0, 0, 1]]


def test_the_dense_products_begin_at_their_share() -> None:
    mask = torch.zeros(10, 10, dtype=torch.bool)
    mask.view(-1)[: round(100 * active_entries.DENSE)] = True
    assert not ActiveEntries.from_mask(mask).dense
    mask.view(-1)[round(100 * active_entries.DENSE)] = True
    assert ActiveEntries.from_mask(mask).dense
