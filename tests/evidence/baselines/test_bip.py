"""Baselines of BiP: every way keeps to its budget of passes and to its share of weights."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from intaglio.evidence.baselines.bip import _Loop, prune, rounds, shares
from tests.methods.weights.test_bip import batches, loss_fn, mlp


def test_rounds_of_iterative_pruning() -> None:
    assert rounds(0.05)[:3] == pytest.approx([0.8, 0.64, 0.512])
    assert len(rounds(0.05)) == 14
    assert rounds(0.05)[-1] == 0.05
    assert len(rounds(0.8**3)) == 3
    assert rounds(1.0) == [1.0]
    assert set(shares(100, 14)) == {7, 8}
    assert sum(shares(100, 14)) == 100


@pytest.mark.parametrize("how", ["bip", "alternate", "omp", "imp", "hydra"])
def test_every_way_keeps_to_its_passes_and_its_share(how: Any) -> None:
    net = mlp()
    passes: list[int] = []

    def counting(model: nn.Module, batch: Any) -> Tensor:
        passes.append(id(batch))
        return loss_fn(model, batch)

    before = [parameter.detach().clone() for parameter in net.parameters()]
    result = prune(net, 0.3, batches(), counting, passes=30, how=how, lr=0.05)
    assert result.passes == len(passes) == (29 if how in ("bip", "alternate") else 30)
    assert [type(module) for module in net] == [type(module) for module in mlp()]
    assert not any(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    weights = [net[i].weight for i in (0, 2, 4)]
    assert sum(int((w == 0).sum()) for w in weights) == int(0.7 * sum(w.numel() for w in weights))
    assert (result.overlap == 1) == (how == "omp")
    again = mlp()
    prune(again, 0.3, batches(), loss_fn, passes=30, how=how, lr=0.05)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_iterative_pruning_is_nested_and_can_rewind(monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[dict[str, Tensor]] = []
    weights: list[dict[str, Tensor]] = []
    plain = _Loop.retrain

    def spied(self: _Loop, steps: int) -> None:
        masks.append(self.masked.masks)
        weights.append({name: weight.detach().clone() for name, weight in self.masked.weights.items()})
        plain(self, steps)

    monkeypatch.setattr(_Loop, "retrain", spied)
    rewound, going_on = mlp(), mlp()
    dense = {name: value.clone() for name, value in rewound.state_dict().items()}
    prune(rewound, 0.5, batches(), loss_fn, passes=12, how="imp", rewind=True, lr=0.1)
    assert len(masks) == len(rounds(0.5)) == 4
    for old, new in pairwise(masks):
        assert all((new[name] <= old[name]).all() for name in old)
    for start in weights:
        assert all(torch.equal(weight, dense[f"{name}.weight"]) for name, weight in start.items())
    prune(going_on, 0.5, batches(), loss_fn, passes=12, how="imp", lr=0.1)
    assert not torch.equal(rewound[0].weight, going_on[0].weight)
