"""VDR: every dimension is a word; each line of what makes it faithful."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intaglio.errors import IntaglioError
from intaglio.methods.retrieval.vdr import VDR
from intaglio.methods.retrieval.vdr.functional import (
    activation,
    bag_of_tokens,
    contrastive_mask,
    pooled_activations,
    sparse_mask,
)
from intaglio.trainer.contrastive import Contrastive
from intaglio.trainer.encoder_training import SIDES
from intaglio.trainer.term_explanation import explain, terms_of
from intaglio.trainer.text_batches import side
from tests.alive import alive
from tests.families import FAMILIES as ALL
from tests.trainer.helpers import PAIRS, TEXTS, checkpoint, run
from tests.trainer.test_encoder_training import batch_of

FAMILIES = ("bert", *(name for name in ALL if name != "bert"))
EXAMPLES = ({"terms": 16}, {"terms": 8, "shared": False, "semi_parametric": False, "document_view": "tokens"})
BASE = {"terms": 16, "temperature": 5.0}
ALIVE = {
    "variant": alive("echo"),
    "loss_type": "test_margin_mse_compares_views",
    "temperature": 2.0,
    "teacher_temperature": alive(2.0, loss_type="distillation"),
    "num_negatives": 1,
    "chunk_size": "test_chunks_are_made",
    "query_length": 3,
    "document_length": 5,
    "query_prompt": "q: ",
    "document_prompt": "d: ",
    "semi_parametric": False,
    "terms": 4,
    "lexical": alive(False, terms=2),
    "pooled_positions": 2,
    "normalize": True,
    "bag_losses": False,
    "contrastive_mask": True,
    "shared": False,
    "whole_words": True,
    "query_view": "dense",
    "document_view": "tokens",
    "official_pad_pooling": True,
}
LOGITS = st.lists(st.lists(st.floats(-9, 9, width=32), min_size=3, max_size=3), min_size=1, max_size=6)


def observe(method: VDR) -> Any:
    from tests.alive import encoded

    return encoded(method, "bert")


def views(method: VDR, ckpt: Any, batch: Any) -> tuple[Any, Any]:
    """The dense vectors and the bags of both sides."""
    inputs = {name: side(batch, name) for name in SIDES}
    return [method.vectors(ckpt.model, inputs[name], name) for name in SIDES], [method.bag(inputs[n]) for n in SIDES]


def contrast(a: Any, b: Any, temperature: float = 1.0) -> Any:
    """Rows over all documents plus columns over the positives; no document is excluded in PAIRS."""
    scores, target = a @ b.T / temperature, torch.arange(len(a))
    cross_entropy = torch.nn.functional.cross_entropy
    return cross_entropy(scores, target) + cross_entropy(scores[:, : len(a)].T, target)


def test_activation_worked_example() -> None:
    """a(-1), a(0), a(1) = 0.3679, 1, 2; derivative 1 at 0 from both sides."""
    z = torch.tensor([-1.0, 0.0, 1.0, -1e-4, 1e-4], requires_grad=True)
    value = activation(z)
    assert value[:3].tolist() == pytest.approx([math.exp(-1), 1, 2])
    value.sum().backward()
    assert z.grad is not None
    assert z.grad[[1, 3, 4]].tolist() == pytest.approx([1, 1, 1], abs=2e-4)


@given(LOGITS)
def test_max_commutes_with_the_activation(rows: list[list[float]]) -> None:
    """max_t a(z_t) = a(max_t z_t); a is positive and monotone; the mean of all positions is the mean activation."""
    logits = torch.tensor(rows)
    assert torch.equal(pooled_activations(logits, [len(rows)])[0], activation(logits).amax(0))
    assert torch.allclose(pooled_activations(logits, [len(rows)], 99)[0], activation(logits).mean(0))
    assert (activation(logits) > 0).all()


def test_the_bag_counts_no_token_twice() -> None:
    """bow(x) in {0,1}^V: 1 for each token id present; bow_q . v_p = sum of v_p over the query's distinct tokens."""
    ids, mask = torch.tensor([[3, 5, 5, 0], [1, 3, 0, 0]]), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    terms = torch.tensor([True, False, True, True, True, True])
    assert bag_of_tokens(ids, mask, terms).tolist() == [[0, 0, 0, 1, 0, 1], [0, 0, 0, 1, 0, 0]]


@given(st.integers(0, 6), st.booleans())
def test_sparse_mask_keeps_the_largest_and_the_lexical(terms: int, lexical: bool) -> None:
    """k = -1/V: the sparse view is the dense view. k = 0: only own tokens. nnz(v_s) <= k + #distinct tokens."""
    vectors = torch.tensor([[0.5, 3.0, 2.0, 0.1, 1.0]])
    bag = torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0]])
    mask = sparse_mask(vectors, terms, bag if lexical else None)[0]
    largest = [1, 2, 4, 0, 3][:terms]
    assert set(mask.nonzero().flatten().tolist()) == {*largest, *([3] if lexical else [])}
    assert sparse_mask(vectors, None, None).all()


def test_the_loss_is_the_mean_of_the_contrasts() -> None:
    """SVDR: 1/4 [C(q_s,p) + C(q,p_s) + C(bow_q,p) + C(q,bow_p)]; VDR: 1/2 [C(q_s,p) + C(bow_q,p)]."""
    ckpt = checkpoint("bert", layers=1)
    for semi in (True, False):
        method = VDR(terms=5, semi_parametric=semi, temperature=2.0)
        batch = batch_of(method, ckpt)
        assert not batch["excluded"].any()
        (q, p), (bow_q, bow_p) = views(method, ckpt, batch)
        q_s, p_s = method.sparse_view(q, bow_q), method.sparse_view(p, bow_p)
        wanted = [(q_s, p), (bow_q, p), *([(q, p_s), (q, bow_p)] if semi else [])]
        expected = torch.stack([contrast(a, b, 2.0) for a, b in wanted]).mean()
        assert torch.allclose(method.loss(ckpt.model, batch).total, expected, rtol=1e-5)


@pytest.mark.parametrize("semi", [True, False])
def test_without_the_bags_the_sparse_views_remain(semi: bool) -> None:
    """Ablation without bow losses: C(q_s, p), with documents' sparse views if semi."""
    ckpt = checkpoint("bert", layers=1)
    method = VDR(terms=5, semi_parametric=semi, bag_losses=False)
    batch = batch_of(method, ckpt)
    (q, p), (bow_q, bow_p) = views(method, ckpt, batch)
    wanted = [(method.sparse_view(q, bow_q), p), *([(q, method.sparse_view(p, bow_p))] if semi else [])]
    expected = torch.stack([contrast(a, b) for a, b in wanted]).mean()
    assert torch.allclose(method.loss(ckpt.model, batch).total, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="contrastive_mask deals words to bags"):
        VDR(bag_losses=False, contrastive_mask=True)


def test_all_terms_make_the_sparse_view_dense() -> None:
    """k = V: sparse view equals the dense view; then C(q_s,p) = C(q,p)."""
    ckpt = checkpoint("bert", layers=1)
    method = VDR(terms=None)
    (q, _), (bag, _) = views(method, ckpt, batch_of(method, ckpt))
    assert torch.equal(method.sparse_view(q, bag), q)


def test_masked_entries_have_no_gradient() -> None:
    """Entries zeroed by the mask get zero gradient from C(q_s,.), but still get gradient from the dense-view terms."""
    method = VDR(terms=2)
    vectors = torch.tensor([[0.5, 3.0, 2.0, 0.1]], requires_grad=True)
    method.sparse_view(vectors, torch.tensor([[0.0, 0.0, 0.0, 1.0]])).sum().backward()
    assert vectors.grad is not None
    assert vectors.grad.tolist() == [[0, 1, 1, 1]]


def test_a_dimension_is_the_layer_norm_against_a_words_embedding() -> None:
    """Using the MLM decoder instead of tied input embeddings changes the method; specials and blanks are no words."""
    ckpt = checkpoint("bert")
    method = VDR().setup(ckpt)
    with torch.no_grad():
        method._owned["query_norm"].weight.mul_(2.0)
    ids, *_ = method.read(TEXTS[0], "query")
    hidden = ckpt.model.bert(torch.tensor([ids])).last_hidden_state[0]
    normal = torch.nn.functional.layer_norm(hidden, (32,)) * 2
    logits = normal @ ckpt.model.get_input_embeddings().weight.T
    expected = activation(logits).amax(0) * method._terms_V
    dense = method.model_copy(update={"query_view": "dense"})
    dense._owned, dense._sides = method._owned, method._sides
    assert torch.allclose(dense.encode(ckpt, [TEXTS[0]], "query")[0], expected, rtol=1e-4, atol=1e-5)
    assert not method._terms_V[:5].any()


def test_normalised_vectors_have_unit_length() -> None:
    ckpt = checkpoint("bert")
    method = VDR(normalize=True, query_view="dense", document_view="tokens")
    for name in SIDES:
        assert torch.allclose(method.encode(ckpt, TEXTS[:3], name).norm(dim=1), torch.ones(3), atol=1e-5)


def test_padding_is_pooled_only_on_request() -> None:
    """Our implementation must be padding invariant; `official_pad_pooling` pools pad positions, for parity alone."""
    ckpt = checkpoint("bert")
    for official in (False, True):
        method = VDR(official_pad_pooling=official)
        together = method.encode(ckpt, [TEXTS[0], "a dog"], "document")[1]
        alone = method.encode(ckpt, ["a dog"], "document")[0]
        assert torch.allclose(together, alone, atol=1e-4) != official


def test_documents_as_tokens_need_no_pass() -> None:
    """Semi-parametric: bow index - passages represented only by their binary token sets (no encoding of the corpus)."""
    ckpt = checkpoint("bert")
    method = VDR(document_view="tokens").setup(ckpt)
    ckpt.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    method._parts.base.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    (document,) = method.encode(ckpt, [TEXTS[0]], "document")
    own = {token for token in method.read(TEXTS[0], "document")[0] if method._terms_V[token]}
    assert set(document.nonzero().flatten().tolist()) == own
    assert set(document[list(own)].tolist()) == {1.0}


def test_the_explanation_sums_to_the_score_exactly() -> None:
    """sum_j v_q[j] v_p[j] over all dims = score."""
    ckpt = checkpoint("bert")
    method = VDR(terms=12)
    explanation = explain(method, ckpt, "the lazy dog", TEXTS[0])
    assert math.fsum(term.weight for term in explanation.terms) == explanation.score
    (q,), (p,) = (
        method.encode(ckpt, [text], name) for text, name in (("the lazy dog", "query"), (TEXTS[0], "document"))
    )
    assert explanation.score == pytest.approx(float(q @ p), rel=1e-5)
    assert [term.weight for term in explanation.terms] == sorted((t.weight for t in explanation.terms), reverse=True)


def test_the_words_of_a_text_line_up_with_their_weights() -> None:
    """Map id = dim + shift for every dim: no word vanishes, and each has its own weight."""
    ckpt = checkpoint("bert")
    method = VDR(terms=12)
    terms = terms_of(method, ckpt, TEXTS[0])
    (vector,) = method.encode(ckpt, [TEXTS[0]], "document")
    assert len(terms) == int((vector != 0).sum())
    for term in terms:
        assert term.weight == float(vector[term.id])
        assert ckpt.tokenizer.convert_ids_to_tokens(term.id) == term.token
    with pytest.raises(IntaglioError, match="dense vectors"):
        terms_of(Contrastive(), ckpt, "a dog")


def test_contrastive_mask_deals_unused_words() -> None:
    """Dims not present in any bow are dealt round-robin (dim j to item j mod B): weight 1 there, partner zeroed."""
    bags = torch.tensor([[1.0, 0, 0, 0, 0, 0], [0.0, 1, 0, 0, 0, 0]])
    partners = torch.full((3, 6), 5.0)
    terms = torch.tensor([True] * 5 + [False])
    dealt, masked = contrastive_mask(bags, partners, terms)
    assert dealt.tolist() == [[1, 0, 1, 0, 1, 0], [0, 1, 0, 1, 0, 0]]
    assert masked.tolist() == [[5, 5, 0, 5, 0, 5], [5, 5, 5, 0, 5, 5], [5, 5, 5, 5, 5, 5]]


def test_contrastive_mask_acts_on_the_bag_contrasts_alone() -> None:
    ckpt = checkpoint("bert", layers=1)
    method = VDR(terms=5, contrastive_mask=True)
    batch = batch_of(method, ckpt)
    (q, p), (bow_q, bow_p) = views(method, ckpt, batch)
    q_s, p_s = method.sparse_view(q, bow_q), method.sparse_view(p, bow_p)
    dealt_q, masked_p = contrastive_mask(bow_q, p, method._terms_V)
    dealt_p, masked_q = contrastive_mask(bow_p, q, method._terms_V)
    wanted = [(q_s, p), (q, p_s), (dealt_q, masked_p), (masked_q, dealt_p)]
    expected = torch.stack([contrast(a, b) for a, b in wanted]).mean()
    assert torch.allclose(method.loss(ckpt.model, batch).total, expected, rtol=1e-5)


def test_separate_weights_are_trained_and_kept_apart() -> None:
    ckpt = checkpoint("bert", layers=1)
    before = {name: value.clone() for name, value in ckpt.model.state_dict().items()}
    method = VDR(shared=False, terms=8)
    run(ckpt, PAIRS, objective=method, steps=2, warmup=0)
    names = [name for name, _ in method.modules()["document"].named_parameters()]
    own = dict(method.modules()["document"].named_parameters())
    moved = [name for name in names if not torch.equal(own[name], before[f"bert.{name}"])]
    assert moved
    assert any(not torch.equal(own[name], ckpt.model.state_dict()[f"bert.{name}"]) for name in moved)
    (query,), (document,) = (ckpt.encoder().encode(ckpt, ["a dog"], name) for name in SIDES)
    assert not torch.equal(query, document)


def test_separate_documents_have_a_norm_and_words_of_their_own() -> None:
    """Separate weights for query and passage: each side's hidden states, layer norm and word embeddings."""
    ckpt = checkpoint("bert", layers=1)
    method = VDR(shared=False, query_view="dense", document_view="dense").setup(ckpt)
    owned, draws = method.modules(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in ("document", "document_norm", "query_norm"):
            for weight in owned[name].parameters():
                weight.add_(0.1 * torch.randn(weight.shape, generator=draws))
    for name, base in (("query", ckpt.model.bert), ("document", owned["document"])):
        ids, *_ = method.read(TEXTS[0], name)
        normal = owned[f"{name}_norm"](base(torch.tensor([ids])).last_hidden_state[0])
        expected = activation(normal @ base.embeddings.word_embeddings.weight.T).amax(0) * method._terms_V
        assert torch.allclose(method.encode(ckpt, [TEXTS[0]], name)[0], expected, rtol=1e-4, atol=1e-5)


def test_whole_words_leave_out_pieces() -> None:
    ckpt = checkpoint("bert")
    whole = VDR(whole_words=True).setup(ckpt)._terms_V
    every = VDR().setup(ckpt)._terms_V
    tokens = ckpt.tokenizer.convert_ids_to_tokens(list(range(160)))
    assert [tokens[n].startswith("Ġ") for n in whole.nonzero().flatten().tolist()] == [True] * int(whole.sum())
    assert (every | whole).equal(every)


def test_margin_mse_compares_views() -> None:
    ckpt = checkpoint("bert", layers=1)
    pairs = [{**pair, "scores": [0.9, 0.4, 0.6]} for pair in PAIRS[:4]]
    method = VDR(terms=5, loss_type="margin_mse", semi_parametric=False)
    batch = batch_of(method, ckpt, pairs)
    (q, p), (bow_q, _) = views(method, ckpt, batch)
    scores = [method.sparse_view(q, bow_q) @ p.T, bow_q @ p.T]
    expected = torch.stack([method.ranking_loss(score, batch) for score in scores]).mean()
    assert torch.allclose(method.loss(ckpt.model, batch).total, expected)


def test_chunks_are_made() -> None:
    ckpt, method, rows = checkpoint("bert", layers=1), VDR(chunk_size=2), []
    batch = batch_of(method, ckpt)
    method._parts.base.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    method.loss(ckpt.model, batch)
    assert max(rows) == 2
