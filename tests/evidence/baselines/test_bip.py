"""Loops of pruning: each keeps to its passes and to its share of the weights."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from intaglio.evidence.baselines import bip
from intaglio.evidence.baselines.bip import hydra, iterative, rounds, shares
from intaglio.evidence.designs.classify import Classify, mlp
from intaglio.evidence.testbeds.digits import Digits

DESIGN = Classify().toy(steps=30)
IMAGES = Digits().toy().training(0)


def net() -> Any:
    torch.manual_seed(0)
    return mlp((1, 8, 8), 16)


def test_rounds_of_iterative_pruning() -> None:
    assert rounds(0.05)[:3] == pytest.approx([0.8, 0.64, 0.512])
    assert len(rounds(0.05)) == 14
    assert rounds(0.05)[-1] == 0.05
    assert len(rounds(0.8**3)) == 3
    assert rounds(1.0) == [1.0]
    assert set(shares(100, 14)) == {7, 8}
    assert sum(shares(100, 14)) == 100


@pytest.mark.parametrize(("loop", "more"), [(iterative, {}), (iterative, {"rewind": True}), (hydra, {"lr_mask": 1.0})])
def test_loops_keep_to_their_passes_and_their_share(
    loop: Any, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    plain = bip._loss

    def counted(net: nn.Module, batch: Any) -> Tensor:
        seen.append(1)
        return plain(net, batch)

    monkeypatch.setattr(bip, "_loss", counted)
    first, again = net(), net()
    for one in (first, again):
        assert loop(one, IMAGES, 0, DESIGN, keep=0.3, learning_rate=0.05, **more) == 30
    assert len(seen) == 60
    weights = [module.weight for module in first if isinstance(module, nn.Linear)]
    assert sum(int((w == 0).sum()) for w in weights) == round(0.7 * sum(w.numel() for w in weights))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first.parameters(), net().parameters(), strict=True))


def test_iterative_pruning_is_nested_and_can_rewind(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros: list[list[Tensor]] = []
    starts: list[list[Tensor]] = []
    plain = bip._retrain

    def spied(model: nn.Module, *args: Any) -> None:
        linears: list[Any] = [module for module in model.modules() if hasattr(module, "parametrizations")]
        zeros.append([module.weight.detach() == 0 for module in linears])
        starts.append([module.parametrizations.weight.original.detach().clone() for module in linears])
        plain(model, *args)

    monkeypatch.setattr(bip, "_retrain", spied)
    iterative(net(), IMAGES, 0, DESIGN, keep=0.5, learning_rate=0.1, rewind=True)
    assert len(zeros) == len(rounds(0.5)) == 4
    for old, new in pairwise(zeros):
        assert all((b >= a).all() for a, b in zip(old, new, strict=True))
    dense = [module.weight for module in net() if isinstance(module, nn.Linear)]
    assert all(torch.equal(a, b) for start in starts for a, b in zip(start, dense, strict=True))
