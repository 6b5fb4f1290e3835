"""BlockFFN: what a router gives, what the losses are, who is whose neighbour, and how a weight follows its loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from intaglio.methods.activations.blockffn import BlockFFN, BlockFFNConfig, BlockFFNLayer, ChunkIndex, losses
from intaglio.methods.activations.blockffn.adaptive_weight import AdaptiveWeight, SparsityController
from intaglio.methods.activations.blockffn.router import expert_shares, normalize, scores
from intaglio.trainer.causal_lm import causal_batch
from tests.alive import alive

EXAMPLES = (
    {"experts": 6},
    {"experts": 4, "width": 32, "norm": "sum", "chunk": 4, "adapt": False, "router_rate": 3e-3, "router_decay": 0.1},
    {"experts": 5, "expert_width": 3, "router": "topk", "k": 2},
    {"experts": 5, "expert_width": 3, "router": "remoe", "k": 2, "l1": 1e-4},
)
ALIVE = {
    "experts": 4,
    "expert_width": 3,
    "width": 30,
    "router": "none",
    "norm": "sum",
    "k": alive(3, router="topk", k=2),
    "locality": 1.0,
    "steep": 10.0,
    "chunk_weight": 1.0,
    "chunk": 4,
    "adapt": alive(False, hold=1, window=1),
    "hold": alive(2, window=1),
    "window": alive(1, hold=1),
    "balance": alive(1.0, router="topk", k=2),
    "l1": alive(1e-2, router="remoe", k=2),
    "init_std": 0.05,
    "router_std": 0.5,
    "eps": 1e-2,
    "router_rate": 1e-2,
    "router_decay": alive(0.5, router_rate=1e-2),
}
CONFIG = BlockFFNConfig(experts=4, expert_width=3)


def rows(*lengths: int) -> dict[str, Any]:
    """A row of a packed batch, with documents of these lengths."""
    return {"input_ids": torch.arange(sum(lengths)) + 5, "lengths": torch.tensor(lengths)}


def whole(rows_: int, tokens: int, length: int) -> ChunkIndex:
    return ChunkIndex.from_batch({"input_ids": torch.zeros(rows_, tokens, dtype=torch.int64)}, length)


def raws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(config: BlockFFNConfig, width: int = 8, seed: int = 0, std: float = 0.5) -> BlockFFNLayer:
    made = BlockFFNLayer(width, config)
    made.draw(std, torch.Generator().manual_seed(seed))
    return made


# the router


def test_the_worked_example() -> None:
    raw = torch.tensor([[-1.0, 2.0, 0.5, -0.2]])
    n = normalize(raw, CONFIG)
    torch.testing.assert_close(n, torch.tensor([[0.0, 1.9403, 0.4851, 0.0]]), atol=1e-4, rtol=0)
    torch.testing.assert_close(expert_shares(n), torch.tensor([[0.0, 0.8, 0.2, 0.0]]), atol=1e-5, rtol=0)
    gain = torch.tensor([2.0, 3.0, 4.0, 5.0])
    torch.testing.assert_close(scores(raw, CONFIG, gain), n * gain)
    torch.testing.assert_close(
        normalize(raw, BlockFFNConfig(4, 3, norm="sum")), torch.tensor([[0, 0.8, 0.2, 0]]), atol=1e-5, rtol=0
    )
    assert torch.equal(normalize(raw, BlockFFNConfig(4, 3, norm="none")), F.relu(raw))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.floats(0.1, 50), st.sampled_from(["rms", "sum"]))
def test_a_positive_factor_changes_no_score_and_zeros_stay_zeros(seed: int, by: float, norm: Any) -> None:
    raw, config = raws(3, 6, seed=seed).double(), BlockFFNConfig(6, 2, norm=norm, eps=1e-12)
    torch.testing.assert_close(normalize(by * raw, config), normalize(raw, config))
    assert torch.equal(normalize(raw, config) > 0, raw > 0)
    if norm == "rms":
        open_ = (raw > 0).any(-1)
        torch.testing.assert_close(normalize(raw, config).square().mean(-1)[open_], torch.ones(int(open_.sum())))


@pytest.mark.parametrize("norm", ["rms", "sum", "none"])
def test_where_nothing_is_open_nothing_comes_out(norm: Any) -> None:
    made = layer(BlockFFNConfig(4, 3, norm=norm))
    with torch.no_grad():
        made.router.zero_()
    x = raws(2, 5, 8).requires_grad_()
    y = made(x)
    assert not y.any()
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert not made.active_units(x).any()


def test_scores_of_one_are_a_plain_mlp() -> None:
    made, x = layer(BlockFFNConfig(4, 3, router="none")), raws(2, 5, 8)
    plain = F.silu(x @ made.up.T) @ made.down
    torch.testing.assert_close(made(x), plain)
    with torch.no_grad():
        torch.testing.assert_close(made(x[0]), plain[0])
    assert made.active_units(x).all()


def test_the_layer_expert_by_expert_with_and_without_a_gradient() -> None:
    made, x = layer(CONFIG), raws(5, 8)
    score = scores(x @ made.router.T, CONFIG, made.gain)
    assert (score == 0).any()
    expected = sum(
        score[:, e, None] * (F.silu(x @ made.up[3 * e : 3 * e + 3].T) @ made.down[3 * e : 3 * e + 3]) for e in range(4)
    )
    torch.testing.assert_close(made(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(made(x), expected)
        torch.testing.assert_close(made.bfloat16()(x.bfloat16()).float(), expected, atol=0.1, rtol=0.1)


def test_the_routers_that_it_is_held_against() -> None:
    raw = raws(9, 6)
    top = scores(raw, BlockFFNConfig(6, 2, router="topk", k=2))
    assert ((top > 0).sum(-1) == 2).all()
    torch.testing.assert_close(top.sum(-1), torch.ones(9))
    best = raw.topk(2).values
    torch.testing.assert_close(top.max(-1).values / top.sort(-1).values[:, -2], (best[:, 0] - best[:, 1]).exp())
    assert torch.equal(scores(raw, BlockFFNConfig(6, 2, router="remoe", k=2)), F.relu(raw))
    # Balance is 1 where all experts are taken equally, and more where they are not.
    even = 9 * torch.eye(6)[:, None]
    torch.testing.assert_close(losses.balance(even, whole(1, 6, 2), 1), torch.tensor(1.0))
    assert losses.balance(9 * torch.eye(6)[:1, None].expand(6, 1, 6), whole(1, 6, 2), 1) > 5
    # f_e = (E / k) times the share of tokens that take e.
    two = torch.tensor([[[2.0, -1.0]], [[1.0, 3.0]]])
    torch.testing.assert_close(losses.l1(two, whole(1, 2, 2), 1), torch.tensor((2 * 2 + 2 * 1 + 1 * 3) / 2))


def test_inactive_experts_are_moved_by_locality_alone() -> None:
    raw = torch.tensor([[[0.5, -0.01, 0.3, -0.02]], [[0.4, -0.03, 0.2, 0.6]]], requires_grad=True)
    places = whole(1, 2, 2)
    (by_chunk,) = torch.autograd.grad(losses.chunk_firing(raw, places, CONFIG), raw)
    (by_score,) = torch.autograd.grad((scores(raw, CONFIG) * raws(2, 1, 4)).sum(), raw)
    (by_locality,) = torch.autograd.grad(losses.locality(raw, places), raw)
    for gradient in (by_chunk, by_score):
        assert not gradient[raw < 0].any()
        assert gradient[raw > 0].all()
    assert by_locality[raw < 0].all()
    far = torch.tensor([[[0.5, -0.9]], [[-0.5, -0.8]]], requires_grad=True)  # beyond the tails all is settled
    (settled,) = torch.autograd.grad(losses.locality(far, places), far)
    assert not settled[0, 0, 1].abs() > 1e-9


# the losses


def test_chunks_of_one_token_say_nothing() -> None:
    raw = raws(6, 2, 5).requires_grad_()
    loss = losses.chunk_firing(raw, whole(1, 6, 1), BlockFFNConfig(5, 2))
    torch.testing.assert_close(loss, torch.tensor(1 / 5), atol=5e-5, rtol=0)
    (gradient,) = torch.autograd.grad(loss, raw)
    assert gradient.abs().max() < 1e-4


def test_the_chunk_loss_of_the_worked_example_and_its_bounds() -> None:
    p = torch.tensor([[[0.8, 0.2, 0.0, 0.0]], [[0.0, 0.5, 0.5, 0.0]]])
    assert float(losses.chunk_firing_from_shares(p, whole(1, 2, 2))) == pytest.approx(0.475, abs=1e-4)
    one = torch.zeros(6, 1, 4)
    one[..., 2] = 1.0
    assert float(losses.chunk_firing_from_shares(one, whole(1, 6, 3))) == pytest.approx(1 / 4, abs=1e-4)
    apart = torch.eye(4)[:3, None]
    assert float(losses.chunk_firing_from_shares(apart, whole(1, 3, 3))) == pytest.approx(3 / 4, abs=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.integers(1, 6), st.integers(2, 6))
def test_the_chunk_loss_keeps_to_its_bounds(seed: int, length: int, experts: int) -> None:
    raw = raws(12, 2, experts, seed=seed) + 0.5
    open_ = (raw > 0).any(-1).all()
    loss = float(losses.chunk_firing(raw, whole(2, 6, length), BlockFFNConfig(experts, 2)))
    assert loss <= min(1, length / experts) + 1e-4
    assert not open_ or 6 % length or loss >= 1 / experts - 1e-3


def test_locality_is_a_cross_entropy_towards_each_other() -> None:
    places = whole(1, 4, 2)
    zeros = torch.zeros(4, 2, 3, requires_grad=True)
    assert float(losses.locality(zeros, places).detach()) == pytest.approx(math.log(2))
    alike = torch.tensor([0.5, -0.5, 1.0]).expand(4, 2, 3)
    assert float(losses.locality(alike, places)) < 1e-9
    raw = (0.02 * raws(4, 2, 3)).requires_grad_()
    was, now = (100 * raw[:-1]).sigmoid(), (100 * raw[1:]).sigmoid()
    by_hand = -(now * was.log() + (1 - now) * (1 - was).log()).mean()
    found = losses.locality(raw, places)
    torch.testing.assert_close(found, by_hand)
    mine, theirs = (torch.autograd.grad(loss, raw)[0] for loss in (found, by_hand))
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)
    assert mine[-1].any()  # the last token is a target alone: it is not detached
    assert float(losses.locality(raw[:1], whole(1, 1, 2))) == 0
    torch.testing.assert_close(losses.locality(raw.bfloat16(), places), losses.locality(raw.bfloat16().float(), places))


@pytest.mark.parametrize(
    ("router", "by_token", "by_chunk"), [("relu", 2 / 4, 1 / 4), ("topk", 2 / 4, 1 / 4), ("none", 0, 0)]
)
def test_inactive_experts_are_counted_for_tokens_and_chunks(router: str, by_token: float, by_chunk: float) -> None:
    """Four tokens in two chunks; of two experts, the second is never taken in the first chunk."""
    raw = torch.tensor([[[1.0, -1.0]], [[2.0, -1.0]], [[3.0, -2.0]], [[-1.0, 1.0]]])
    config = BlockFFNConfig(2, 2, router=router, k=1 if router == "topk" else None)
    counted = losses.inactive_fraction(raw, whole(1, 4, 2), config)
    assert [float(share) for share in counted] == [by_token, by_chunk]
    padding = {name: torch.zeros(1, 4, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    assert not any(losses.inactive_fraction(raw, ChunkIndex.from_batch(padding, 2), config))


def by_document(p: Tensor, lengths: list[int], length: int) -> float:
    """The chunk loss as the authors' code has it: each document filled up to whole chunks with p = 0."""
    found = []
    for document in p.split(lengths):
        for chunk in document.split(length):
            filled = F.pad(chunk, (0, 0, 0, length - len(chunk)))
            found.append(1 - torch.log(1 - filled + 1e-5).sum(0).exp())
    return float(torch.stack(found).mean())


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=4), st.integers(1, 7), st.integers(0, 99))
def test_chunks_and_neighbours_keep_to_their_documents(lengths: list[int], length: int, seed: int) -> None:
    total, longest = sum(lengths), sum(lengths) + 3
    batch = causal_batch([rows(*lengths), rows(longest)])  # the first row has three tokens of padding
    places = ChunkIndex.from_batch(batch, length)
    raw = raws(2 * longest, 1, 4, seed=seed)
    p = expert_shares(normalize(raw, CONFIG))[:, 0]
    spoilt = raw.clone()
    spoilt[total:longest] = 7.0  # padding
    own = torch.cat([p[:total], p[longest:]])
    expected = by_document(own, [*lengths, longest], length)
    for given_raw in (raw, spoilt):
        assert float(losses.chunk_firing(given_raw, places, CONFIG)) == pytest.approx(expected, abs=1e-5)
    pairs = [t for t in range(1, total) if t not in torch.tensor(lengths).cumsum(0).tolist()]
    pairs += [longest + t for t in range(1, longest)]
    assert places.follows_N.nonzero()[:, 0].tolist() == pairs
    assert int(places.real_N.sum()) == total + longest


@pytest.mark.parametrize("left", [False, True])
def test_padding_by_a_mask_on_either_side(left: bool) -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    if left:
        mask = mask.flip(1)
    places = ChunkIndex.from_batch({"input_ids": torch.zeros(2, 5, dtype=torch.int64), "attention_mask": mask}, 2)
    assert places.size_C.tolist() == [2, 2, 1, 2, 1]
    start = 7 if left else 5
    assert places.follows_N.nonzero()[:, 0].tolist() == [1, 2, 3, 4, start + 1, start + 2]
    raw = raws(10, 1, 4)
    p = expert_shares(normalize(raw, CONFIG))[:, 0]
    expected = by_document(torch.cat([p[:5], p[start : start + 3]]), [5, 3], 2)
    assert float(losses.chunk_firing(raw, places, CONFIG)) == pytest.approx(expected, abs=1e-5)


# the weight that follows its loss


def test_the_weight_follows_its_loss() -> None:
    follows = AdaptiveWeight(0.05, hold=4, window=2)
    for t, loss in enumerate([1.0, 1.0, 1.0, 1.2], start=1):
        assert follows.weight(t) == 0.05
        follows.observe(t, loss)
    # rho = 1.1 / 1.0, in a line over the next window
    assert [follows.weight(t) for t in (5, 6, 7)] == pytest.approx([0.0525, 0.055, 0.055])
    for t, loss in ((5, 0.55), (6, 0.55)):
        follows.observe(t, loss)
    assert follows.weight(8) == pytest.approx(0.055 / 2)  # down with the loss
    follows.observe(7, 0.5501)
    follows.observe(8, 0.5501)
    assert follows.weight(10) == pytest.approx(0.0275 * 1.025)  # up by 2.5 % at the least
    again = AdaptiveWeight(0.05, hold=4, window=2)
    again.load_state_dict(follows.state_dict())
    assert again == follows
    for t in range(9, 40):
        again.observe(t, 2.0**t)
    assert again.weight(50) == pytest.approx(4 * 0.05)  # and to four times the first at the most


def test_the_penalty_of_remoe_holds_a_sparsity() -> None:
    held = SparsityController(1.0, target=0.5)
    for sparsity, expected in ((0.4, 1.2), (0.6, 1.0), (0.5, 1.0)):
        held.observe(1, sparsity)
        assert held.weight(2) == pytest.approx(expected)


# fields


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"experts": 48, "width": 100}, "width is 100, which 48 experts do not divide; 96 or 144 would do"),
        ({"experts": 8, "width": 5}, "width is 5, which 8 experts do not divide; 8 would do"),
        ({"width": 48, "expert_width": 1}, "width and expert_width are given"),
        ({"expert_width": 0}, "greater than or equal to 1"),
        ({"experts": 4, "router": "topk", "k": 5}, "k is 5, more than the 4 experts"),
        ({"router": "topk"}, "router is topk, which needs k"),
        ({"k": 3}, "k belongs to the router topk or remoe, and router is relu"),
        ({"router": "none", "locality": 0.1}, "locality belongs to the router relu, and router is none"),
        ({"router": "topk", "k": 1, "norm": "rms"}, "norm belongs to the router relu"),
        ({"balance": 0.1}, "balance belongs to the router topk"),
        ({"router_decay": 0.1}, "router_decay belongs to a router_rate"),
        ({"router": "none", "router_rate": 0.1}, "router_rate belongs to the router relu or topk or remoe"),
        ({"chunk": 0}, "greater than or equal to 1"),
    ],
)
def test_fields_that_contradict_each_other(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        BlockFFN(**fields)
