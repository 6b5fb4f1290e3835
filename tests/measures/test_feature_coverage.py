"""What single neurons tell of a known state, on states made for the purpose."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from intaglio.errors import IntaglioError
from intaglio.measures.feature_coverage import Counts, coverage, cuts, random_coverage, reconstruction


def state(positions: int = 400, properties: int = 5, seed: int = 0) -> Tensor:
    return torch.rand(positions, properties, generator=torch.Generator().manual_seed(seed)) < 0.3


def noise(positions: int = 400, neurons: int = 7, seed: int = 1) -> Tensor:
    return torch.rand(positions, neurons, generator=torch.Generator().manual_seed(seed))


def counts(z: Tensor, true: Tensor, like: Tensor | None = None) -> Counts:
    return Counts.of(z, true, cuts(z if like is None else like))


def test_cuts_are_shares_of_the_largest_activation() -> None:
    z = torch.tensor([[1.0, -3.0], [4.0, -1.0]])
    assert cuts(z, 4).tolist() == [[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]


def test_counts_by_hand() -> None:
    z = torch.tensor([[0.0], [1.0], [2.0], [4.0]])
    true = torch.tensor([[True], [False], [True], [True]])
    found = Counts.of(z, true, torch.tensor([[0.0], [1.5]]))
    assert found.yes_CN.tolist() == [[3.0], [2.0]]
    assert found.right_CNK.flatten().tolist() == [2.0, 2.0]
    assert found.f1_CNK.flatten().tolist() == pytest.approx([2 * 2 / (3 + 3), 2 * 2 / (2 + 3)])
    assert found.precision_CNK.flatten().tolist() == pytest.approx([2 / 3, 1.0])
    with pytest.raises(IntaglioError, match="4 positions have activations and 3 have properties"):
        Counts.of(z, true[:3], torch.zeros(1, 1))


def test_a_neuron_a_property_is_all_there_is_to_know() -> None:
    read, other = state(seed=0), state(seed=2)
    z_read, z_other = (torch.cat([noise(seed=seed), 3.0 * true], 1) for seed, true in ((1, read), (3, other)))
    chosen, judged = counts(z_read, read), counts(z_other, other, z_read)
    assert coverage(chosen, judged).tolist() == pytest.approx([1.0] * 5)
    assert reconstruction(z_read, read, z_other, other) == pytest.approx(1.0, abs=0.2)
    # Positions where nothing holds and nothing is said count as 0; leave them out and it is 1.
    some = other.any(1)
    assert reconstruction(z_read, read, z_other[some], other[some]) == pytest.approx(1.0)
    # Without those neurons nothing is precise, and the best that noise can do is to say yes always.
    chosen, judged = counts(z_read[:, :7], read), counts(z_other[:, :7], other, z_read[:, :7])
    share = other.float().mean(0)
    assert coverage(chosen, judged).tolist() == pytest.approx((2 * share / (1 + share)).tolist(), abs=0.05)
    assert reconstruction(z_read[:, :7], read, z_other[:, :7], other) == 0


def test_what_is_chosen_is_not_chosen_where_it_is_judged() -> None:
    read, other = state(properties=1, seed=0), state(properties=1, seed=2)
    z_read, z_other = (torch.cat([2.0 * ~true, 2.0 * true], 1) for true in (read, other))
    z_other = z_other.flip(1)  # the neurons change their places: the wrong one was chosen
    assert float(coverage(counts(z_read, read), counts(z_other, other, z_read))) == 0.0
    assert float(coverage(counts(z_other, other), counts(z_other, other))) == 1.0


def test_a_classifier_that_spoke_seldom_is_not_heard() -> None:
    read = state(properties=1)
    z = torch.zeros(400, 1)
    z[read[:, 0].nonzero()[:9, 0]] = 1.0
    assert reconstruction(z, read, z, read) == 0.0
    assert reconstruction(z, read, z, read, least=9) > 0.0


def test_fewer_neurons_tell_less_and_all_tell_all() -> None:
    read, other = state(seed=0), state(seed=2)
    z_read, z_other = (
        torch.cat([noise(neurons=20, seed=seed), 3.0 * true], 1) for seed, true in ((1, read), (3, other))
    )
    chosen, judged = counts(z_read, read), counts(z_other, other, z_read)
    whole = float(coverage(chosen, judged).mean())
    draws = [random_coverage(chosen, judged, count, 20, torch.Generator().manual_seed(0)) for count in (2, 12, 25, 99)]
    assert draws[0] < draws[1] < draws[2] == draws[3] == whole
    assert random_coverage(chosen, judged, 12, 20, torch.Generator().manual_seed(0)) == draws[1]


def test_a_property_that_never_holds_is_left_out() -> None:
    read, other = state(properties=2), state(properties=2, seed=2)
    other[:, 1] = False
    found = coverage(counts(noise(), read), counts(noise(seed=4), other, noise()))
    assert found.isnan().tolist() == [False, True]
