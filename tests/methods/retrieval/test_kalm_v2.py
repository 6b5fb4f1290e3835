"""KaLMV2: focal weights, mixed negatives, instructions; each line of what makes it faithful."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from torch import Tensor, distributed

from intaglio.checkpoint import Checkpoint, load
from intaglio.checkpoint.soup import average
from intaglio.data.text_pairs import TextPair
from intaglio.errors import IntaglioError
from intaglio.methods.retrieval.kalm_v2 import (
    INSTRUCTION,
    KaLMV2,
    beta_2_2,
    focal_weight,
    list_mixed,
    mixable,
    pair_mixed,
)
from intaglio.modeling import bidirectional
from intaglio.trainer.batch_gathering import gathered
from intaglio.trainer.contrastive import Contrastive
from intaglio.trainer.encoder_training import SIDES
from intaglio.trainer.ranking_losses import info_nce
from intaglio.trainer.retrieval_evaluation import retrieval_evaluator
from intaglio.trainer.rng import generator
from tests.alive import alive
from tests.trainer.helpers import PAIRS, TEXTS, checkpoint, far, run, same, weights
from tests.trainer.test_encoder_training import BASE_DEFAULTS, DRAWS, batch_of

EXAMPLES = ({"temperature": 0.1}, {"temperature": 0.1, "matryoshka": [32, 8], "expanded_negatives": True})
ALIVE = {
    "variant": "plain",
    "loss_type": "margin_mse",
    "temperature": 0.2,
    "teacher_temperature": alive(2.0, loss_type="distillation"),
    "num_negatives": 1,
    "chunk_size": "test_chunks_are_made",
    "query_length": 3,
    "document_length": 5,
    "query_prompt": "q: ",
    "document_prompt": "d: ",
    "pooling": "last",
    "matryoshka": [8],
    "matryoshka_weights": alive([1.0, 0.1], matryoshka=[32, 8]),
    "matryoshka_per_step": alive(1, matryoshka=[32, 8]),
    "focal_gamma": 2.0,
    "detach_weight": False,
    "pair_mixes": 1,
    "list_mix": False,
    "list_temperature": 5.0,
    "share_mixed": True,
    "detach_mixed": True,
    "expanded_negatives": True,
    "gather_negatives": "test_two_processes_share_their_documents",
    "instruction": "find the text",
    "instruct_documents": alive(True, instruction="find the text"),
}
PLAIN: dict[str, Any] = {"focal_gamma": 0.0, "pair_mixes": 0, "list_mix": False}
UNIT = torch.eye(4)
NONE = torch.zeros(1, 3, dtype=torch.bool)
LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=6)


def units(count: int, seed: int = 0, width: int = 6) -> Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def batch(queries: int, negatives: int, **fields: Any) -> tuple[KaLMV2, Tensor, Tensor, dict[str, Any]]:
    """A method with vectors and a batch of queries, each with as many negatives."""
    method = KaLMV2(**{"temperature": 0.5, **fields})
    owner = torch.tensor([*range(queries), *(row for row in range(queries) for _ in range(negatives))])
    excluded = torch.zeros(queries, len(owner), dtype=torch.bool)
    made: dict[str, Any] = {"owner": owner, "excluded": excluded, **draws(method, owner, excluded)}
    return method, units(queries), units(len(owner), 1), made


def draws(method: KaLMV2, owner: Tensor, excluded: Tensor) -> dict[str, Tensor]:
    own = mixable(owner, excluded)
    drawn = [method._pairs(row.nonzero().flatten(), generator("pairs", n)) for n, row in enumerate(own)]
    names = ("pair_first", "pair_second", "pair_share")
    return {name: torch.cat(parts) for name, parts in zip(names, zip(*drawn, strict=True), strict=True)}


def loss(method: KaLMV2, *inputs: Any) -> float:
    return float(method.contrast(*inputs)[0])


@pytest.mark.parametrize(
    ("gamma", "weight", "expected"), [(0.5, 0.57858, 0.23583), (1, 0.33476, 0.13645), (2, 0.11206, 0.04568)]
)
def test_focal_loss_worked_example(gamma: float, weight: float, expected: float) -> None:
    """Logits (already / tau) [2,1,0], positive first: p = 0.66524, CE = 0.40761; gamma 0.5: w = 0.57858, loss 0.23583;
    gamma 1: 0.13645; gamma 2: 0.04568."""
    row = info_nce(torch.tensor([[2.0, 1.0, 0.0]]), NONE, reduction="none")
    assert float((-row).exp()) == pytest.approx(0.66524, abs=1e-5)
    for detach in (True, False):
        w = focal_weight(-row, gamma, detach=detach)
        assert float(w) == pytest.approx(weight, abs=1e-5)
        assert float(w * row) == pytest.approx(expected, abs=1e-5)


def test_the_weight_falls_with_the_probability() -> None:
    """p_i -> 1 gives weight 0; w in [0,1], monotone decreasing in p_i."""
    log_p = torch.linspace(-30, 0, 200)
    w = focal_weight(log_p, 0.5)
    assert w[-1] == 0
    assert (w <= 1).all()
    assert (w.diff() <= 0).all()
    assert w[150] > w[199]


def test_a_gradient_through_the_weight_is_finite_where_the_probability_is_one() -> None:
    """(1-p)^gamma with gamma < 1 has infinite gradient at p = 1 if not detached: clamp 1-p >= 1e-6."""
    log_p = torch.tensor([0.0, -1.0], requires_grad=True)
    focal_weight(log_p, 0.5, detach=False).sum().backward()
    assert log_p.grad is not None
    assert log_p.grad.isfinite().all()
    assert log_p.grad[1] < 0
    assert not focal_weight(log_p, 0.5).requires_grad


@settings(max_examples=20)
@given(LOGITS)
def test_gamma_zero_is_plain_info_nce(row: list[float]) -> None:
    """gamma = 0 equals plain InfoNCE exactly."""
    query, documents = torch.tensor([[1.0, 0.0]]), torch.tensor([[value, 0.0] for value in row])
    excluded = torch.zeros(1, len(row), dtype=torch.bool)
    made = {"owner": torch.zeros(len(row), dtype=torch.int64), "excluded": excluded}
    made |= {name: torch.zeros(0, dtype=torch.int64) for name in ("pair_first", "pair_second", "pair_share")}
    assert loss(KaLMV2(**PLAIN), query, documents, made) == float(info_nce(query @ documents.T / 0.01, excluded))


def test_pair_mixing_worked_examples() -> None:
    """Pair mixing with lam = 1 (or a = b) returns n_a; result always unit norm; of unit vectors at 90 degrees with lam
    0.5 -> (0.7071, 0.7071)."""
    a, b = UNIT[:1], UNIT[1:2]
    assert torch.allclose(pair_mixed(a, b, torch.tensor([0.5]))[0, :2], torch.tensor([0.7071, 0.7071]), atol=1e-4)
    assert torch.equal(pair_mixed(a, b, torch.tensor([1.0])), a)
    assert torch.equal(pair_mixed(a, b, torch.tensor([0.0])), b)
    assert torch.allclose(pair_mixed(a, a, torch.tensor([0.3])), a)
    mixed = pair_mixed(units(50), units(50, 1), torch.rand(50, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(mixed.norm(dim=1), torch.ones(50))


def test_shares_are_drawn_from_beta_2_2() -> None:
    """E[lam] = 0.5, Var = 0.05 for Beta(2,2)."""
    drawn = beta_2_2(40_000, torch.Generator().manual_seed(0))
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.005)
    assert float(drawn.var()) == pytest.approx(0.05, abs=0.002)
    assert float((drawn < 0.25).float().mean()) == pytest.approx(3 / 16 - 2 / 64, abs=0.01)  # 3 x^2 - 2 x^3


def test_list_mixing_worked_examples() -> None:
    """List-wise with scores (0.8, 0.6), tau' = 0.5 on basis vectors: alpha = (0.5987, 0.4013), normalised (0.8306,
    0.5568). tau' -> 0: hardest negative; tau' -> inf: normalised mean."""
    scores, own = torch.tensor([[0.8, 0.6, 9.0]]), torch.tensor([[True, True, False]])
    for temperature, expected in ((0.5, [0.8306, 0.5568]), (1e-3, [1.0, 0.0]), (1e6, [0.7071, 0.7071])):
        mixed = list_mixed(scores, own, UNIT[:3], temperature)
        assert mixed[0, :2].tolist() == pytest.approx(expected, abs=1e-4)
        assert mixed[0, 2] == 0


@settings(max_examples=25)
@given(
    st.integers(2, 4), st.integers(2, 4), st.booleans(), st.sampled_from([{"list_mix": False}, {"pair_mixes": 0}, {}])
)
def test_mixed_negatives_only_raise_losses(queries: int, negatives: int, shared: bool, parts: dict[str, Any]) -> None:
    """Adding synthetic negatives can only increase every l_i (denominator grows)."""
    method, query, document, made = batch(queries, negatives, focal_gamma=0.0, share_mixed=shared, **parts)
    scores = query @ document.T
    columns = list(method._mixed(query, document, scores, made))
    logits, left_out = (
        torch.cat([first, *more], 1)
        for first, more in zip((scores, made["excluded"]), zip(*columns, strict=True), strict=True)
    )
    with_mixed = info_nce(logits / 0.5, left_out, reduction="none")
    assert (with_mixed > info_nce(scores / 0.5, made["excluded"], reduction="none")).all()
    assert loss(method, query, document, made) == pytest.approx(float(with_mixed.mean()))


@pytest.mark.parametrize("negatives", [0, 1])
def test_without_two_negatives_nothing_is_mixed(negatives: int) -> None:
    """M = 0 or 1: no pair-wise mixing possible, must be a no-op not a crash."""
    method, *inputs = batch(3, negatives)
    assert not list(method._mixed(*inputs[:2], inputs[0] @ inputs[1].T, inputs[2]))
    plain = KaLMV2(**{**PLAIN, "temperature": 0.5, "focal_gamma": 0.5})
    assert loss(method, *inputs) == loss(plain, *inputs)


def test_mixed_negatives_are_made_of_the_querys_own() -> None:
    """Pairs are distinct negatives of one query, as many as it has; texts relevant to it are left out."""
    method, _, _, made = batch(3, 4)
    first, second, owner = made["pair_first"], made["pair_second"], made["owner"]
    assert torch.equal(owner[first], owner[second])
    assert (first != second).all()
    assert torch.equal(owner[first].bincount(), torch.tensor([4, 4, 4]))
    made["excluded"][0, 3:5] = True
    again = draws(method, owner, made["excluded"])
    assert not set(again["pair_first"].tolist() + again["pair_second"].tolist()) & {3, 4}
    assert torch.equal(owner[again["pair_first"]].bincount(), torch.tensor([2, 4, 4]))
    assert mixable(owner, made["excluded"]).sum(1).tolist() == [2, 4, 4]


def test_every_pair_of_negatives_is_drawn() -> None:
    method, own = KaLMV2(pair_mixes=300), torch.tensor([5, 6, 9])
    first, second, share = method._pairs(own, torch.Generator().manual_seed(0))
    counts = torch.tensor([((first == a) & (second == b)).sum() for a in own for b in own if a != b])
    assert counts.sum() == len(share) == 300
    assert counts.min() > 25


def test_mixed_negatives_serve_their_own_query_or_all() -> None:
    """Own query only, or all of the batch but those to which a mixed text is relevant."""
    for shared in (False, True):
        method, query, document, made = batch(2, 2, share_mixed=shared, pair_mixes=1)
        made["excluded"][1, 2] = True  # the first negative of query 0 is relevant to query 1
        (_, pairs), (_, lists) = method._mixed(query, document, query @ document.T, made)
        assert pairs.tolist() == lists.tolist() == [[False, not shared], [True, False]]
        made["excluded"][1, 2] = False
        (_, pairs), (_, lists) = method._mixed(query, document, query @ document.T, made)
        assert pairs.any() != shared
        assert lists.any() != shared


def test_gradients_of_mixed_negatives() -> None:
    """Let gradient flow (flag to detach as in MoCHi)."""
    for detached in (False, True):
        method, query, document, made = batch(1, 2, detach_mixed=detached, focal_gamma=0.0)
        document.requires_grad_()
        columns = method._mixed(query, document, query @ document.T, made)
        assert [scores.requires_grad for scores, _ in columns] == [not detached] * 2


def test_the_weight_has_a_gradient_on_request() -> None:
    """Detach w_i by default; provide `detach_weight` flag: standard focal loss does not detach."""
    losses, gradients = [], []
    for detached in (True, False):
        method, query, document, made = batch(2, 2, detach_weight=detached)
        value, _ = method.contrast(query, document.requires_grad_(), made)
        losses.append(value.item())
        gradients.append(torch.autograd.grad(value, document)[0])
    assert losses[0] == losses[1]
    assert not torch.allclose(gradients[0], gradients[1], atol=1e-3)


def test_list_mixing_has_a_temperature_of_its_own() -> None:
    """tau' = tau; with tau = 0.01 this is nearly the single hardest negative, so expose tau'."""
    values = [loss(*batch(2, 3, list_temperature=temperature)) for temperature in (None, 0.5, 5.0)]
    assert values[0] == values[1] != pytest.approx(values[2], abs=1e-5)


def test_the_weight_has_the_denominator_of_the_loss() -> None:
    """Focal weight must use the same Z_i as the loss (including synthetic and cross-device negatives)."""
    method, query, document, made = batch(3, 3, focal_gamma=1.0, expanded_negatives=True)
    scores = query @ document.T
    mixed = list(method._mixed(query, document, scores, made))
    expanded = list(method._expanded(query, document, made["excluded"]))
    parts = [(scores, made["excluded"]), *mixed, *expanded]
    total = sum((part / 0.5).exp().masked_fill(left_out, 0).sum(1) for part, left_out in parts)
    p = (scores.diagonal() / 0.5).exp() / total
    assert loss(method, query, document, made) == pytest.approx(float(((1 - p) * -p.log()).mean()), rel=1e-5)


def test_expanded_negatives_leave_out_what_is_relevant() -> None:
    """Append the off-diagonal q-q and p-p similarity blocks to the logits."""
    method, query, document, made = batch(3, 1)
    made["excluded"][0, 2] = True
    (queries, left_out), (positives, also) = method._expanded(query, document, made["excluded"])
    assert torch.equal(queries, query @ query.T)
    assert torch.equal(positives, document[:3] @ document[:3].T)
    assert left_out.long().tolist() == also.long().tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]


def trained(tmp_path: Path, **fields: Any) -> tuple[Checkpoint, KaLMV2]:
    ckpt, method = checkpoint(layers=1), KaLMV2(**{"temperature": 0.1, **fields})
    ckpt.tokenizer.pad_token = None
    run(ckpt, PAIRS, objective=method, steps=2)
    ckpt.model.eval()
    ckpt.save(tmp_path / "out")
    return ckpt, method


@pytest.mark.parametrize(("sizes", "weighted"), [([32], None), ([32, 16, 8], [1.0, 0.3, 0.2])])
def test_the_plain_loss_is_that_of_sentence_transformers(sizes: list[int], weighted: Any, tmp_path: Path) -> None:
    """Peer: same base, same batches, same tau; check plain loss equality to 1e-6."""
    ckpt, _ = trained(tmp_path)
    stock = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    method = KaLMV2(**PLAIN, temperature=0.1, matryoshka=sizes, matryoshka_weights=weighted)
    made = batch_of(method, ckpt)
    made["excluded"] = torch.zeros_like(made["excluded"])  # theirs leaves out no text that is known to be relevant
    inputs = {name: {key: made[f"{name}_{key}"] for key in ("input_ids", "attention_mask")} for name in SIDES}
    places = ([0, 1, 2, 3], [4, 6, 8, 10], [5, 7, 9, 11])  # the positives, and two negatives of each
    columns = [inputs["query"], *({key: v[own] for key, v in inputs["document"].items()} for own in places)]
    ranking = MultipleNegativesRankingLoss(stock, scale=10.0)
    theirs = MatryoshkaLoss(stock, ranking, sizes, weighted)([dict(column) for column in columns], None)
    assert method.loss(ckpt.model, made).total.item() == pytest.approx(theirs.item(), rel=1e-6)


def test_expanded_queries_are_those_of_sentence_transformers() -> None:
    """The q-q block of the authors' code is a direction of the peer's loss."""
    method, query, document, made = batch(4, 1, **PLAIN)
    scores = query @ document.T
    (block, left_out), _ = method._expanded(query, document, made["excluded"])
    logits, excluded = torch.cat([scores, block], 1) / 0.5, torch.cat([made["excluded"], left_out], 1)
    peer = MultipleNegativesRankingLoss(None, scale=2.0, directions=("query_to_doc", "query_to_query"))
    theirs = peer.compute_loss_from_embeddings([query, document[:4], document[4:]], None)
    assert float(info_nce(logits, excluded)) == pytest.approx(float(theirs), rel=1e-6)


def test_stock_modules_of_sentence_transformers_give_equal_vectors(tmp_path: Path) -> None:
    """Stock loading of a decoder whose tokenizer, as most, came without a padding token."""
    ckpt, method = trained(tmp_path, instruction="find {it}", instruct_documents=False, query_prompt="q ")
    stock = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert stock[0].auto_model.config.is_causal is False
    for name, encode in (("query", stock.encode_query), ("document", stock.encode_document)):
        expected = method.encode(ckpt, [TEXTS[0], "a dog"], name)
        assert torch.allclose(torch.tensor(encode([TEXTS[0], "a dog"])), expected, atol=1e-5)
    assert stock.prompts == {"query": "Instruct: find {it} \n Query: q ", "document": ""}


def test_a_decoder_that_stays_causal_is_refused_at_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """is_causal attribute trick without checking: assert bidirectionality at load time."""
    trained(tmp_path)
    load(tmp_path / "out").encoder()
    monkeypatch.setattr(bidirectional, "_sees_later_tokens", lambda parts: False)
    with pytest.raises(IntaglioError, match=r"cannot be made bidirectional; variant: plain is accepted$") as caught:
        load(tmp_path / "out").encoder()
    assert "\n" not in str(caught.value)


def test_the_first_token_sees_the_last() -> None:
    """Bidirectionality: changing the LAST token changes the FIRST token's hidden state."""
    method = KaLMV2().setup(checkpoint())
    ids = torch.tensor([[9, 10, 11, 12], [9, 10, 11, 13]])
    hidden = method._parts.base(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    assert not torch.equal(hidden[0, 0], hidden[1, 0])
    causal = KaLMV2(variant="plain").setup(checkpoint())
    hidden = causal._parts.base(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    assert torch.equal(hidden[0, 0], hidden[1, 0])


def test_a_soup_of_encoders(tmp_path: Path) -> None:
    """Soup of K identical checkpoints is the identity; weights (1,0,..) return the first; mixed shapes raise."""
    one, _ = trained(tmp_path)
    two = checkpoint(layers=1)
    run(two, PAIRS, objective=KaLMV2(temperature=0.1), steps=2, seed=1)
    states = [weights(one), weights(two)]
    assert same(average([states[0]] * 3), states[0])
    assert same(average(states, [1.0, 0.0]), states[0])
    assert 0 < far(average(states), states[0]) < far(states[1], states[0])
    with pytest.raises(IntaglioError, match="has the shape"):
        average([states[0], weights(checkpoint(layers=1, hidden_size=64, intermediate_size=64))])


def test_instructions_come_before_the_query_and_symmetric_texts() -> None:
    """Query side "Instruct: {task} \\n Query: {text}"; documents raw. Symmetric tasks put the instruction on both."""
    ckpt = checkpoint()
    method = KaLMV2(instruction="find", query_prompt="q ", document_prompt="d ").setup(ckpt)
    pair = TextPair("a", "b", instruction="match", symmetric=True)
    own = TextPair("a", "b", instruction="match")
    both = KaLMV2(instruction="find", instruct_documents=True).setup(ckpt)
    cases = [
        (method, "query", None, INSTRUCTION.format("find") + "q "),
        (method, "document", None, "d "),
        (method, "query", pair, INSTRUCTION.format("match") + "q "),
        (method, "document", pair, INSTRUCTION.format("match") + "d "),
        (both, "document", None, INSTRUCTION.format("find")),
        (both, "document", own, ""),
        (both, "query", TextPair("a", "b"), INSTRUCTION.format("find")),
        (KaLMV2().setup(ckpt), "query", None, ""),
    ]
    for made, name, given_pair, prompt in cases:
        expected = ckpt.tokenizer(prompt + TEXTS[0], truncation=True, max_length=made.length(name))["input_ids"]
        assert made.read(TEXTS[0], name, given_pair)[0] == expected
    first, second = (
        batch_of(method, ckpt, [{**PAIRS[0], **more}]) for more in ({}, {"instruction": "match", "symmetric": True})
    )
    for name in ("query_input_ids", "document_input_ids"):
        assert first[name].tolist() != second[name].tolist()


def test_held_out_pairs_are_searched_with_their_own_instructions() -> None:
    """Query side "Instruct: {task} \\n Query: {text}"; symmetric tasks put the instruction on both sides."""
    ckpt, read = checkpoint(layers=1), []

    class Noted(KaLMV2):
        def _prompt(self, name: str, pair: TextPair | None = None) -> str:
            read.append((name, super()._prompt(name, pair)))
            return super()._prompt(name, pair)

    pairs = [
        TextPair("a", TEXTS[0], (TEXTS[1],), instruction="match", symmetric=True),
        TextPair("b", TEXTS[2], (TEXTS[0],), instruction="find"),
        TextPair("a", TEXTS[2]),
    ]
    method = Noted().setup(ckpt)
    read.clear()
    retrieval_evaluator(method, pairs)(ckpt)
    match, find = (INSTRUCTION.format(name) for name in ("match", "find"))
    documents = [("document", match), ("document", match), ("document", "")]
    assert read == [("query", match), ("query", find), *documents]


def test_pairs_are_drawn_anew_each_epoch() -> None:
    method, ckpt = KaLMV2(), checkpoint(layers=1)
    first, again, other = (batch_of(method, ckpt, epoch=epoch) for epoch in (0, 0, 1))
    assert torch.equal(first["pair_share"], again["pair_share"])
    assert not torch.equal(first["pair_share"], other["pair_share"])
    assert len(first["pair_share"].unique()) == 8
    assert not len(batch_of(KaLMV2(loss_type="distillation"), ckpt, [{**PAIRS[0], "scores": [1, 0, 0]}])["pair_first"])


def test_chunks_are_made() -> None:
    ckpt, method, rows = checkpoint(layers=1), KaLMV2(chunk_size=2), []
    made = batch_of(method, ckpt)
    method._parts.base.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    method.loss(ckpt.model, made)
    assert max(rows) == 2


def test_scores_are_float32_under_autocast() -> None:
    """Softmax with tau 0.01 in bf16: compute logits in fp32."""
    vectors = {name: units(n, n, 32) for name, n in (("query", 4), ("document", 12))}

    class Fixed(KaLMV2):
        def vectors(self, model: Any, inputs: Any, name: str) -> Tensor:
            return vectors[name]

    ckpt, method = checkpoint(layers=1), Fixed()
    made = batch_of(method, ckpt)
    expected = method.loss(ckpt.model, made).total
    with torch.autocast("cpu", torch.bfloat16):
        assert float(method.loss(ckpt.model, made).total) == float(expected)


def test_defaults() -> None:
    assert KaLMV2().model_dump() == {
        **BASE_DEFAULTS, "variant": "bidirectional", "pooling": "mean", "temperature": 0.01, "matryoshka": None,
        "matryoshka_weights": None, "matryoshka_per_step": None, "focal_gamma": 0.5, "detach_weight": True,
        "pair_mixes": None, "list_mix": True, "list_temperature": None, "share_mixed": False, "detach_mixed": False,
        "expanded_negatives": False, "gather_negatives": True, "instruction": "", "instruct_documents": False,
    }  # fmt: skip


def test_the_authors_settings() -> None:
    made = KaLMV2.paper(query_length=8)
    assert (made.query_length, made.document_length, made.num_negatives) == (8, 512, 7)
    assert dict(zip(made.matryoshka or [], made.matryoshka_weights or [], strict=True)) == {
        896: 1.0, 512: 0.3, 256: 0.2, 128: 0.1, 64: 0.1,
    }  # fmt: skip


class Processes:
    """Two processes as the second of them sees them: what the first sends is prepared."""

    def __init__(self, first: dict[str, Any], vectors: list[Tensor]) -> None:
        self.first, self.vectors = first, vectors

    def all_gather_object(self, every: list[Any], own: dict[str, Any]) -> None:
        every[:] = [{name: self.first[name] for name in own}, dict(own)]

    def all_gather(self, pieces: list[Tensor], own: Tensor) -> None:
        sent = self.vectors.pop(0)
        pieces[0][: len(sent)], pieces[1][:] = sent, own


def test_a_gathered_batch_is_that_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Official cross-device gather detaches other ranks' embeddings; a single-process test will not show it."""
    method, ckpt = KaLMV2(temperature=0.5, matryoshka=[32, 8], matryoshka_per_step=1), checkpoint(layers=1)
    pairs = [*PAIRS[:2], {"query": PAIRS[0]["query"], "positive": TEXTS[20]}, *PAIRS[3:5], PAIRS[5]]
    rows = [
        {**row, "id": n, "epoch": 0}
        for n, row in enumerate(method.prepare(ckpt, [dict(pair) for pair in pairs], DRAWS))
    ]
    whole, first, second = (method.collate(part, DRAWS) for part in (rows, rows[:3], rows[3:]))
    for made in (whole, first, second):
        made["teacher"] = made["number"] / 7
    queries, documents = units(6, 3, 32), units(len(whole["owner"]), 4, 32)
    here = (torch.tensor([False] * 3 + [True] * 3), whole["owner"] >= 3)
    own = [vectors[place].clone().requires_grad_() for vectors, place in zip((queries, documents), here, strict=True)]
    there = [vectors[~place] for vectors, place in zip((queries, documents), here, strict=True)]
    fake = Processes(first, there)
    for name, value in {"is_initialized": True, "get_world_size": 2, "get_rank": 1}.items():
        monkeypatch.setattr(distributed, name, lambda value=value: value)
    for name in ("all_gather_object", "all_gather"):
        monkeypatch.setattr(distributed, name, getattr(fake, name))
    query, document, made = gathered(*own, second)
    assert torch.equal(query, queries)
    assert torch.equal(document, documents)
    for name in ("owner", "number", "excluded", "relevant", "pair_first", "pair_second", "pair_share", "teacher"):
        assert torch.equal(made[name], whole[name]), name
    assert made["sizes"] == first["sizes"]
    (query.sum() + document.sum()).backward()
    assert all((vectors.grad == 2).all() for vectors in own if vectors.grad is not None)
    assert own[0].grad is not None
    fake.vectors = [vectors[~place] for vectors, place in zip((queries, documents), here, strict=True)]
    alone = method.model_copy(update={"gather_negatives": False})
    own_loss = alone.compare(*own, second).total
    assert method.compare(*own, second).total.item() != pytest.approx(own_loss.item())
    with torch.no_grad():  # while evaluating each process has all rows
        assert method.compare(*own, second).total.item() == own_loss.item()


SCRIPT = """
import os, sys, torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from intaglio.methods.retrieval.kalm_v2 import KaLMV2
from tests.trainer.helpers import PAIRS, checkpoint, run, weights
ckpt = checkpoint(layers=1)
method = KaLMV2(temperature=0.2, gather_negatives=sys.argv[2] == "shared")
done = run(ckpt, PAIRS, objective=method, **eval(sys.argv[3]))
if os.environ["RANK"] == "0":
    save_file(weights(ckpt), sys.argv[1])
    print(*[line.loss for line in done.history])
"""


@pytest.mark.slow
def test_two_processes_share_their_documents(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    arguments: dict[str, Any] = {"batch_size": 4, "steps": 4, "optimizer": "sgd", "learning_rate": 0.05}
    alone = checkpoint(layers=1)
    one = run(alone, PAIRS, objective=KaLMV2(temperature=0.2), **arguments)
    out, script = tmp_path / "out.safetensors", tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    apart = []
    for how in ("shared", "apart"):
        words = [*command, str(out), how, repr(arguments)]
        done = subprocess.run(words, check=True, env=environment, capture_output=True, text=True)
        losses = [float(value) for value in done.stdout.split()]
        apart.append(far(load_file(out), weights(alone)))
        assert (losses == pytest.approx([line.loss for line in one.history], abs=1e-5)) == (how == "shared")
    assert apart[0] < 1e-5 < apart[1]


def test_contrastive_is_the_plain_loss() -> None:
    """Matryoshka with dims=[full], weight 1 equals the base loss; without focal weights and mixing it is InfoNCE."""
    ckpt, losses = checkpoint(layers=1), []
    for method in (
        KaLMV2(**PLAIN, temperature=0.05),
        KaLMV2(**PLAIN, temperature=0.05, matryoshka=[32], matryoshka_weights=[1.0]),
        Contrastive(variant="bidirectional", pooling="mean"),
    ):
        losses.append(float(method.loss(ckpt.model, batch_of(method, ckpt)).total))
    assert losses[0] == losses[1] == losses[2]
