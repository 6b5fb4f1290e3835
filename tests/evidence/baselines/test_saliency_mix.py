"""Mixing by saliency: the partner gives its salient blocks, as many as its share."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from intaglio.checkpoint import Checkpoint
from intaglio.evidence.baselines.saliency_mix import SaliencyMix
from intaglio.trainer.classification import Classification
from intaglio.trainer.protocols import TrainingRun


def test_salient_blocks_of_the_partner_are_pasted() -> None:
    net, goal = nn.Sequential(nn.Flatten(), nn.Linear(64, 2, bias=False)), Classification()
    with torch.no_grad():
        net[1].weight.zero_()  # type: ignore[union-attr, operator]
        net[1].weight[0, :32] = 1.0  # type: ignore[index]
    run = TrainingRun(Checkpoint(net), 1, 6, 0, lambda batch: goal.loss(net, batch), objective=goal)
    made = SaliencyMix(blocks=2, per_example=True).attach(run)
    pixels = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = {"pixel_values": pixels, "labels": torch.tensor([0, 1] * 3), "id": torch.arange(6)}
    changed, mix = made.change_batch(net, batch), made.mix
    with made.forward_context(net, changed):
        assert torch.isfinite(goal.loss(net, changed).total)
    assert mix is not None
    assert mix.pasted_BHW is not None
    area = mix.pasted_BHW.float().mean((1, 2))
    torch.testing.assert_close(mix.shares_BK[:, 1], area)
    assert set((4 * area).tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0}
    assert len(set(area.tolist())) > 1
    assert torch.equal(changed["pixel_values"], mix.combine(pixels))
    wanted = mix.average(F.one_hot(batch["labels"], 2).float())
    torch.testing.assert_close(changed["targets"], wanted)
    assert all(p.grad is None for p in net.parameters())
