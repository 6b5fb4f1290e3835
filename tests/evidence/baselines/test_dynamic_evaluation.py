"""Dynamic evaluation: the plain losses without a step, and weights that come back."""

from __future__ import annotations

import pytest
import torch

from intaglio.evidence.baselines.dynamic_evaluation import dynamic_evaluation
from intaglio.methods.decoding.apply_pretrained.hidden_state_optimization import CacheOptimizer, hso_score
from tests.trainer.helpers import checkpoint, same, weights

IDS = torch.randint(8, 150, (1, 30), generator=torch.Generator().manual_seed(0))


def test_without_a_step_it_is_the_plain_model() -> None:
    model = checkpoint().model
    plain = hso_score(model, IDS, 30, CacheOptimizer(step_size=0.0))
    assert torch.allclose(dynamic_evaluation(model, IDS, 7, learning_rate=0.0), plain, atol=1e-4)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_window_is_scored_before_its_update_and_the_weights_come_back(normalize: bool) -> None:
    ckpt = checkpoint()
    before = weights(ckpt)
    plain = dynamic_evaluation(ckpt.model, IDS, 10, learning_rate=0.0)
    losses = dynamic_evaluation(ckpt.model, IDS, 10, learning_rate=1e-2, normalize=normalize)
    assert torch.equal(losses[:, :10], plain[:, :10])
    assert not torch.allclose(losses[:, 10:], plain[:, 10:], atol=1e-3)
    assert same(weights(ckpt), before)


def test_repeated_text_is_learned() -> None:
    model, ids = checkpoint().model, IDS[:, :10].repeat(1, 6)
    plain, learned = (dynamic_evaluation(model, ids, 10, learning_rate=rate) for rate in (0.0, 3e-3))
    assert float(learned[:, 30:].mean()) < float(plain[:, 30:].mean()) - 0.1
