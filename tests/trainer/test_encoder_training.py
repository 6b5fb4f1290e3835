"""Training of encoders on pairs: losses, reading of texts, chunks, and what loads the result."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer

from intaglio.checkpoint import Checkpoint, load
from intaglio.data.text_pairs import TextPair
from intaglio.errors import IntaglioError
from intaglio.masks import predicts_next
from intaglio.methods.base import Workload
from intaglio.modeling.anatomy import anatomy
from intaglio.search.encoders import load_encoder
from intaglio.trainer import KeyedRNG
from intaglio.trainer.cls_and_terms import ClsAndTerms
from intaglio.trainer.contrastive import Contrastive
from intaglio.trainer.masked_lm import MaskedLM
from intaglio.trainer.mining import Mining
from intaglio.trainer.ranking_losses import distillation
from intaglio.trainer.recipe_step import Train
from intaglio.trainer.retrieval_evaluation import RetrievalTask, ranking_quality, retrieval_evaluator, retrieval_samples
from intaglio.trainer.text_batches import side
from tests.families import DECODERS, tiny_model, tiny_tokenizer
from tests.trainer.helpers import PAIRS, TEXTS, checkpoint, run, same, weights
from tests.trainer.test_resume import Killed, killer

DRAWS = KeyedRNG(0)


def batch_of(method: Any, ckpt: Checkpoint, pairs: Any = PAIRS[:4], draws: KeyedRNG = DRAWS, **place: Any) -> Any:
    rows = list(method.prepare(ckpt, [dict(pair) for pair in pairs], draws))
    examples = [{**row, "id": n, "epoch": 0, "step": 0, "steps": 9, **place} for n, row in enumerate(rows)]
    return method.collate(examples, draws)


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 5), st.sampled_from(["plain", "echo"]))
def test_chunks_change_no_gradient(size: int, variant: Any) -> None:
    """Batch size is not memory: a chunk's activations are recomputed, and the gradient is that of the whole batch."""
    gradients = []
    for chunk in (None, size):
        ckpt = checkpoint(layers=1, dtype=torch.float64)
        method = Contrastive(chunk_size=chunk, variant=variant)
        batch = batch_of(method, ckpt)
        method.loss(ckpt.model, batch).total.backward()
        gradients.append([p.grad.clone() for p in ckpt.model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*gradients, strict=True))


def test_chunks_hold_no_activations_of_other_chunks() -> None:
    """Between the passes only vectors live: the most texts in one pass is the chunk, in forward and backward."""
    ckpt = checkpoint(layers=1)
    method = Contrastive(chunk_size=3)
    batch, rows = batch_of(method, ckpt), []
    ckpt.model.register_forward_pre_hook(lambda *_: None)
    method._parts.base.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    loss = method.loss(ckpt.model, batch).total
    assert rows == [3, 1, 3, 3, 3, 3]
    loss.backward()
    assert sorted(rows[6:]) == sorted(rows[:6])


def test_texts_relevant_to_an_equal_query_are_no_negatives() -> None:
    pairs = [
        {"query": "a fox", "positive": TEXTS[0]},
        {"query": "a dog", "positive": TEXTS[1], "negatives": [TEXTS[0]]},
        {"query": "a fox", "positive": TEXTS[2]},
        {"query": "a cat", "positive": TEXTS[0]},
    ]
    excluded = batch_of(Contrastive(), checkpoint(), pairs)["excluded"]
    # Documents: the four positives, then the negative, which is relevant to "a fox" and to "a cat".
    assert excluded.long().tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 1, 1], [1, 0, 0, 0, 1]]


def test_positives_come_first_and_negatives_have_owners() -> None:
    ckpt, method = checkpoint(), Contrastive()
    batch = batch_of(method, ckpt)
    assert batch["owner"].tolist() == [0, 1, 2, 3, 0, 0, 1, 1, 2, 2, 3, 3]
    documents = side(batch, "document")["input_ids"]
    for n, text in enumerate([PAIRS[0]["positive"], PAIRS[1]["positive"]]):
        ids, _, stop, _ = method.read(text, "document")
        assert documents[n, :stop].tolist() == ids


def test_negatives_are_drawn_anew_each_epoch() -> None:
    pairs = [{"query": "q", "positive": "p", "negatives": TEXTS[:12]}, {"query": "r", "positive": "s"}]
    method, ckpt = Contrastive(num_negatives=3), checkpoint()
    first, again = batch_of(method, ckpt, pairs), batch_of(method, ckpt, pairs)
    other = batch_of(method, ckpt, pairs, epoch=1)
    assert torch.equal(first["document_input_ids"], again["document_input_ids"])
    assert len(first["owner"]) == 2 + 3
    assert first["document_input_ids"].tolist() != other["document_input_ids"].tolist()


def test_a_batch_of_one_pair_is_refused_while_training() -> None:
    pairs = [{"query": "q", "positive": "p"}, {"query": "r", "positive": "s"}]
    with pytest.raises(IntaglioError, match="a batch of one pair has nothing to contrast"):
        run(checkpoint(layers=1), pairs, objective=Contrastive(), batch_size=1)
    batch_of(Contrastive(), checkpoint(), pairs[:1], KeyedRNG(0, training=False))
    batch_of(Contrastive(), checkpoint(), PAIRS[:1])  # its negatives suffice


@pytest.mark.parametrize("pairs", [[("q", "p")], [("q", "p"), ("q", "r")], [("q", "p"), ("r", "p")]])
def test_pairs_without_a_text_to_contrast_are_refused(pairs: list[tuple[str, str]]) -> None:
    """A batch is filled up with the same pair, which is no negative of itself: the loss would be 0 at every step."""
    rows = [{"query": query, "positive": positive} for query, positive in pairs]
    with pytest.raises(IntaglioError, match="nothing to contrast; give more pairs, or negatives") as caught:
        run(checkpoint(layers=1), rows, objective=Contrastive(), batch_size=4)
    assert "\n" not in str(caught.value)


def test_margin_mse_needs_scores() -> None:
    with pytest.raises(IntaglioError, match="example 0 of the pairs has no negatives with scores"):
        batch_of(Contrastive(loss_type="margin_mse"), checkpoint())


def test_margin_mse_learns_the_teachers_margins() -> None:
    pairs = [{**pair, "scores": [0.9, 0.4, 0.6]} for pair in PAIRS[:4]]
    ckpt = checkpoint(layers=1)
    result = run(ckpt, pairs, objective=Contrastive(loss_type="margin_mse"), steps=30, learning_rate=3e-3)
    assert result.history[-1].loss < 0.3 * result.history[0].loss


def test_distillation_compares_a_querys_own_documents() -> None:
    """KL( softmax(teacher scores/tau_t) || softmax(student scores/tau) ) over the positive + negatives."""
    scores = torch.tensor([[1.0, 9.0, 0.0, 9.0, 2.0], [9.0, 3.0, 9.0, 1.0, 9.0]])
    owner, teacher = torch.tensor([0, 1, 0, 1, 0]), torch.tensor([2.0, 1.0, 1.0, 0.5, 0.0])
    expected = 0.0
    for row, own in enumerate(([0, 2, 4], [1, 3])):
        p, q = teacher[own].softmax(0), scores[row, own].softmax(0)
        expected += float((p * (p / q).log()).sum()) / 2
    assert float(distillation(scores, owner, teacher)) == pytest.approx(expected, rel=1e-5)
    scores.requires_grad_()
    distillation(scores, owner, teacher).backward()
    assert scores.grad is not None
    assert (scores.grad != 0).long().tolist() == [[1, 0, 1, 0, 1], [0, 1, 0, 1, 0]]


def test_distillation_divides_by_both_temperatures() -> None:
    pairs = [{**pair, "scores": [0.9, 0.4, 0.6]} for pair in PAIRS[:2]]
    ckpt, scores = checkpoint(layers=1), torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    for own, teacher_temperature in ((0.25, 0.25), (None, 0.5)):
        method = Contrastive(loss_type="distillation", temperature=0.5, teacher_temperature=own)
        batch = batch_of(method, ckpt, pairs)
        expected = distillation(scores / 0.5, batch["owner"], batch["teacher"] / teacher_temperature)
        assert torch.equal(method.ranking_loss(scores, batch), expected)
    with pytest.raises(IntaglioError, match="no negatives with scores; distillation needs both"):
        batch_of(method, ckpt)


def test_matryoshka_sizes_are_drawn_for_each_batch() -> None:
    """Optionally sample n dims per step; while evaluating all of them count."""
    ckpt, method = checkpoint(layers=1), Contrastive(matryoshka=[32, 16, 8], matryoshka_per_step=2)
    drawn = {tuple(batch_of(method, ckpt, id=n)["sizes"]) for n in range(12)}
    assert drawn == {(0, 1), (0, 2), (1, 2)}
    batch = batch_of(method, ckpt)
    every = Contrastive(matryoshka=[32, 16, 8], matryoshka_weights=[float(n in batch["sizes"]) for n in range(3)])
    assert float(method.loss(ckpt.model, batch).total) == pytest.approx(
        float(every.loss(ckpt.model, batch_of(every, ckpt)).total)
    )
    assert "sizes" not in batch_of(method, ckpt, draws=KeyedRNG(0, training=False))
    with pytest.raises(ValueError, match="matryoshka_per_step is 4, and matryoshka has 3 sizes"):
        Contrastive(matryoshka=[32, 16, 8], matryoshka_per_step=4)


def test_matryoshka_of_the_whole_vector_is_the_base_loss() -> None:
    """Matryoshka with dims=[full], weight 1 equals the base loss; sizes add up."""
    ckpt, losses = checkpoint(layers=1), {}
    for sizes, weight in ((None, None), ([32], [1.0]), ([8], None), ([32, 8], [1.0, 0.5])):
        method = Contrastive(matryoshka=sizes, matryoshka_weights=weight)
        losses[str(sizes)] = method.loss(ckpt.model, batch_of(method, ckpt)).total.item()
    assert losses["None"] == losses["[32]"]
    assert losses["[32, 8]"] == pytest.approx(losses["[32]"] + 0.5 * losses["[8]"])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"matryoshka": [64]}, "the size 64; the model's vectors have 32 dimensions"),
        ({"query_length": 500}, "query_length is 500, and the model's context of 128 tokens holds 128"),
        (
            {"variant": "echo", "document_length": 70},
            "document_length is 70, and the model's context of 128 tokens holds",
        ),
        (
            {"query_length": 3, "query_prompt": "q: "},
            "query_length is 3, and prompt and special tokens take 3; a length",
        ),
        ({"document_length": 3, "document_prompt": "the text is: "}, "document_length is 3, and prompt and special"),
    ],
)
def test_fields_that_do_not_fit_the_model_are_refused(fields: Any, says: str) -> None:
    with pytest.raises(IntaglioError, match=says) as caught:
        batch_of(Contrastive(**fields), checkpoint())
    assert "\n" not in str(caught.value)
    with pytest.raises(IntaglioError, match="document_length is 2, and prompt and special tokens take 2"):
        Contrastive(document_length=2).setup(checkpoint("bert", layers=1))


@pytest.mark.parametrize("family", [*DECODERS])
def test_bidirectional_lets_the_first_token_see_the_last(family: str) -> None:
    """Changing the LAST token changes the FIRST token's hidden state, unless the family is refused."""
    ckpt = checkpoint(family)
    assert predicts_next(anatomy(ckpt.model))
    method = Contrastive(variant="bidirectional").setup(ckpt)
    assert not predicts_next(anatomy(ckpt.model))
    ids = torch.tensor([[9, 10, 11, 12], [9, 10, 11, 13]])
    for mask in (None, torch.ones_like(ids)):
        hidden = method._parts.base(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        assert not torch.equal(hidden[0, 0], hidden[1, 0])


def test_echo_shows_the_whole_text_to_every_pooled_token() -> None:
    """Changing x_n changes Z at EVERY position of the second copy; without echo, positions before n are unchanged."""
    ckpt = checkpoint()
    for variant in ("plain", "echo"):
        method = Contrastive(variant=variant).setup(ckpt)  # type: ignore[arg-type]
        (one, start, stop, _), (two, *_) = (method.read(text, "document") for text in ("the lazy A", "the lazy B"))
        assert len(one) == len(two)
        changed = [n for n, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]
        ids = torch.tensor([one, two])
        hidden = method._parts.base(input_ids=ids).last_hidden_state
        differs = (hidden[0] != hidden[1]).any(-1)
        assert differs[start:stop].all() == (variant == "echo")
        assert not differs[: changed[0]].any()


def test_echo_cuts_a_text_before_it_is_doubled() -> None:
    """Truncation must be applied to x before doubling, or the second copy is cut; template tokens not pooled."""
    method = Contrastive(variant="echo", document_length=5, document_prompt="find: ").setup(checkpoint())
    ids, start, stop, _ = method.read(TEXTS[0], "document")
    assert stop - start == 5
    text = tiny_tokenizer("llama").decode(ids)
    assert text.startswith("find: Document:")
    assert ids[start:stop] == ids[start - 5 - len(method._echo(tiny_tokenizer("llama"), "document")[1]) :][:5]


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("variant", ["plain", "echo", "bidirectional"])
def test_a_vector_does_not_depend_on_its_batch(family: str, variant: Any) -> None:
    """Padding invariance: batch-with-pad equals unpadded to 1e-5."""
    ckpt = checkpoint(family)
    method = Contrastive(variant=variant)
    texts = [TEXTS[0], "a dog", TEXTS[3][:30]]
    together = method.encode(ckpt, texts, "document")
    alone = torch.cat([method.encode(ckpt, [text], "document") for text in texts])
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together.norm(dim=1), torch.ones(3), atol=1e-5)


def test_the_sides_have_their_own_lengths_and_prompts() -> None:
    ckpt = checkpoint()
    method = Contrastive(query_length=4, document_length=6, query_prompt="q: ", document_prompt="d: ").setup(ckpt)
    for name, length, prompt in (("query", 4, "q: "), ("document", 6, "d: ")):
        expected = ckpt.tokenizer(prompt + TEXTS[0])["input_ids"][:length]
        assert method.read(TEXTS[0], name)[:3] == (expected, 0, length)


def test_a_killed_run_on_pairs_resumes_to_the_byte(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"steps": 4, "save_every": 1, "warmup": 0, "batch_size": 4}

    def go(ckpt: Checkpoint, **more: Any) -> Any:
        method = Contrastive(chunk_size=3, num_negatives=1)
        held_out = [TextPair(f"number {n}", TEXTS[n]) for n in range(6)]
        return run(ckpt, PAIRS, objective=method, evaluate=retrieval_evaluator(method, held_out), **arguments, **more)

    whole, killed, again = (checkpoint(layers=1) for _ in range(3))
    unbroken = go(whole)
    with pytest.raises(Killed):
        go(killed, directory=tmp_path, progress=killer(3))
    assert go(again, directory=tmp_path).history == unbroken.history
    assert same(weights(again), weights(whole))
    assert set(unbroken.history[-1].evaluation) == {"nDCG@10", "MRR@10", "error"}


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("bert", {}),
        ("bert", {"pooling": "cls", "normalize": False}),
        ("llama", {"query_prompt": "q: "}),
        ("llama", {"variant": "bidirectional"}),
    ],
)
def test_sentence_transformers_and_the_index_read_the_same_vectors(family: str, fields: Any, tmp_path: Path) -> None:
    ckpt = checkpoint(family)
    run(ckpt, PAIRS, objective=Contrastive(**fields), steps=2)
    ckpt.model.eval()
    ckpt.save(tmp_path / "out")
    texts = [TEXTS[0], "a dog"]
    expected = ckpt.encoder().encode(ckpt, texts, "query")
    stock = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert torch.allclose(torch.tensor(stock.encode_query(texts)), expected, atol=1e-5)
    own = load_encoder(tmp_path / "out")
    assert torch.equal(torch.tensor(own.encode_queries(texts)), expected)
    assert (own.kind, own.dimensions) == ("dense", 32)
    wrapped = load(tmp_path / "out").as_sentence_transformer()
    assert torch.allclose(torch.tensor(wrapped.encode_query(texts)), expected, atol=1e-5)


def test_an_echo_encoder_is_restored_with_its_fields(tmp_path: Path) -> None:
    ckpt = checkpoint()
    run(ckpt, PAIRS, objective=Contrastive(variant="echo", document_length=20), steps=2)
    ckpt.model.eval()
    ckpt.save(tmp_path / "out")
    expected = ckpt.encoder().encode(ckpt, TEXTS[:3], "document")
    wrapped = load(tmp_path / "out").as_sentence_transformer()
    assert torch.allclose(torch.tensor(wrapped.encode_document(TEXTS[:3])), expected, atol=1e-5)
    with pytest.raises(IntaglioError, match="has no field 'poling'"):
        load(tmp_path / "out").encoder(poling="cls")
    with pytest.raises(IntaglioError, match="pooling: 'max' is not accepted"):
        load(tmp_path / "out").encoder(pooling="max")


def test_files_of_an_earlier_encoder_are_dropped() -> None:
    ckpt = checkpoint("bert", layers=1)
    batch_of(Contrastive(pooling="cls"), ckpt)
    assert b'cls_token": true' in ckpt.companions["1_Pooling/config.json"]
    batch_of(Contrastive(normalize=False), ckpt)
    assert b"Normalize" not in ckpt.companions["modules.json"]
    batch_of(Contrastive(variant="echo"), ckpt, draws=KeyedRNG(0, training=False))
    assert ckpt.companions
    batch_of(Contrastive(variant="echo"), ckpt)
    assert not ckpt.companions


def test_a_checkpoint_that_is_no_encoder_is_refused() -> None:
    with pytest.raises(IntaglioError, match="was not trained as an encoder"):
        checkpoint().encoder()
    with pytest.raises(IntaglioError, match="no tokenizer"):
        Contrastive().setup(Checkpoint(tiny_model("llama", layers=1)))


def test_retrieval_quality_worked_example() -> None:
    """Ranks 0 and 2 of two relevant documents: DCG 1 + 1/2 over 1 + 1/log2(3); ties count against the relevant."""
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 1.0, 0.0]])
    quality = ranking_quality(scores, [[0, 2], [1]])
    expected = (1.5 / (1 + 1 / math.log2(3)) + 1 / math.log2(3)) / 2
    assert quality == {"nDCG@10": pytest.approx(expected), "MRR@10": pytest.approx(0.75)}
    assert ranking_quality(torch.arange(11.0)[None], [[0]]) == {"nDCG@10": 0.0, "MRR@10": 0.0}


def test_the_task_shares_equal_queries_and_texts() -> None:
    task = RetrievalTask([TextPair("q", "a", ("b",)), TextPair("q", "c"), TextPair("r", "b")])
    assert (task.queries, task.documents, task.relevant) == (["q", "r"], ["a", "b", "c"], [[0, 2], [1]])


def test_samples_show_the_best_document() -> None:
    ckpt, method = checkpoint(), Contrastive()
    pairs = [TextPair(text, text) for text in TEXTS[:3]]  # a text finds itself
    samples = retrieval_samples(method, ckpt, pairs)
    assert [sample.text for sample in samples.shown] == [sample.expected for sample in samples.shown]
    assert samples.scores == {"nDCG@10": 100.0, "MRR@10": 100.0}


def test_mining_settings() -> None:
    assert Mining(ranks=[2, 5]).ranks == (2, 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the first must not exceed the last"):
        Mining(ranks=(5, 2))


BASE_DEFAULTS = {
    "variant": "plain", "loss_type": "info_nce", "teacher_temperature": None,
    "num_negatives": None, "chunk_size": None, "query_length": None,
    "document_length": None, "query_prompt": "", "document_prompt": "",
}  # fmt: skip


@pytest.mark.parametrize(
    ("made", "defaults"),
    [
        (Contrastive(), {**BASE_DEFAULTS, "temperature": 0.05, "pooling": None, "normalize": True, "symmetric": False,
                         "matryoshka": None, "matryoshka_weights": None, "matryoshka_per_step": None}),
        (ClsAndTerms(), {**BASE_DEFAULTS, "temperature": 1.0, "cls_size": 384, "terms": 384, "activation": "none"}),
        (MaskedLM(), {"mask_ratio": 0.15, "length": None}),
        (Mining(), {"encoder": "bm25", "ranks": (1, 30), "count": 8, "sample": False, "margin": None,
                    "consistency": None}),
    ],
)  # fmt: skip
def test_defaults(made: Any, defaults: dict[str, Any]) -> None:
    assert made.model_dump() == defaults


@pytest.mark.parametrize(
    "fields",
    [
        {"variant": "echo"},
        {"variant": "bidirectional"},
        {"loss_type": "margin_mse"},
        {"loss_type": "distillation"},
        {"loss_type": "distillation", "teacher_temperature": 2.0},
        {"temperature": 0.5},
        {"num_negatives": 1},
        {"query_length": 3},
        {"document_length": 5},
        {"query_prompt": "q: "},
        {"document_prompt": "d: "},
        {"pooling": "mean"},
        {"normalize": False},
        {"symmetric": True},
        {"matryoshka": [8]},
        {"matryoshka": [32, 8], "matryoshka_weights": [1.0, 0.1]},
        {"matryoshka": [32, 8], "matryoshka_per_step": 1},
    ],
    ids=str,
)
def test_every_field_changes_the_vectors(fields: dict[str, Any]) -> None:
    pairs = [{**pair, "scores": [0.9, 0.4, 0.6]} for pair in PAIRS]
    base = dict(list(fields.items())[:-1])
    vectors = []
    for own in (base, fields):
        ckpt, method = checkpoint(layers=1), Contrastive(**own)
        run(ckpt, pairs, objective=method, steps=2, warmup=0)
        vectors.append([method.encode(ckpt, TEXTS[:2], name) for name in ("query", "document")])
    assert any(not torch.equal(a, b) for a, b in zip(*vectors, strict=True))


def test_the_default_pooling_follows_the_model() -> None:
    for family, variant, how in (
        ("llama", "plain", "last"),
        ("llama", "bidirectional", "mean"),
        ("bert", "plain", "mean"),
    ):
        assert Contrastive(variant=variant).setup(checkpoint(family))._how == how  # type: ignore[arg-type]


def test_the_estimate_counts_the_texts_of_a_pair_and_a_dense_encoders_blocks() -> None:
    work = Workload(((8, 8),), 100, 150, 8, 1000, 100, 4)
    step = {"pairs": "docstrings", "steps": 10, "batch_size": 4, "negatives": {"count": 2}}
    sizes = {"query_length": 5, "document_length": 7}
    dense = Train(**step, objective={"contrastive": sizes}).estimate(work)
    assert dense.flops == 6 * 100 * 10 * 4 * (5 + 3 * 7)
    one = Train(**step, objective={"contrastive": {**sizes, "num_negatives": 1}}).estimate(work)
    assert one.flops == 6 * 100 * 10 * 4 * (5 + 2 * 7)
    sparse = Train(**step, objective={"mistral_splade": {**sizes, "variant": "echo"}}).estimate(work)
    assert sparse.flops == 6 * 150 * 10 * 4 * 2 * (5 + 3 * 7)
