"""DupMAE: two decodings of what an encoder reads, each line of what makes them faithful."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForMaskedLM

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.methods.objectives.dupmae import DupMAE, bag_loss, bag_weights
from intaglio.methods.objectives.dupmae.decoder import EnhancedDecoder, row_masks
from intaglio.trainer import KeyedRNG
from intaglio.trainer.causal_lm import IGNORED
from intaglio.trainer.cls_and_terms import ClsAndTerms
from intaglio.trainer.masked_lm import MaskedLM, whole_word_mask
from intaglio.trainer.rng import generator
from tests.families import FAMILIES as ALL
from tests.families import tiny_tokenizer
from tests.trainer.helpers import PAIRS, TEXTS, checkpoint, run
from tests.trainer.test_encoder_training import batch_of

EXAMPLES = ({"length": 24}, {"length": 24, "retromae": True})
FAMILIES = ("bert", "modernbert")
ALIVE = {
    "mask_ratio": 0.6,
    "length": 12,
    "decoder_mask_ratio": 0.9,
    "decoder_weight": 0.0,
    "bow_weight": 1.0,
    "retromae": True,
    "chunk_size": "test_chunks_change_no_loss",
}
DRAWS = KeyedRNG(0)


def observe(method: DupMAE) -> Any:
    ckpt = checkpoint("bert", layers=1)
    result = run(ckpt, TEXTS, objective=method, steps=3, warmup=0)
    return ckpt.model.state_dict(), [(row.loss, row.parts) for row in result.history]


def prepared(ckpt: Any, texts: Any = TEXTS[:3], **fields: Any) -> tuple[DupMAE, Any]:
    """A method and a batch of texts."""
    method = DupMAE(length=24, **fields)
    examples = [{"input_ids": ckpt.tokenizer(text)["input_ids"], "id": n} for n, text in enumerate(texts)]
    rows = [{**row, "id": n, "epoch": 0} for n, row in enumerate(method.prepare(ckpt, examples, DRAWS))]
    return method, method.collate(rows[:3], DRAWS)


@given(st.lists(st.booleans(), min_size=6, max_size=30), st.floats(0.05, 1.0), st.integers(0, 99))
def test_whole_words_are_masked(begins: list[bool], ratio: float, seed: int) -> None:
    """Whole words in random order, special tokens never; at most the wanted number, unless one word has more."""
    begins_L = torch.tensor(begins)
    special_L = torch.zeros(len(begins), dtype=torch.bool)
    special_L[[0, -1]] = True
    mask = whole_word_mask(begins_L, special_L, ratio, generator(seed))
    assert not mask[special_L].any()
    assert mask.any()
    for n in range(2, len(begins) - 1):  # a continuation goes with the token before it
        assert begins[n] or mask[n] == mask[n - 1]
    word = (begins_L | special_L | torch.cat([torch.ones(1).bool(), special_L[:-1]])).cumsum(0)
    assert mask.sum() <= max(1, round(len(begins) * ratio)) or len(word[mask].unique()) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_without_decoder_and_bag_it_is_masked_language_modelling(family: str) -> None:
    """bow weight 0 and decoder loss off equals BERT whole-word MLM exactly."""
    ckpt = checkpoint(family, layers=1)
    method, batch = prepared(ckpt, decoder_weight=0.0, bow_weight=0.0)
    stock = ckpt.model(batch["input_ids"], batch["attention_mask"], labels=batch["target"]).loss
    assert torch.allclose(method.loss(ckpt.model, batch).total, stock, atol=1e-5)
    plain = MaskedLM(mask_ratio=0.3, length=24)
    examples = [{"input_ids": ckpt.tokenizer(text)["input_ids"], "id": n} for n, text in enumerate(TEXTS[:3])]
    rows = [{**row, "id": n, "epoch": 0} for n, row in enumerate(plain.prepare(ckpt, examples, DRAWS))][:3]
    assert torch.equal(plain.loss(ckpt.model, plain.collate(rows, DRAWS)).total, method.loss(ckpt.model, batch).total)


def test_the_parts_are_weighted() -> None:
    """L = L_dec + 0.1 * L_bow + L_enc; v1 has no bag of words."""
    ckpt = checkpoint("bert", layers=1)
    method, batch = prepared(ckpt)
    loss = method.loss(ckpt.model, batch)
    parts = loss.parts
    expected = parts["encoder"] + parts["decoder"] + 0.1 * parts["bag_of_words"]
    assert torch.allclose(loss.total, torch.as_tensor(expected))
    other = DupMAE(length=24, decoder_weight=2.0, bow_weight=0.5)
    other._parts, other._head, other._owned = method._parts, method._head, method._owned
    other._special_V = method._special_V
    assert torch.allclose(
        other.loss(ckpt.model, batch).total, parts["encoder"] + 2 * parts["decoder"] + 0.5 * parts["bag_of_words"]
    )
    first, same_batch = prepared(ckpt, retromae=True)
    assert set(first.loss(ckpt.model, same_batch).parts) == {"encoder", "decoder"}
    with pytest.raises(ValueError, match="retromae has no bag of words"):
        DupMAE(retromae=True, bow_weight=0.2)


def test_the_bag_worked_example() -> None:
    """V = 4, pooled logits (2,1,0,-1), text ids [0,0,1]: w = (1/3,1/3,0,0), loss 0.6268."""
    weights = bag_weights(torch.tensor([[0, 0, 1, 3]]), torch.tensor([[True, True, True, False]]), 4)
    assert weights.tolist() == [pytest.approx([1 / 3, 1 / 3, 0, 0])]
    assert float(bag_loss(torch.tensor([[2.0, 1.0, 0.0, -1.0]]), weights)) == pytest.approx(0.6268, abs=1e-4)
    nothing = bag_weights(torch.tensor([[0, 1]]), torch.tensor([[False, False]]), 4)
    assert nothing.tolist() == [[0, 0, 0, 0]]  # a text of only specials gives n = 0


def test_pooled_logits_ignore_padding_order_and_the_first_position() -> None:
    """Padding invariant, invariant to permuting positions of Z; L_bow's gradient spares position 0."""
    ckpt = checkpoint("bert", layers=1)
    method, _ = prepared(ckpt)
    hidden = torch.randn(2, 6, 32, generator=generator(1)).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    pooled = method.pooled_logits(hidden, mask)
    assert torch.allclose(method.pooled_logits(hidden[1:, :4], mask[1:, :4])[0], pooled[1], atol=1e-5)
    assert torch.allclose(method.pooled_logits(hidden[:, [0, 3, 2, 1, 4, 5]], mask), pooled, atol=1e-5)
    pooled.sum().backward()
    assert hidden.grad is not None
    assert not hidden.grad[:, 0].any()
    assert not hidden.grad[1, 4:].any()


def test_chunks_change_no_loss() -> None:
    ckpt = checkpoint("bert", layers=1)
    losses = [m.loss(ckpt.model, b).parts["bag_of_words"] for m, b in (prepared(ckpt, chunk_size=n) for n in (1, 2, 8))]
    assert losses[0].item() == pytest.approx(losses[1].item()) == pytest.approx(losses[2].item())


def test_row_masks() -> None:
    """Diagonal all hidden; column 0 visible for rows >= 1; mean hidden share about p_dec*L/(L-2); rows differ."""
    length = 40
    begins, special = torch.ones(length).bool(), torch.zeros(length).bool()
    special[[0, -1]] = True
    visible = row_masks(begins, special, 0.5, generator(0))
    assert not visible.diagonal().any()
    assert visible[1:, 0].all()
    off = ~torch.eye(length).bool()[:, 1:-1]
    share = float((~visible[:, 1:-1])[off].float().mean())
    assert abs(share - 0.5 * length / (length - 2)) < 0.03
    assert len({tuple(row.tolist()) for row in visible}) > length // 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_the_decoder_does_not_see_its_own_token(family: str) -> None:
    """Output of row i is unchanged when the input embedding of token i is changed (column i hidden), for i >= 1."""
    ckpt = checkpoint(family, layers=1)
    method, batch = prepared(ckpt)
    sentence = torch.randn(3, 32, generator=generator(2))
    before = method.decoded(sentence, batch)
    for place in (1, 4):
        changed = {**batch, "ids": batch["ids"].clone()}
        changed["ids"][:, place] = 77
        after = method.decoded(sentence, changed)
        assert torch.equal(after[:, place], before[:, place])
        assert not torch.equal(after, before)


@pytest.mark.parametrize("retromae", [False, True])
def test_the_decoder_is_a_bert_layer_over_two_streams(retromae: bool) -> None:
    """Feed identical ids, masks and weights to both decoders and compare; the residual is on the query stream.

    H1 = LayerNorm(h + pos_i + type_0), in v1 h + pos_i; H2 = [h, Emb(ids)[1:]].
    """
    ckpt = checkpoint("bert", layers=1)
    method, batch = prepared(ckpt, retromae=retromae)
    bert, own, length = ckpt.model.bert, method.modules()["decoder"], batch["ids"].shape[1]
    layer = type(bert.encoder.layer[0])(ckpt.config)
    stock = layer.attention
    pairs = [(stock.self.query, own.query), (stock.self.key, own.key), (stock.self.value, own.value)]
    pairs += [(stock.output.dense, own.output), (stock.output.LayerNorm, own.attention_norm)]
    pairs += [(layer.intermediate.dense, own.into), (layer.output.dense, own.out)]
    pairs += [(layer.output.LayerNorm, own.output_norm)]
    draws = generator(5)
    with torch.no_grad():
        for theirs, ours in pairs:
            for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
                b.add_(0.3 * torch.randn(b.shape, generator=draws))
                a.copy_(b)
    h = torch.randn(3, 32, generator=draws)[:, None]
    embeddings = bert.embeddings
    place = embeddings.position_embeddings.weight[:length]
    query = h + place
    if not retromae:
        query = embeddings.LayerNorm(query + embeddings.token_type_embeddings.weight[0])
    words = torch.cat([h, embeddings(input_ids=batch["ids"])[:, 1:]], dim=1)
    q, k, v = (
        linear(states).unflatten(-1, (4, 8)).transpose(1, 2)
        for linear, states in ((stock.self.query, query), (stock.self.key, words), (stock.self.value, words))
    )
    mask = batch["visible"][:, None]
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    layer.eval()
    hidden = stock.output(mixed, query)
    expected = layer.output(layer.intermediate(hidden), hidden)
    real = batch["attention_mask"].bool()
    assert torch.allclose(method.decoded(h[:, 0], batch)[real], expected[real], atol=1e-5)


def test_retromae_on_a_roberta_counts_positions_as_the_model_does() -> None:
    """RoBERTa's first token is at position padding_idx + 1: queries and keys of the decoder agree on it."""
    config = AutoConfig.for_model("roberta", **ALL["bert"].sizes(1))
    ckpt = Checkpoint(AutoModelForMaskedLM.from_config(config), tiny_tokenizer("bert"), "tiny")
    method, batch = prepared(ckpt, retromae=True)
    seen: list[Any] = []
    method.modules()["decoder"].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    method.decoded(torch.zeros(3, 32), batch)
    length = batch["ids"].shape[1]
    expected = ckpt.model.roberta.embeddings.position_embeddings.weight[1 : length + 1]
    assert torch.equal(seen[0], expected.expand(3, -1, -1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("retromae", [False, True])
def test_with_every_word_hidden_a_row_knows_the_sentence_and_its_place(retromae: bool, family: str) -> None:
    """With p_dec = 1.0, two texts with equal h and equal length give equal decoder outputs."""
    ckpt = checkpoint(family, layers=1)
    method, batch = prepared(ckpt, decoder_mask_ratio=1.0, retromae=retromae)
    length = 12
    ids = batch["ids"][:2, :length].clone()
    ids[:, -1] = ckpt.tokenizer.sep_token_id
    visible = torch.stack([row_masks(method._begins_V[row], method._special_V[row], 1.0, generator(3)) for row in ids])
    assert not torch.equal(ids[0], ids[1])
    same = {"ids": ids, "visible": visible}
    one, two = method.decoded(torch.ones(2, 32), same)
    assert torch.allclose(one, two, atol=1e-6)
    assert not torch.allclose(one[1], one[2], atol=1e-4)  # places differ


def test_the_decoders_gradient_reaches_the_encoder_through_h_alone() -> None:
    """Detach h and the encoder layers get zero gradient from L_dec."""
    ckpt = checkpoint("bert", layers=2)
    method, batch = prepared(ckpt)
    hidden = method.hidden(batch)
    for detached in (True, False):
        ckpt.model.zero_grad()
        sentence = hidden[:, 0].detach() if detached else hidden[:, 0]
        loss = method.prediction_loss(method.decoded(sentence, batch), batch["targets"])
        loss.backward(retain_graph=True)
        layers = [p.grad for p in ckpt.model.bert.encoder.parameters()]
        assert any(g is not None and g.any() for g in layers) != detached
    hidden.retain_grad()
    ckpt.model.zero_grad()
    method.prediction_loss(method.decoded(hidden[:, 0], batch), batch["targets"]).backward()
    assert hidden.grad is not None
    assert not hidden.grad[:, 1:].any()


def test_targets_of_the_two_decodings() -> None:
    """Decoder labels exclude [CLS]/[SEP]/pad; encoder labels only masked tokens; padded columns hidden for all rows."""
    ckpt = checkpoint("bert", layers=1)
    _, batch = prepared(ckpt, [TEXTS[0], "a dog", "the sun"])
    special = torch.isin(batch["ids"], torch.tensor(ckpt.tokenizer.all_special_ids))
    real = batch["attention_mask"].bool()
    assert torch.equal(batch["targets"] != IGNORED, real & ~special)
    assert torch.equal(batch["targets"][real & ~special], batch["ids"][real & ~special])
    known = batch["target"] != IGNORED
    assert torch.equal(batch["target"][known], batch["ids"][known])
    assert (known & ~special).equal(known)
    assert not batch["visible"].transpose(1, 2)[~real].any()
    assert batch["weight"] == 3
    untouched = ~known
    assert torch.equal(batch["input_ids"][untouched], batch["ids"][untouched])


def test_masked_tokens_are_replaced_four_times_in_five() -> None:
    """The usual 80/10/10 replacement."""
    ckpt = checkpoint("bert", layers=1)
    method, _ = prepared(ckpt)
    ids = torch.arange(8, 150)
    pieces = [method._hide(ids, generator(n)) for n in range(60)]
    known = torch.stack([target != IGNORED for _, target in pieces])
    made = torch.stack([changed for changed, _ in pieces])
    share = (made[known] == method._mask_id).float().mean()
    kept = (made == ids)[known].float().mean()
    assert abs(float(share) - 0.8) < 0.04
    assert abs(float(kept) - 0.1) < 0.04


def test_the_decoder_has_weights_of_its_own_from_the_seed() -> None:
    ckpt = checkpoint("bert", layers=1)
    one, two, other = (EnhancedDecoder(ckpt.config, seed) for seed in (0, 0, 1))
    assert torch.equal(one.query.weight, two.query.weight)
    assert not torch.equal(one.query.weight, other.query.weight)
    assert float(one.into.weight.std()) == pytest.approx(ckpt.config.initializer_range, rel=0.1)
    assert not one.into.bias.any()


def test_an_evaluation_keeps_the_decoder_and_a_new_run_draws_its_own() -> None:
    ckpt = checkpoint("bert", layers=1)
    method, _ = prepared(ckpt)
    decoder = method.modules()["decoder"]
    examples = [{"input_ids": ckpt.tokenizer(TEXTS[0])["input_ids"], "id": 0}]
    list(method.prepare(ckpt, examples, KeyedRNG(0, training=False)))
    assert method.modules()["decoder"] is decoder
    list(method.prepare(ckpt, examples, KeyedRNG(1)))
    assert not torch.equal(method.modules()["decoder"].state_dict()["query.weight"], decoder.query.weight)


def test_pretraining_goes_on_with_its_decoder() -> None:
    ckpt = checkpoint("bert", layers=1)
    run(ckpt, TEXTS, objective=DupMAE(length=24), steps=2)
    method, _ = prepared(ckpt)
    trained = ckpt.attachments["dupmae"].tensors
    assert torch.equal(method.modules()["decoder"].state_dict()["query.weight"], trained["decoder.query.weight"])


def test_a_decoder_is_refused() -> None:
    ckpt = checkpoint("llama", layers=1)
    ckpt.tokenizer.mask_token = "<unk>"
    with pytest.raises(IntaglioError, match="is a causal decoder") as caught:
        prepared(ckpt)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("retromae", [False, True])
def test_a_modernbert_has_its_positions_from_the_decoder(retromae: bool) -> None:
    """H1 = LN(E(h) + p_i), in v1 h + p_i; H2 = [h, LN(E(x) + p)[1:]]; p and LN are the decoder's, and are trained."""
    ckpt = checkpoint("modernbert", layers=1)
    method, batch = prepared(ckpt, retromae=retromae)
    decoder: Any = method.modules()["decoder"]
    seen: list[Any] = []
    decoder.register_forward_pre_hook(lambda module, args: seen.extend(args))
    sentence = torch.randn(3, 32, generator=generator(2))
    method.decoded(sentence, batch)
    embed, length = ckpt.model.model.embeddings, batch["ids"].shape[1]
    p, norm = decoder.positions.weight[:length], decoder.position_norm
    h = sentence[:, None].expand(-1, length, -1)
    assert torch.equal(seen[0], h + p if retromae else norm(embed(inputs_embeds=h) + p))
    assert torch.equal(seen[1][:, 1:], norm(embed(batch["ids"]) + p)[:, 1:])
    assert torch.equal(seen[1][:, 0], sentence)
    method.loss(ckpt.model, batch).total.backward()
    assert p.shape[0] == length
    assert decoder.positions.weight.grad[1:length].abs().sum(1).gt(0).all()
    assert float(decoder.positions.weight.std()) == pytest.approx(ckpt.config.initializer_range, rel=0.1)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("deberta-v2", {"position_biased_input": False, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
        ("roformer", {"embedding_size": 32}),
        ("esm", {"position_embedding_type": "rotary"}),
    ],
)
def test_other_encoders_without_a_table_of_positions(kind: str, changes: dict[str, Any]) -> None:
    config = AutoConfig.for_model(kind, **{**ALL["bert"].sizes(1), **changes})
    ckpt = Checkpoint(AutoModelForMaskedLM.from_config(config), tiny_tokenizer("bert"), "tiny")
    losses = [row.loss for row in run(ckpt, TEXTS, objective=DupMAE(length=24), steps=30).history]
    assert losses[-1] < losses[0] - 0.3
    assert "decoder.positions.weight" in ckpt.attachments["dupmae"].tensors


def test_a_modernbert_goes_on_with_its_decoder_and_learns() -> None:
    ckpt = checkpoint("modernbert", layers=1)
    losses = [row.loss for row in run(ckpt, TEXTS, objective=DupMAE(length=24), steps=30).history]
    assert losses[-1] < losses[0] - 0.5
    method, _ = prepared(ckpt)
    trained, own = ckpt.attachments["dupmae"].tensors, method.modules()["decoder"].state_dict()
    assert torch.equal(own["positions.weight"], trained["decoder.positions.weight"])


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("electra", {"embedding_size": 16}), ("distilbert", {"dim": 32, "n_heads": 4, "n_layers": 1, "hidden_dim": 48})],
)
def test_narrower_or_other_embeddings_are_refused(kind: str, sizes: dict[str, int]) -> None:
    """ELECTRA projects its embeddings to its hidden states, and DistilBERT has no token types."""
    config = AutoConfig.for_model(kind, **{**ALL["bert"].sizes(1), **sizes})
    ckpt = Checkpoint(AutoModelForMaskedLM.from_config(config), tiny_tokenizer("bert"), "tiny")
    with pytest.raises(IntaglioError, match="as wide as its hidden states"):
        prepared(ckpt)


def test_joined_scores() -> None:
    """s(q,p) with k = V equals the dense inner product of concat[c,u]; k = 0 equals CLS-only."""
    ckpt = checkpoint("bert", layers=1)
    scores = {}
    for terms in (None, 0, 5):
        method = ClsAndTerms(terms=terms, cls_size=16)
        q, p = (method.encode(ckpt, [text], name)[0] for text, name in (("a dog", "query"), (TEXTS[0], "document")))
        assert (q.shape, int((p[16:] != 0).sum())) == ((16 + 160,), 160 if terms is None else terms)
        scores[terms] = (q, p)
    (q, whole), (_, sentence), (_, five) = scores[None], scores[0], scores[5]
    assert torch.allclose(q @ sentence, q[:16] @ whole[:16], atol=1e-4)
    kept = whole[16:].topk(5).indices + 16
    assert torch.allclose(q @ five, q[:16] @ whole[:16] + q[kept] @ whole[kept], atol=1e-4)


@pytest.mark.parametrize("activation", ["none", "relu", "log1p_relu"])
def test_joined_activations(activation: Any) -> None:
    ckpt = checkpoint("bert", layers=1)
    method = ClsAndTerms(terms=None, cls_size=8, activation=activation)
    ids, *_ = method.setup(ckpt).read("a dog sleeps", "document")
    logits = ckpt.model(torch.tensor([ids])).logits[0, 1:].amax(0)
    expected = {"none": logits, "relu": logits.relu(), "log1p_relu": logits.relu().log1p()}[activation]
    assert torch.allclose(method.encode(ckpt, ["a dog sleeps"], "document")[0, 8:], expected, atol=1e-4)


def test_joined_words_of_a_doubled_text_are_those_of_the_second_copy() -> None:
    ckpt = checkpoint("bert", layers=1)
    method = ClsAndTerms(terms=None, cls_size=8, variant="echo")
    ids, start, stop, _ = method.setup(ckpt).read("a dog sleeps", "document")
    expected = ckpt.model(torch.tensor([ids])).logits[0, start:stop].amax(0)
    assert torch.allclose(method.encode(ckpt, ["a dog sleeps"], "document")[0, 8:], expected, atol=1e-4)


def test_the_joined_encoder_trains_and_comes_back(tmp_path: Any) -> None:
    from intaglio.checkpoint import load

    ckpt = checkpoint("bert", layers=1)
    method = ClsAndTerms(cls_size=16, terms=20)
    before = method.setup(ckpt).modules()["reduction"].weight.clone()
    run(ckpt, PAIRS, objective=method, steps=2, warmup=0)
    assert not torch.equal(before, method.modules()["reduction"].weight)
    ckpt.model.eval()
    ckpt.save(tmp_path / "out")
    back = load(tmp_path / "out")
    assert torch.equal(back.encoder().encode(back, TEXTS[:2], "query"), ckpt.encoder().encode(ckpt, TEXTS[:2], "query"))
    with pytest.raises(IntaglioError, match="cls_size is 64"):
        ClsAndTerms(cls_size=64).setup(checkpoint("bert"))
    with pytest.raises(IntaglioError, match="needs an encoder with its masked-language-model head"):
        batch_of(ClsAndTerms(cls_size=8), checkpoint("llama"))
