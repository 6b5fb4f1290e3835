"""Losses a few rows at a time, and heads that look ahead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from intaglio.modeling.anatomy import anatomy
from intaglio.speculative.heads.chunked_loss import chunked, kl, zero_loss
from intaglio.speculative.heads.lm_head import DraftLMHead, DraftVocabulary, TargetHead, resolve_rank
from intaglio.speculative.heads.multi_token_loss import multi_token_loss, shift_states, topk_hits, valid_targets
from intaglio.speculative.heads.objective import head_batch
from tests.families import tiny_model


@pytest.mark.parametrize("size", [1, 4, 7, 100])
def test_pieces_give_the_gradient_of_the_whole(size: int) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(7, 5, generator=rng, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 5, generator=rng, dtype=torch.float64, requires_grad=True)
    unused = torch.zeros(2, requires_grad=True)
    target = torch.randint(9, (7,), generator=rng)

    def piece(x: Tensor, target: Tensor) -> Any:
        logits = x @ weight.T
        loss = F.cross_entropy(logits, target, reduction="sum")
        return loss, loss[None], logits.argmax(-1)

    total, sums, each = chunked(piece, [x, target], [weight, unused], size)
    (3 * total).backward()
    found = (x.grad, weight.grad)
    x.grad = weight.grad = None
    expected = F.cross_entropy(x @ weight.T, target, reduction="sum")
    (3 * expected).backward()
    torch.testing.assert_close(total.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, (x.grad, weight.grad))
    torch.testing.assert_close(sums[0], expected.detach())
    assert each is not None
    assert torch.equal(each, (x @ weight.T).argmax(-1))
    with torch.no_grad():
        torch.testing.assert_close(chunked(piece, [x, target], [weight], size)[0].double(), expected.detach(),
                                   rtol=1e-6, atol=1e-6)  # fmt: skip
    loss = zero_loss([weight, unused])
    loss.backward()
    assert loss.item() == 0


def test_kl_is_zero_for_equal_laws_alone() -> None:
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    assert kl(logits, logits + 5).abs().max() < 1e-6
    expected = (logits.softmax(-1) * (logits.log_softmax(-1) - logits.flip(-1).log_softmax(-1))).sum(-1)
    torch.testing.assert_close(kl(logits, logits.flip(-1)), expected)


@pytest.mark.parametrize("goal", ["model", "text"])
def test_the_first_head_is_compared_with_the_next_place(goal: Any) -> None:
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(6, (8,), generator=rng)
    batch = head_batch([{"input_ids": ids}, {"input_ids": ids[:5]}])
    said = torch.randn(2, 8, 6, generator=rng)  # the model's logits, taken for its hidden states
    if goal == "text":
        said = 50 * F.one_hot(batch["target"].clamp(min=0), 6).float()
    # A head that knows what the model will say one place later, and one that knows it two places later.
    states = [torch.cat([said[:, k:], torch.zeros(2, k, 6)], 1).requires_grad_() for k in (1, 2)]
    found = multi_token_loss(batch, states, said, lambda x: x, lambda x: x, [], goal=goal, weights=[1.0, 0.5], ranks=3)
    assert found.total.item() < 1e-5
    assert {name: value.item() for name, value in found.parts.items() if "right" in name} == {
        "right_1": 1.0, "right_2": 1.0,
    }  # fmt: skip
    # Places 0 to 7 and 0 to 4; the last one's next token is not known.
    assert found.outputs.counts_K.tolist() == ([7 + 4, 6 + 3] if goal == "model" else [6 + 3, 5 + 2])
    assert found.outputs.right_Kr.shape == (2, 3)
    wrong = multi_token_loss(batch, [said, said], said, lambda x: x, lambda x: x, [], goal=goal, weights=[1.0, 1.0])
    assert wrong.total.item() > 0.1


def test_what_is_scored() -> None:
    labels = torch.tensor([-100, -100, 5, 6, 7])
    batch = head_batch(
        [{"input_ids": torch.tensor([1, 2, 5, 6, 7]), "labels": labels}, {"input_ids": torch.tensor([3])}]
    )
    assert batch["target"].tolist() == [[-100, 5, 6, 7, -100], [-100] * 5]
    assert batch["scored"].int().tolist() == [[0, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    assert batch["weight"] == 3
    assert valid_targets(batch, 2, "model").int().tolist() == [[0, 0, 1, 1, 1], [0] * 5]
    assert valid_targets(batch, 2, "text").int().tolist() == [[0, 0, 1, 1, 0], [0] * 5]
    assert shift_states(torch.arange(3.0)[None], 1).tolist() == [[0, 0, 1]]
    assert shift_states(torch.arange(3.0)[None], 5).tolist() == [[0, 0, 0]]
    assert topk_hits(torch.tensor([[1.0, 3, 2]]), torch.tensor([2]), 2).tolist() == [[False, True]]


def test_a_low_rank_change_begins_at_nothing_and_is_shared() -> None:
    parts = anatomy(tiny_model("llama", layers=1))
    weight = parts.head.weight.detach()  # type: ignore[union-attr, operator]
    target, width = TargetHead(parts, DraftVocabulary()), weight.shape[1]
    x = torch.randn(3, 2 * width)
    both = x[:, :width] + x[:, width:]
    for rank in (None, 0, 2):
        vocabulary = DraftLMHead(weight, 3, 2, rank)
        for head in range(3):
            torch.testing.assert_close(vocabulary(x, head, target), both @ weight.T)
    torch.nn.init.ones_(vocabulary.out_Vr)
    change = (x @ vocabulary.in_MrX[1].T).sum(-1, keepdim=True)
    torch.testing.assert_close(vocabulary(x, 1, target), both @ weight.T + change)
    assert resolve_rank(None, 4, 160, 64) is None
    assert resolve_rank(None, 4, 49_152, 1152) == 32
    assert resolve_rank(8, 4, 160, 64) == 8
