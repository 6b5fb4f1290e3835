"""BT2: what its paper and its card promise."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from intaglio.checkpoint.fingerprint import fingerprint
from intaglio.errors import IntaglioError
from intaglio.methods.retrieval.bt2 import BT2, CachedPairs
from intaglio.methods.retrieval.bt2.fitting import _rate
from intaglio.methods.retrieval.bt2.functional import cosine_loss, procrustes, pseudo_classifier
from intaglio.methods.retrieval.bt2.heads import ARMS, BasisTransformation, Sizes, new_head
from intaglio.search import Index
from intaglio.search.encoders import load_encoder
from intaglio.trainer.ranking_losses import info_nce
from tests.alive import alive
from tests.trainer.helpers import PAIRS, TEXTS, checkpoint, run
from tests.trainer.test_encoder_training import batch_of

EXAMPLES = ({"extra_dims": 4}, {"arm": "bct_distill", "extra_dims": 2})
ALIVE = {
    "variant": "test_an_encoder_is_compatible_with_another_one",
    "loss_type": "test_margin_mse_replaces_the_task_alone",
    "temperature": 0.5,
    "num_negatives": 1,
    "chunk_size": "test_chunks_are_made",
    "query_length": 3,
    "document_length": 5,
    "query_prompt": "q: ",
    "document_prompt": "d: ",
    "arm": "naive",
    "old": "test_an_encoder_is_compatible_with_another_one",
    "independent": "test_the_independent_encoder_is_imitated",
    "old_dims": "test_an_encoder_is_compatible_with_another_one",
    "new_dims": 40,
    "extra_dims": 6,
    "scale": 3.0,
    "independent_weight": "test_the_independent_encoder_is_imitated",
    "influence_weight": 1.0,
    "alignment_weight": 1.0,
    "influence_temperature": 0.5,
    "teacher_temperature": alive(2.0, loss_type="distillation"),
    "pooling": "mean",
}
SIZES = Sizes(inputs=8, old=6, new=8, extra=3, scale=2.0)


def head_of(seed: int = 0, sizes: Sizes = SIZES) -> BasisTransformation:
    torch.manual_seed(seed)
    head = BasisTransformation(sizes)
    for parameter in head.parameters():  # away from the start, as training moves them
        parameter.data += 0.3 * torch.randn_like(parameter)
    return head


def unit(rows: int, width: int, seed: int = 1) -> Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def cached(labels: bool = False, old: int = 6, new: int = 8, rows: int = 40) -> CachedPairs:
    """Two linear views of the same factors; a document of each query."""
    factors = unit(rows, 6)
    noise = 0.1 * unit(rows, 6, 2)
    maps = [torch.randn(6, width, generator=torch.Generator().manual_seed(width)) for width in (new, old)]
    sides = [F.normalize(f @ m, dim=-1) for m in maps for f in (factors, factors + noise)]
    classes = torch.arange(rows) % 5 if labels else None
    return CachedPairs(sides[0], sides[1], sides[2], sides[3], torch.arange(rows), classes)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 999), st.integers(0, 5), st.floats(0.5, 8), st.integers(4, 9))
def test_new_similarity_is_that_of_both_parts(seed: int, extra: int, scale: float, old: int) -> None:
    """Exact: <new(x), new(y)> = C^2 <phi(x), phi(y)> + <e(x), e(y)> for all x, y; hence ||new||^2 = C^2 + 1."""
    extra = min(extra, old)  # as `BT2.sizes` has it
    sizes = Sizes(8, min(old, 8 + extra), 8, extra, scale)
    head, inputs = head_of(seed, sizes), unit(7, 8, seed)
    with torch.no_grad():
        vectors, (phi, e) = head(inputs).vectors, head.parts(inputs)
    expected = scale**2 * phi @ phi.T + e @ e.T
    assert torch.allclose(vectors @ vectors.T, expected, atol=1e-5 * (1 + scale**2))
    assert vectors.shape == (7, 8 + extra)
    if extra:
        assert torch.allclose(vectors.norm(dim=1), torch.tensor(scale**2 + 1).sqrt().expand(7), rtol=1e-5)


def test_without_extra_dimensions_the_ranking_is_phis() -> None:
    """With r = 0 new/new ranking equals phi/phi ranking exactly for any C; as C grows, for any r."""
    for extra, scale in ((0, 0.5), (3, 50.0)):
        head, inputs = head_of(0, Sizes(8, 6, 8, extra, scale)), unit(9, 8)
        with torch.no_grad():
            vectors, (phi, _) = head(inputs).vectors, head.parts(inputs)
        assert torch.equal((vectors @ vectors.T).argsort(1), (phi @ phi.T).argsort(1))


def test_the_basis_stays_orthonormal_while_it_trains() -> None:
    """P^T P = I and Q^T Q = I to 1e-5 after any number of optimiser steps, and the identity holds."""
    pairs = cached()
    start = BT2(extra_dims=3).fit_head(pairs, steps=1, learning_rate=0.0)
    head = BT2(extra_dims=3).fit_head(pairs, steps=60, learning_rate=0.05)
    assert isinstance(head, BasisTransformation)
    assert isinstance(start, BasisTransformation)
    for layer, before in ((head.P, start.P), (head.Q, start.Q)):
        assert (layer.weight.T @ layer.weight - torch.eye(len(layer.weight))).abs().max() < 1e-5
        assert (layer.weight - before.weight).abs().max() > 1e-2
    with torch.no_grad():
        vectors, (phi, e) = head(pairs.query_PH).vectors, head.parts(pairs.query_PH)
    assert (vectors @ vectors.T - (4 * phi @ phi.T + e @ e.T)).abs().max() < 1e-5


def test_no_more_dimensions_are_added_than_the_old_vectors_have() -> None:
    assert BT2(extra_dims=9).sizes(8, 6).extra == 6
    for arm in ("bt2", "bct"):
        head = BT2(arm=arm, extra_dims=9).fit_head(cached(), steps=1)  # type: ignore[arg-type]
        assert head(unit(2, 8)).vectors.shape == (2, head.dimensions) == (2, 14)


@pytest.mark.parametrize("arm", ["bct", "bct_distill"])
def test_one_vector_starts_with_the_ranking_of_its_inputs(arm: Any) -> None:
    """All of its dimensions are in use from the start, also those that the inputs do not have."""
    head, inputs = new_head(arm, SIZES), unit(5, 8)
    vectors = head(inputs).vectors
    assert torch.allclose(vectors @ vectors.T, inputs @ inputs.T, atol=1e-5)
    assert vectors[:, 8:].abs().max() > 1e-3
    if arm == "bct_distill":
        assert torch.allclose(head.to_independent(vectors), inputs, atol=1e-5)  # type: ignore[operator]


def test_separate_blocks_are_the_old_vector_and_the_scaled_new_one() -> None:
    output = new_head("naive", dataclasses.replace(SIZES, scale=3.0))(unit(5, 8))
    assert torch.allclose(output.vectors[:, 6:], 3 * output.task)
    assert torch.allclose(output.vectors[:, :6].norm(dim=1), torch.ones(5))


def test_q_preserves_the_norm_of_the_old_block() -> None:
    """Q applied to u[:m] preserves its norm; ||old'|| <= sqrt(1 + C^2), not constant where m < n + r."""
    head, inputs = head_of(), unit(20, 8)
    with torch.no_grad():
        phi, e = head.parts(inputs)
        u = torch.cat([e, head.P(2 * phi)], 1)
        norms = head(inputs).vectors[:, :6].norm(dim=1)
    assert torch.allclose(norms, u[:, :6].norm(dim=1), rtol=1e-5)
    assert norms.max() <= 5**0.5 + 1e-5
    assert norms.std() > 1e-3
    assert torch.allclose(head(inputs).vectors[:, 6:], u[:, 6:], atol=1e-6)


def test_the_old_gallery_does_not_see_the_rest() -> None:
    """Scoring against an old gallery is invariant to changing rest(x)."""
    head = head_of()
    vectors = head(unit(4, 8)).vectors
    changed = torch.cat([vectors[:, :6], vectors[:, 6:] + 1], 1)
    assert torch.equal(head.old_block(vectors), head.old_block(changed))
    assert torch.allclose(head.old_block(vectors).norm(dim=1), torch.ones(4))


def test_e_is_cut_from_o_and_has_unit_norm() -> None:
    """The code renormalises o, slices, and normalises again."""
    head, inputs = head_of(), unit(5, 8)
    b = torch.cat([head.new_features(inputs), head.old_features(inputs)], 1)
    o = F.normalize(head.to_old(b.relu()), dim=-1)
    phi, e = head.parts(inputs)
    assert torch.allclose(e, F.normalize(o[:, :3], dim=-1), atol=1e-6)
    assert torch.allclose(phi, F.normalize(b[:, :8], dim=-1), atol=1e-6)
    assert torch.allclose(e.norm(dim=1), torch.ones(5))


def test_a_row_of_the_pseudo_classifier_is_a_class_mean() -> None:
    """Row k of A equals the class mean of cached old features, not renormalised; unseen classes have rows too."""
    old, labels = unit(6, 4), torch.tensor([0, 2, 0, 2, 3, 0])
    rows = pseudo_classifier(old, labels, 5)
    assert torch.allclose(rows[0], old[[0, 2, 5]].mean(0))
    assert torch.allclose(rows[2], old[[1, 3]].mean(0))
    assert rows[1].tolist() == rows[4].tolist() == [0.0] * 4
    assert float(rows[0].norm()) < 1


def loss_of(method: BT2, head: Any, pairs: CachedPairs) -> Any:
    """The loss of all pairs, with its parts."""
    query, document = head(pairs.query_PH), head(pairs.document_PH)
    none = torch.zeros(len(pairs.query_PH), len(pairs.query_PH), dtype=torch.bool)
    task = info_nce(query.task @ document.task.T / method.temperature, none)
    teachers = {"old": (pairs.query_old_PM, pairs.document_old_PM), "independent": (pairs.query_PH, pairs.document_PH)}
    return method.total(head, query, document, task, teachers, none)


def test_without_weights_the_basis_has_no_gradient() -> None:
    """lambda1 = lambda2 = lambda3 = 0 leaves gradients of Q, P and the o-head exactly zero."""
    head = head_of()
    loss_of(BT2(independent_weight=0, influence_weight=0, alignment_weight=0), head, cached()).total.backward()
    for module in (head.P, head.Q, head.to_old, head.old_features):
        for parameter in module.parameters():
            assert parameter.grad is None or not parameter.grad.any()
    assert head.new_features.weight.grad is not None
    assert head.new_features.weight.grad.any()


@pytest.mark.parametrize(("old", "extra", "reaches"), [(6, 3, True), (4, 4, False)])
def test_compatibility_reaches_phi_where_it_has_to(old: int, extra: int, reaches: bool) -> None:
    """Gradient of the compatibility terms reaches phi through P (C phi)[:m-r]; with m <= r it does not."""
    head = head_of(0, Sizes(8, old, 8, extra, 2.0))
    inputs = unit(5, 8)
    phi, e = head.parts(inputs)
    phi = phi.detach().requires_grad_()
    u = torch.cat([e, head.P(2 * phi)], 1)
    cosine_loss(head.Q(u[:, :old]), unit(5, old, 3)).backward()
    assert bool(phi.grad is not None and phi.grad.any()) == reaches


def test_the_loss_is_the_sum_of_its_weighted_terms() -> None:
    """L = task + l2 influence + l3 (1 - cos(bhat, old)) + l1 (1 - cos(phi, phi_new'))."""
    pairs, head = cached(), head_of()
    method = BT2(independent_weight=0.7, influence_weight=3.0, alignment_weight=0.2, influence_temperature=0.5)
    loss = loss_of(method, head, pairs)
    query, document = head(pairs.query_PH), head(pairs.document_PH)
    scores = query.task @ document.task.T / 0.05
    block = F.normalize(query.vectors[:, :6], dim=-1), F.normalize(document.vectors[:, :6], dim=-1)
    target = torch.arange(40)
    influence = F.cross_entropy(block[0] @ pairs.document_old_PM.T / 0.5, target)
    cosines = [(a * b).sum(1).mean() for a, b in zip(block, (pairs.query_old_PM, pairs.document_old_PM), strict=True)]
    own = [(a.task * b).sum(1).mean() for a, b in ((query, pairs.query_PH), (document, pairs.document_PH))]
    expected = F.cross_entropy(scores, target) + 3 * influence + 0.2 * (1 - sum(cosines) / 2) + 0.7 * (1 - sum(own) / 2)
    assert torch.allclose(loss.total, expected, rtol=1e-5)
    assert set(loss.parts) == {"task", "influence", "accuracy", "alignment", "imitation"}


def test_the_arms_have_their_own_terms() -> None:
    """BCT has the influence alone; with distillation a projection imitates; naive has all terms."""
    wanted = {"bt2": {"alignment", "imitation"}, "naive": {"alignment", "imitation"}, "bct": set()}
    wanted["bct_distill"] = {"imitation"}
    for arm, terms in wanted.items():
        head = new_head(arm, SIZES)  # type: ignore[arg-type]
        parts = loss_of(BT2(arm=arm), head, cached()).parts  # type: ignore[arg-type]
        assert set(parts) - {"task", "influence", "accuracy"} == terms
        assert head(unit(3, 8)).vectors.shape == (3, 14 if arm == "naive" else 11)


def scores_of(head: Any, pairs: CachedPairs) -> Tensor:
    """The scores of the old documents for new queries."""
    with torch.no_grad():
        return head.old_block(head(pairs.query_PH).vectors) @ pairs.document_old_PM.T


def ranking_loss(head: Any, pairs: CachedPairs) -> float:
    """The cross-entropy of each query's old document among all, at a temperature of 0.05; ln 40 by chance."""
    return float(F.cross_entropy(scores_of(head, pairs) / 0.05, torch.arange(len(pairs.query_PH))))


@pytest.mark.parametrize("arm", ARMS)
def test_a_trained_head_is_searched_among_old_vectors(arm: Any) -> None:
    pairs, method = cached(), BT2(arm=arm, extra_dims=3)
    assert ranking_loss(method.fit_head(pairs, steps=40, learning_rate=0.03), pairs) < 3.3
    assert ranking_loss(method.fit_head(pairs, steps=1, learning_rate=0.0), pairs) > 6 or arm == "procrustes"
    other = method.fit_head(pairs, steps=3, seed=1)
    again = method.fit_head(pairs, steps=3, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), again.state_dict().values(), strict=True))


def test_classes_of_the_old_vectors_are_kept() -> None:
    """With classes the influence is cross-entropy on bhat A^T, and the task on W phi."""
    pairs, losses = cached(labels=True), []
    assert pairs.labels_P is not None
    classifier = pseudo_classifier(pairs.query_old_PM, pairs.labels_P, 5)
    for steps, rate, weight in ((1, 0.0, 10.0), (40, 0.03, 10.0), (40, 0.03, 0.0)):
        method = BT2(extra_dims=3, influence_weight=weight, alignment_weight=0, independent_weight=0)
        head = method.fit_head(pairs, steps=steps, learning_rate=rate)
        with torch.no_grad():
            logits = head.old_block(head(pairs.query_PH).vectors) @ classifier.T
        losses.append(float(F.cross_entropy(logits, pairs.labels_P)))
    assert losses[1] < min(losses[0], losses[2]) - 0.02


def test_class_means_keep_the_length_of_the_old_vectors() -> None:
    """Their scores are divided by the temperature of the influence: three times the length is a third of it."""
    pairs, heads = cached(labels=True), []
    for length, temperature in ((1, 1.0), (3, 1.0), (1, 1 / 3)):
        own = dataclasses.replace(pairs, query_old_PM=length * pairs.query_old_PM)
        method = BT2(extra_dims=3, alignment_weight=0, independent_weight=0, influence_temperature=temperature)
        heads.append(method.fit_head(own, steps=3, learning_rate=0.1)(pairs.query_PH).vectors)
    assert (heads[0] - heads[1]).abs().max() > 0.01
    assert torch.allclose(heads[1], heads[2], atol=1e-3)


@pytest.mark.parametrize("arm", ARMS)
def test_a_head_is_written_and_read(arm: Any, tmp_path: Path) -> None:
    method = BT2(arm=arm, extra_dims=3, scale=1.5)
    head = method.fit_head(cached(), steps=2)
    (tmp_path / "head").write_bytes(method.dump_head(head))
    back = BT2.load_head(tmp_path / "head")
    inputs = unit(5, 8)
    assert torch.equal(back(inputs).vectors, head(inputs).vectors)
    assert (back.dimensions, back.old_dimensions) == (head.dimensions, 6)


@pytest.mark.parametrize(("new", "old"), [(8, 6), (6, 8), (7, 7)])
def test_procrustes_rotates(new: int, old: int) -> None:
    """Inner products of the inputs are kept whichever side is wider, and a rotation is recovered."""
    inputs = unit(30, new)
    matrix = procrustes(inputs, unit(30, old, 5))
    assert matrix.shape == (new, max(new, old))
    rotated = inputs @ matrix
    assert torch.allclose(rotated @ rotated.T, inputs @ inputs.T, atol=1e-5)
    wanted = torch.linalg.qr(torch.randn(new, new, generator=torch.Generator().manual_seed(0)))[0]
    assert torch.allclose(procrustes(inputs, inputs @ wanted), wanted, atol=1e-4)


def test_the_rate_rises_for_a_twentieth_of_the_steps_and_falls_as_a_cosine() -> None:
    rates = [_rate(step, 100) for step in range(100)]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    expected = [(1 + math.cos(math.pi * step / 95)) / 2 for step in range(95)]
    assert rates[5:] == pytest.approx(expected, abs=1e-6)


def test_equal_documents_are_no_negatives() -> None:
    pairs = cached()
    same = CachedPairs(
        pairs.query_PH, pairs.document_PH[[0] * 40], pairs.query_old_PM, pairs.document_old_PM[[0] * 40],
        torch.zeros(40, dtype=torch.int64),
    )  # fmt: skip
    method = BT2(extra_dims=3, independent_weight=0, alignment_weight=0)
    a, b = (method.fit_head(same, steps=n, learning_rate=0.1).state_dict() for n in (1, 2))
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)  # nothing to learn


def test_a_series_of_three_is_compatible_with_the_first() -> None:
    """Each new model is made compatible with the previous final vector and thereby with all earlier ones."""
    first = cached(rows=60)
    second_head = BT2(extra_dims=3).fit_head(first, steps=40, learning_rate=0.03)
    with torch.no_grad():
        query, document = second_head(first.query_PH).vectors, second_head(first.document_PH).vectors
    newest = cached(old=6, new=12, rows=60)
    third = CachedPairs(newest.query_PH, newest.document_PH, query, document, torch.arange(60))
    head = BT2(extra_dims=2).fit_head(third, steps=50, learning_rate=0.03)
    vectors = head(newest.query_PH).vectors
    assert vectors.shape[1] == 14
    assert head.old_dimensions == 11
    scores = F.normalize(vectors[:, :6], dim=-1) @ first.document_old_PM.T
    assert (scores.argmax(1) == torch.arange(60)).float().mean() > 0.3


def saved(path: Path, width: int = 64, seed: int = 3) -> Path:
    """A dense encoder on disk."""
    torch.manual_seed(seed)
    return checkpoint(layers=1, hidden_size=width).save(path)


def test_an_encoder_is_compatible_with_another_one(tmp_path: Path) -> None:
    """The old encoder is named: its vectors are those that `Index` stores, and its digest is kept."""
    old = load_encoder(saved(tmp_path / "old"))
    method = BT2(old=str(tmp_path / "old"), old_dims=64, new_dims=64, variant="bidirectional")
    ckpt = checkpoint(layers=1)
    run(ckpt, PAIRS, objective=method, steps=2)
    rows = list(method.prepare(ckpt, [dict(pair) for pair in PAIRS[:3]], _draws()))
    vectors = torch.from_numpy(old.encode_documents([PAIRS[0]["positive"], *PAIRS[0]["negatives"]]))  # type: ignore[arg-type]
    assert torch.allclose(rows[0]["old_documents"], vectors, atol=1e-5)
    ckpt.save(tmp_path / "new")
    new = load_encoder(tmp_path / "new")
    assert new.extends == (old.weights, old.dimensions)  # type: ignore[attr-defined]
    with Index.create(tmp_path / "index", kind="dense", encoder=old, chunk=0) as index:
        index.add({"id": str(n), "text": text} for n, text in enumerate(TEXTS[:6]))
        assert index.upgrade(tmp_path / "new")["to"]["fingerprint"] == new.fingerprint
        assert len(index.search("the dog", k=9)) == 6
    with Index.create(
        tmp_path / "other", kind="dense", encoder=load_encoder(tmp_path / "old", pooling="mean")
    ) as index:
        index.add([{"id": "1", "text": TEXTS[0]}])
        with pytest.raises(IntaglioError, match="vectors of a third space"):
            index.upgrade(tmp_path / "new")
    third = BT2(old=str(tmp_path / "new"), old_dims=new.dimensions, new_dims=64)
    run(checkpoint(layers=1), PAIRS, objective=third, steps=1)
    assert third.extends == (new.weights, new.dimensions)  # type: ignore[attr-defined]
    assert third.extends[0] != fingerprint(ckpt.model)  # of the head, too
    with pytest.raises(IntaglioError, match=r"the old encoder gives vectors of .* dimensions, not 5; set old_dims"):
        run(checkpoint(layers=1), PAIRS, objective=BT2(old=str(tmp_path / "old"), old_dims=5, extra_dims=0), steps=1)


def _draws() -> Any:
    from intaglio.trainer import KeyedRNG

    return KeyedRNG(0)


def test_the_old_encoder_is_the_checkpoint_before_training() -> None:
    ckpt, method = checkpoint(layers=1), BT2(extra_dims=4)
    before = checkpoint(layers=1)
    run(ckpt, PAIRS, objective=method, steps=2)
    rows = list(method.prepare(ckpt, [dict(pair) for pair in PAIRS[:2]], _draws()))
    from intaglio.trainer.contrastive import Contrastive

    expected = Contrastive().encode(before, [PAIRS[0]["query"]], "query")
    assert torch.allclose(rows[0]["old_query"], expected[0], atol=1e-6)


def test_the_independent_encoder_is_imitated(tmp_path: Path) -> None:
    saved(tmp_path / "independent", 32)
    losses = []
    for weight in (0.0, 5.0):
        method = BT2(independent=str(tmp_path / "independent"), extra_dims=4, independent_weight=weight)
        history = run(checkpoint(layers=1), PAIRS, objective=method, steps=8).history
        assert "imitation" in history[0].parts
        losses.append(float(history[-1].parts["imitation"]))
    assert losses[1] < losses[0]


def test_chunks_are_made() -> None:
    """Vectors of chunks are those of the whole batch."""
    made = []
    for size in (None, 2):
        method, ckpt = BT2(extra_dims=4, chunk_size=size), checkpoint(layers=1)
        made.append(method.loss(ckpt.model, batch_of(method, ckpt)).total)
    assert torch.allclose(*made, rtol=1e-5)


def test_margin_mse_replaces_the_task_alone() -> None:
    ckpt = checkpoint(layers=1)
    data = [{**pair, "scores": [2.0, 1.0, 0.5]} for pair in PAIRS]
    history = run(ckpt, data, objective=BT2(extra_dims=4, loss_type="margin_mse"), steps=1).history
    assert set(history[0].parts) >= {"task", "influence", "alignment"}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"arm": "procrustes"}, "the arm procrustes is not trained; `index upgrade"),
        ({"old_dims": 200}, "at least the 200 of the old vectors are needed"),
        ({"arm": "bct", "new_dims": 3, "extra_dims": 0}, "the head has 3 dimensions; at least the"),
    ],
)
def test_what_cannot_be_trained_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(IntaglioError, match=sentence):
        run(checkpoint(layers=1), PAIRS, objective=BT2(**fields), steps=1)


def test_the_old_encoder_is_named_where_texts_are_read_otherwise() -> None:
    with pytest.raises(ValidationError, match="old is missing; name the old encoder with variant echo"):
        BT2(variant="echo")
