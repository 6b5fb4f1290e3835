"""Mistral-SPLADE: weights over the vocabulary from a decoder, each line of what makes it faithful."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SparseEncoder
from transformers import AutoConfig, AutoModelForMaskedLM

from intaglio.checkpoint import Checkpoint
from intaglio.data.vocabulary_terms import token_texts, usable_terms
from intaglio.errors import DivergedError, IntaglioError
from intaglio.exporters import export
from intaglio.methods.retrieval.mistral_splade import MistralSplade
from intaglio.methods.retrieval.mistral_splade.functional import (
    flops,
    l1,
    merged,
    pruned,
    quadratic_ramp,
    splade_weights,
    surface_forms,
)
from intaglio.methods.retrieval.vdr import VDR
from intaglio.trainer import KeyedRNG
from intaglio.trainer.text_batches import side
from tests.alive import alive
from tests.families import FAMILIES as ALL
from tests.families import tiny_tokenizer
from tests.trainer.helpers import PAIRS, TEXTS, checkpoint, run
from tests.trainer.test_encoder_training import batch_of

FAMILIES = tuple(ALL)
EXAMPLES = (
    {},
    {"variant": "bidirectional", "merge_forms": "case", "query_terms": 6, "document_terms": 12},
    {"variant": "plain", "threshold": 0.1, "adaptation": 0.5, "query_expansion": False, "pooling": "sum"},
)
ALIVE = {
    "variant": "plain",
    "loss_type": "test_margin_mse_is_the_bases",
    "temperature": 2.0,
    "teacher_temperature": alive(2.0, loss_type="distillation"),
    "num_negatives": 1,
    "chunk_size": "test_conformance_of_chunks",
    "query_length": 3,
    "document_length": 5,
    "query_prompt": "q: ",
    "document_prompt": "d: ",
    "pooling": "sum",
    "head": "embeddings",
    "logit_scale": "width",
    "threshold": 0.5,
    "query_weight": 0.1,
    "document_weight": 0.1,
    "query_regularizer": alive("l1", query_weight=0.1),
    "document_regularizer": alive("l1", document_weight=0.1),
    "regularizer_warmup": alive(0.0, query_weight=0.1),
    "adaptation": 0.5,
    "merge_forms": "case",
    "query_expansion": False,
    "query_terms": 3,
    "document_terms": 3,
    "min_weight": 0.5,
}
DRAWS = KeyedRNG(0)
WEIGHTS = st.lists(st.lists(st.floats(0, 9, width=32), min_size=4, max_size=4), min_size=1, max_size=5)


def test_pooling_worked_example() -> None:
    """Logits [[1,-2],[3,0.5]]: max pooling -> (log 4, log 1.5); sum pooling -> (2.0794, 0.4055)."""
    logits = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    assert splade_weights(logits, [2]).tolist() == [pytest.approx([math.log(4), math.log(1.5)])]
    assert splade_weights(logits, [2], "sum").tolist() == [pytest.approx([2.0794, 0.4055], abs=1e-4)]


def test_max_commutes_with_the_activation_and_sum_does_not() -> None:
    """log1p(relu(.)) commutes with max (monotone); not with sum."""
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    activated = logits.relu().log1p()
    assert torch.equal(splade_weights(logits, [3, 4])[1], activated[3:].amax(0))
    assert not torch.allclose(splade_weights(logits, [3, 4], "sum")[1], logits[3:].sum(0).relu().log1p())


def test_gradient_is_at_the_arg_max_alone() -> None:
    """Exact zeros where all logits <= 0; gradient zero there (dead dims) and 1/(1+Z) at the arg-max only."""
    logits = torch.tensor([[1.0, -2.0, 2.0], [3.0, -1.0, 0.5]], requires_grad=True)
    weights = splade_weights(logits, [2])
    weights.sum().backward()
    assert weights[0, 1] == 0
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0, 0, pytest.approx(1 / 3)], [0.25, 0, 0]]


def test_regularisers_worked_example() -> None:
    """FLOPS of [[1,0],[3,2]] = 2^2 + 1^2 = 5; L1 = (1 + 5)/2 = 3."""
    weights = torch.tensor([[1.0, 0.0], [3.0, 2.0]])
    assert (float(flops(weights)), float(l1(weights))) == (5.0, 3.0)


@given(WEIGHTS)
def test_flops_is_at_most_the_mean_square(rows: list[list[float]]) -> None:
    """For a batch of one, FLOPS = sum_j w_j^2; by Jensen FLOPS <= mean_i ||w_i||_2^2."""
    weights = torch.tensor(rows, dtype=torch.float64)
    assert float(flops(weights)) <= float(weights.square().sum(1).mean()) * (1 + 1e-9)
    assert torch.allclose(flops(weights[:1]), weights[:1].square().sum())


def test_the_schedule_is_quadratic() -> None:
    """The lambda schedule hits 0 at t = 0, lam/4 at T0/2, lam at T0."""
    assert [quadratic_ramp(step, 20) for step in (0, 10, 20, 40)] == [0, 0.25, 1, 1]
    assert quadratic_ramp(0, 0) == 1


@given(WEIGHTS, st.integers(1, 4))
def test_pruning_keeps_the_largest(rows: list[list[float]], terms: int) -> None:
    """Top-k pruning with k = V is identity; otherwise at most k remain, none smaller than one that went."""
    weights = torch.tensor(rows)
    assert torch.equal(pruned(weights, 4), weights)
    kept = pruned(weights, terms)
    assert ((kept != 0).sum(1) <= terms).all()
    for row, own in zip(weights, kept, strict=True):
        assert sorted(own.tolist(), reverse=True)[:terms] == sorted(row.tolist(), reverse=True)[:terms]


def test_small_weights_are_dropped() -> None:
    assert pruned(torch.tensor([[0.2, 0.5, 0.9]]), None, 0.5).tolist() == [[0, 0, pytest.approx(0.9)]]


def test_surface_forms_share_a_dimension() -> None:
    """Surface forms ("_the" vs "the", case variants) are distinct dims; optionally merged by max before scoring."""
    texts, terms = ["<s>", "the", " the", " The", "x", "\ufffd", "\ufffd"], torch.tensor([False] + [True] * 6)
    assert surface_forms(texts, terms, "none").tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert surface_forms(texts, terms, "space").tolist() == [0, 1, 1, 3, 4, 5, 6]
    assert surface_forms(texts, terms, "case").tolist() == [0, 1, 1, 1, 4, 5, 6]
    weights = torch.tensor([[0.0, 1.0, 3.0, 2.0, 5.0, 0.0, 0.0]])
    assert merged(weights, surface_forms(texts, terms, "case")).tolist() == [[0, 3, 0, 0, 5, 0, 0]]


def test_special_and_blank_tokens_are_no_terms() -> None:
    tokenizer = tiny_tokenizer("llama")
    texts = token_texts(tokenizer, 162)
    terms = usable_terms(tokenizer, texts)
    assert not terms[:4].any()
    assert not terms[160:].any()  # rows of the model beyond the tokenizer
    blank = [n for n, text in enumerate(texts[:160]) if not text.strip() and n > 3]
    assert blank
    assert not terms[blank].any()
    assert terms.sum() == 162 - 4 - 2 - len(blank)


def test_first_copy_and_template_are_never_pooled() -> None:
    """First-copy positions must never be pooled: perturbing the pooling mask there is detectable."""
    ckpt, method = checkpoint(), MistralSplade()
    inputs = side(batch_of(method, ckpt), "document")
    weights = method.embed(ckpt.model, inputs, "document")
    logits = ckpt.model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    mask = inputs["pool_mask"]
    expected = logits.masked_fill(~mask[..., None], -torch.inf).amax(1).relu().log1p() * method._splade.terms_V
    assert torch.allclose(weights, expected, atol=1e-5)
    wider = {**inputs, "pool_mask": inputs["attention_mask"].bool()}
    assert not torch.allclose(method.embed(ckpt.model, wider, "document"), weights, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma3", "bert"])
def test_the_head_is_the_models_own_or_its_embeddings(family: str) -> None:
    ckpt = checkpoint(family)
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    embeddings = MistralSplade(head="embeddings", logit_scale=0.5, threshold=0.25).setup(ckpt)
    expected = hidden @ ckpt.model.get_input_embeddings().weight.T * 0.5 - 0.25
    assert torch.allclose(embeddings.logits(hidden), expected, atol=1e-5)
    width = MistralSplade(logit_scale="width").setup(ckpt)
    assert torch.allclose(width.logits(hidden), MistralSplade().setup(ckpt).logits(hidden) * 32**-0.25, atol=1e-5)


def test_no_expansion_keeps_the_querys_own_terms() -> None:
    ckpt = checkpoint()
    method = MistralSplade(query_expansion=False, variant="plain").setup(ckpt)
    own = set(ckpt.tokenizer(TEXTS[0])["input_ids"])
    (query,), (document,) = (method.encode(ckpt, [TEXTS[0]], name) for name in ("query", "document"))
    assert set(query.nonzero().flatten().tolist()) <= own
    assert not set(document.nonzero().flatten().tolist()) <= own
    assert torch.equal(query[list(own)], document[list(own)])


@pytest.mark.parametrize("variant", ["plain", "echo"])
def test_no_expansion_keeps_merged_forms_of_the_text_alone(variant: Any) -> None:
    """Own tokens count by the form that stands for them; words of the echo's template are not the text's."""
    ckpt = checkpoint()
    fields = {"variant": variant, "merge_forms": "case"}
    whole = MistralSplade(**fields).encode(ckpt, [TEXTS[0]], "query")[0]
    method = MistralSplade(query_expansion=False, **fields).setup(ckpt)
    ids, start, stop, _ = method.read(TEXTS[0], "query")
    standing = method._splade.standing_V[torch.tensor(ids[start:stop])]
    assert not torch.equal(standing, torch.tensor(ids[start:stop]))
    expected = torch.zeros_like(whole)
    expected[standing] = whole[standing]
    assert torch.allclose(method.encode(ckpt, [TEXTS[0]], "query")[0], expected)


def test_each_side_has_its_own_number_of_terms() -> None:
    ckpt, method = checkpoint(), MistralSplade(query_terms=2, document_terms=5)
    counts = [(method.encode(ckpt, TEXTS[:2], name) != 0).sum(1).tolist() for name in ("query", "document")]
    assert counts == [[2, 2], [5, 5]]


def test_without_regularisers_it_is_plain_info_nce() -> None:
    """lam = 0: equals plain InfoNCE on sparse scores; each side has its own penalty, with its ramp."""
    ckpt, values = checkpoint(), {}
    for weight, temperature in ((0.0, 1.0), (0.0, 3.0), (0.5, 3.0)):
        given: dict[str, Any] = {"query_weight": weight, "document_weight": 2 * weight, "query_regularizer": "l1"}
        method = MistralSplade(**given, **({} if temperature == 1 else {"temperature": temperature}))
        batch = batch_of(method, ckpt, step=2, steps=12)
        values[weight, temperature] = method.loss(ckpt.model, batch)
    vectors = {name: method.vectors(ckpt.model, side(batch, name), name) for name in ("query", "document")}
    scores = vectors["query"] @ vectors["document"].T
    for temperature in (1.0, 3.0):
        expected = torch.nn.functional.cross_entropy(scores / temperature, torch.arange(len(scores)))
        assert torch.allclose(values[0.0, temperature].total, expected, rtol=1e-5)
    penalty = 0.25 * (0.5 * l1(vectors["query"]) + 1.0 * flops(vectors["document"]))
    assert torch.allclose(values[0.5, 3.0].total - values[0.0, 3.0].total, penalty, rtol=1e-3)
    parts = values[0.5, 3.0].parts
    assert float(parts["query_terms"]) == pytest.approx(float((vectors["query"] != 0).sum(1).float().mean()))
    assert float(parts["document_least_terms"]) == int((vectors["document"] != 0).sum(1).min())


def test_adaptation_trains_the_next_token_under_the_causal_mask() -> None:
    """A short adaptation phase: causal LM head + sparsity regularisation before contrastive training."""
    ckpt = checkpoint()
    method = MistralSplade(variant="bidirectional", adaptation=0.5, query_weight=0.0, document_weight=0.0)
    batch = batch_of(method, ckpt, PAIRS[:2], step=4, steps=10)
    assert "next_token" in method.loss(ckpt.model, batch).parts
    assert "accuracy" in method.loss(ckpt.model, {**batch, "step": 5}).parts
    stock, total, count = checkpoint(), 0.0, 0
    for pair in PAIRS[:2]:
        for text in (pair["query"], pair["positive"], *pair["negatives"]):  # type: ignore[misc]
            ids = torch.tensor([stock.tokenizer(text)["input_ids"]])
            total += stock.model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    assert method.loss(ckpt.model, batch).total.item() == pytest.approx(total / count, rel=1e-4)
    assert ckpt.model.config.is_causal is False
    penalised = MistralSplade(variant="bidirectional", adaptation=0.5, query_weight=0.0, document_weight=1.0)
    loss = penalised.setup(ckpt).loss(ckpt.model, batch)
    penalty = float(loss.total - loss.parts["next_token"])
    assert penalty == pytest.approx(float(loss.parts["document_penalty"]), rel=1e-3)


def test_adaptation_of_doubled_texts_predicts_the_first_copy() -> None:
    ckpt = checkpoint()
    method = MistralSplade(adaptation=0.5, query_weight=0.0, document_weight=0.0)
    batch = batch_of(method, ckpt, [{"query": "a fox", "positive": "a dog"}, {"query": "a sun", "positive": "a river"}])
    loss = method.loss(ckpt.model, batch).total.item()
    for name in ("query", "document"):
        second = batch[f"{name}_pool_mask"]
        batch[f"{name}_input_ids"] = torch.where(second, 50, batch[f"{name}_input_ids"])
    assert float(method.loss(ckpt.model, batch).parts["next_token"]) == pytest.approx(loss)


def test_collapsed_vectors_stop_the_training_and_name_the_step() -> None:
    """All-zero collapse (dead relu has no gradient): training stops and says at which step sparsity collapsed."""
    ckpt = checkpoint(layers=1)
    with pytest.raises(DivergedError, match="sparsity collapsed at step 1: every query vector is zero") as caught:
        run(ckpt, PAIRS, objective=MistralSplade(threshold=1e6))
    assert "\n" not in str(caught.value)


def test_a_decoder_without_a_head_is_refused() -> None:
    ckpt = checkpoint()
    ckpt.model = ckpt.model.model
    with pytest.raises(IntaglioError, match="needs a language-model head, and LlamaModel has none"):
        MistralSplade().setup(ckpt)
    MistralSplade(head="embeddings").setup(ckpt)
    with pytest.raises(IntaglioError, match="is no decoder with a head"):
        MistralSplade(adaptation=0.1).setup(checkpoint("bert"))


@pytest.mark.parametrize("method", [MistralSplade(head="embeddings", variant="plain"), VDR()])
def test_embeddings_of_another_width_are_refused(method: Any) -> None:
    config = AutoConfig.for_model("electra", **ALL["bert"].sizes(1), embedding_size=16)
    ckpt = Checkpoint(AutoModelForMaskedLM.from_config(config), tiny_tokenizer("bert"), "tiny")
    with pytest.raises(IntaglioError, match="hidden states of 32 numbers against embeddings of 16"):
        method.setup(ckpt)
    MistralSplade(variant="plain").setup(ckpt)


def test_margin_mse_is_the_bases() -> None:
    ckpt = checkpoint(layers=1)
    pairs = [{**pair, "scores": [0.9, 0.4, 0.6]} for pair in PAIRS[:4]]
    losses = [row.loss for row in run(ckpt, pairs, objective=MistralSplade(loss_type="margin_mse"), steps=3).history]
    assert losses != [row.loss for row in run(checkpoint(layers=1), pairs, objective=MistralSplade(), steps=3).history]


def test_conformance_of_chunks() -> None:
    """Chunks change no result, so they are tested in `tests/test_conformance_encoders.py`; here, that they are made."""
    ckpt, method, rows = checkpoint(layers=1), MistralSplade(chunk_size=2), []
    batch = batch_of(method, ckpt)
    method._parts.base.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    method.loss(ckpt.model, batch)
    assert max(rows) == 2


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"variant": "plain", "logit_scale": "width"}),
        ("llama_tied", {"variant": "bidirectional", "logit_scale": 0.5, "query_prompt": "q: "}),
        ("gemma3", {"variant": "plain", "head": "embeddings", "pooling": "sum"}),
        ("qwen3", {"variant": "bidirectional", "query_length": 4}),
        ("bert", {"variant": "plain", "logit_scale": 0.5}),
    ],
)
def test_stock_modules_compute_the_same_vectors(family: str, fields: Any, tmp_path: Path) -> None:
    ckpt = checkpoint(family)
    run(ckpt, PAIRS, objective=MistralSplade(**fields), steps=2)
    ckpt.model.eval()
    before = {name: value.clone() for name, value in ckpt.model.state_dict().items()}
    export(ckpt, tmp_path / "out", "sentence-transformers")
    assert all(torch.equal(before[name], value) for name, value in ckpt.model.state_dict().items())
    stock = SparseEncoder(str(tmp_path / "out"), device="cpu")
    texts = [TEXTS[0], "a dog", TEXTS[5]]
    for name, encode in (("query", stock.encode_query), ("document", stock.encode_document)):
        expected = ckpt.encoder().encode(ckpt, texts, name)
        assert torch.allclose(encode(texts, convert_to_tensor=True).to_dense(), expected, atol=1e-4)
        assert bool((expected > 0).any())


@pytest.mark.parametrize(
    ("family", "fields", "says"),
    [
        ("llama", {}, "variant echo reads it twice"),
        ("llama", {"variant": "plain", "merge_forms": "space"}, "merge_forms is 'space'"),
        ("llama", {"variant": "plain", "threshold": 0.1}, "threshold is 0.1"),
        ("llama", {"variant": "plain", "query_expansion": False}, "query_expansion is False"),
        ("gpt2", {"variant": "plain"}, "numbers positions from the start of a row"),
    ],
)
def test_what_stock_modules_cannot_compute_is_refused(family: str, fields: Any, says: str, tmp_path: Path) -> None:
    ckpt = checkpoint(family, layers=1)
    run(ckpt, PAIRS, objective=MistralSplade(**fields), steps=1)
    with pytest.raises(IntaglioError, match=says) as caught:
        export(ckpt, tmp_path / "out", "sentence-transformers")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
