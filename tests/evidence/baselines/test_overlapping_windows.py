"""Overlapping windows lie between windows apart and the whole text."""

from __future__ import annotations

import torch

from intaglio.evidence.baselines.overlapping_windows import overlapping_windows
from intaglio.methods.decoding.apply_pretrained.hidden_state_optimization import CacheOptimizer, hso_score
from tests.families import tiny_model

IDS = torch.randint(8, 150, (2, 30), generator=torch.Generator().manual_seed(0))


def test_each_token_is_scored_once_with_the_promised_context() -> None:
    model = tiny_model("llama", layers=2)
    whole = hso_score(model, IDS, 30, CacheOptimizer(step_size=0.0))
    assert torch.allclose(overlapping_windows(model, IDS, 30, 30), whole, atol=1e-4)
    losses = overlapping_windows(model, IDS, 12, 4)
    assert losses.shape == whole.shape
    assert torch.allclose(losses[:, :12], whole[:, :12], atol=1e-4)
    # Token 14 is first reached by the window that begins at token 4.
    alone = hso_score(model, IDS[:, 4:17], 30, CacheOptimizer(step_size=0.0))
    assert torch.allclose(losses[:, 12:16], alone[:, 8:12], atol=1e-4)
    apart = overlapping_windows(model, IDS, 12, 12)
    second = hso_score(model, IDS[:, 12:25], 30, CacheOptimizer(step_size=0.0))
    assert torch.allclose(apart[:, 12:24], second, atol=1e-4)
