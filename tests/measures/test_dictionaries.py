"""Measures of dictionaries on values worked out by hand."""

from __future__ import annotations

import pytest
import torch

from intaglio.errors import IntaglioError
from intaglio.measures.dictionaries import (
    Reconstruction,
    feature_recovery_rate,
    max_cosines,
    reconstruction,
    shared_latents,
    strongest,
)

AXES = torch.eye(3)


def test_variance_unexplained_and_active_latents_do_not_depend_on_the_batches() -> None:
    x = torch.tensor([[0.0, 2.0], [2.0, 2.0], [4.0, 2.0], [2.0, 6.0]])
    wrong = x + torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    codes = torch.tensor([[1.0, 0.0, 0.0], [1.0, -1.0, 0.0], [0.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    for sizes in ([4], [1, 3], [2, 2]):
        measured = Reconstruction()
        for parts in zip(x.split(sizes), codes.split(sizes), wrong.split(sizes), strict=True):
            measured.update(*parts)
        # Around the mean (2, 3): 4 + 1, 1, 4 + 1, 9.
        assert measured.fvu == pytest.approx(5 / 20)
        assert measured.l0 == 1.0
        assert measured.fired == pytest.approx(2 / 3)
        assert measured.count == 4


class Half:
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return codes


def test_a_dictionary_is_measured_on_activations() -> None:
    x = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert reconstruction(Half(), x).fvu == pytest.approx(0.25)


def test_cosines() -> None:
    """FRR(tau) = share of true v_i with max_m |or signed| cos(w_m, v_i) > tau."""
    rows = torch.tensor([[2.0, 0.0, 0.0], [0.0, -3.0, 0.0], [0.0, 0.0, 0.0]])
    assert max_cosines(AXES, rows).tolist() == [1, 0, 0]
    assert max_cosines(AXES, rows, signed=False).tolist() == [1, 1, 0]
    assert feature_recovery_rate(AXES, rows) == pytest.approx(1 / 3)
    assert feature_recovery_rate(AXES, rows, signed=False) == pytest.approx(2 / 3)
    slanted = torch.tensor([[0.85, (1 - 0.85**2) ** 0.5, 0.0]])
    assert feature_recovery_rate(AXES[:1], slanted, 0.9) == 0
    assert feature_recovery_rate(AXES[:1], slanted, 0.8) == 1


def test_shared_latents_are_those_of_every_seed() -> None:
    others = [AXES[:2] + 0.01, AXES[1:] * 5]
    assert shared_latents([AXES, *others]) == pytest.approx(1 / 3)
    assert shared_latents([AXES, others[0]]) == pytest.approx(2 / 3)


def test_shared_latents_may_be_those_of_the_strongest() -> None:
    """report share with MCS > .9, over the top-alpha most activating neurons."""
    activation = torch.tensor([0.5, 3.0, 2.0])
    assert strongest(activation, 0.5).tolist() == [False, True, True]
    assert strongest(activation, 0.01).tolist() == [False, True, False]
    assert shared_latents([AXES, AXES[:2]], counted_M=strongest(activation, 0.5)) == 0.5
    assert shared_latents([AXES, AXES[:2]], counted_M=strongest(activation, 0.01)) == 1


def test_activations_that_do_not_vary_are_refused() -> None:
    with pytest.raises(IntaglioError, match="the activations are all equal"):
        _ = reconstruction(Half(), torch.full((5, 2), 1e3 / 3)).fvu
