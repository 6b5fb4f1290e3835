"""DKVB: locality and keys by the card, the toy of the paper's figure, checkpoints, and the command `classify`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner

from intaglio.checkpoint import Checkpoint, load
from intaglio.cli.app import app
from intaglio.errors import IntaglioError
from intaglio.methods.activations.dkvb import DKVB
from intaglio.methods.activations.dkvb.bottleneck import (
    DiscreteKeyValueBottleneck,
    ProbeHead,
    VotingHead,
    clip_grad_norm,
)
from intaglio.methods.activations.dkvb.training import train_values
from tests.alive import alive
from tests.families import tiny_model, tiny_tokenizer
from tests.trainer.helpers import TEXTS

LABELS = str(Path(__file__).parent / "data" / "labelled.jsonl")
ROWS = [json.loads(line) for line in Path(LABELS).read_text().splitlines()]
SIZES = {"num_codebooks": 4, "num_pairs": 32, "key_dim": 4, "init_epochs": 2, "epochs": 2, "batch_size": 8}
EXAMPLES = ({"labels": LABELS, **SIZES}, {"labels": LABELS, **SIZES, "head": "mlp", "value_std": 0.1})
ALIVE = {
    "labels": "test_labels_are_a_file_or_given",
    "pooling": "cls",
    "length": 4,
    "num_codebooks": 3,
    "num_pairs": 16,
    "key_dim": 3,
    "splitter": "learned_projection",
    "key_init": "kmeans",
    "key_texts": "recipe",
    "init_epochs": 1,
    "ema_decay": 0.5,
    "ema_eps": 1.0,
    "threshold_factor": 0.0,
    "topk": 2,
    "temperature": 1.0,
    "head": "linear",
    "value_dim": alive(3, head="linear"),
    "mlp_width": alive(5, head="mlp"),
    "value_std": 0.1,
    "restrict_to_used": "test_classifying_fetches_pairs_that_training_fetched",
    "max_classes": 5,
    "epochs": 3,
    "batch_size": 5,
    "learning_rate": 1.0,
    "head_learning_rate": alive(0.5, head="linear"),
    "label_smoothing": 0.0,
    "max_grad_norm": 1e-3,
}


def encoder(family: str = "bert") -> Checkpoint:
    return Checkpoint(tiny_model(family, layers=1), tiny_tokenizer(family), "tiny")


def observe(method: Any) -> Any:
    ckpt = encoder()
    method.fit(ckpt, TEXTS[:8], seed=1)
    attachment = ckpt.attachments["dkvb"]
    return attachment.tensors, attachment.about["classes"], ckpt.fitted("dkvb").classify(ckpt, TEXTS)


def bottleneck(dim: int = 6, codebooks: int = 3, pairs: int = 5, **more: Any) -> DiscreteKeyValueBottleneck:
    made = DiscreteKeyValueBottleneck(dim, codebooks, pairs, more.pop("dim_keys", 2), more.pop("dim_values", 4), **more)
    made.freeze_keys()
    return made


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained(made: DiscreteKeyValueBottleneck, z: Tensor, labels: Tensor, **more: Any) -> None:
    given = {"epochs": 3, "batch_size": 4, "learning_rate": 0.5, **more}
    train_values(made, VotingHead(), z, labels, **given)


# --- Faithful means ---------------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.integers(1, 3))
def test_a_batch_changes_the_fetched_values_alone(seed: int, topk: int) -> None:
    """values.grad is nonzero at exactly {(c, j*_c(x))}; every other value row is bit-identical after the step."""
    made = bottleneck(topk=topk, value_std=1.0)
    z, labels = draws(4, 6, seed=seed), torch.tensor([0, 1, 2, 3])
    fetched = made(z)
    logits = VotingHead()(fetched.values)
    nn.functional.cross_entropy(logits, labels).backward()
    assert made.values.grad is not None
    assert made.values.grad.is_sparse
    touched = made.values.grad.to_dense().any(1).view(3, 5)
    expected = torch.zeros(3, 5, dtype=torch.bool)
    for codebook in range(3):
        expected[codebook, fetched.indices[:, codebook].flatten()] = True
    assert torch.equal(touched, expected)
    before = made.values.detach().clone()
    made.values.grad = None
    trained(made, z, labels)
    changed = (made.values.detach() != before).any(1).view(3, 5)
    assert torch.equal(changed, expected)
    assert torch.equal(made.use_counts > 0, expected)


def test_a_text_with_other_pairs_is_predicted_bit_identically() -> None:
    """Prediction for any x' whose selected pairs are disjoint from the batch's is bit-identical."""
    made = bottleneck(value_std=1.0, restrict_to_used=False)
    z, z_other = draws(1, 6), draws(40, 6, seed=1)
    pairs, other = made.lookup(made.heads(z))[0], made.lookup(made.heads(z_other))[0]
    disjoint = (other != pairs).flatten(1).all(1)
    assert 0 < int(disjoint.sum()) < 40
    before = made.eval()(z_other).values
    trained(made, z, torch.tensor([2]))
    after = made(z_other).values
    assert torch.equal(after[disjoint], before[disjoint])
    assert not torch.equal(after[~disjoint], before[~disjoint])


def test_keys_splitter_and_encoder_stay_as_they_are() -> None:
    """keys, splitter, encoder receive no gradient and do not change after freeze_keys(); equal indices twice."""
    made = bottleneck(splitter="learned_projection", value_std=1.0)
    z = draws(8, 6).requires_grad_()
    first = made(z)
    VotingHead()(first.values).sum().backward()
    assert z.grad is None
    assert made.splitter.projection.grad is None
    state = {name: value.clone() for name, value in made.state_dict().items() if name != "use_counts"}
    trained(made, z.detach(), torch.zeros(8, dtype=torch.long))
    assert set(state) == {"keys", "values", "splitter.projection"}  # sums of the moving average are not stored
    moved = [name for name, value in made.state_dict().items() if name in state and not torch.equal(value, state[name])]
    assert moved == ["values"]
    assert torch.equal(made.train()(z).indices, first.indices)
    with pytest.raises(IntaglioError, match="the keys are frozen"):
        made.update_keys(made.heads(z))


def test_one_pair_gives_one_constant_the_log_prior() -> None:
    """C=1,K=1: output is one constant vector for all inputs (logits = class log-prior at convergence)."""
    made = bottleneck(codebooks=1, pairs=1)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])
    trained(made, draws(8, 6), labels, epochs=400, batch_size=8, learning_rate=2.0, label_smoothing=0.0)
    outputs = made(draws(5, 6, seed=3)).values.reshape(5, 4)
    assert torch.equal(outputs, outputs[:1].expand(5, 4))
    assert outputs[0].softmax(-1).tolist() == pytest.approx([0.5, 0.25, 0.125, 0.125], abs=1e-3)


def test_keys_at_the_data_are_a_nearest_neighbour_classifier() -> None:
    """Codebook equal to data: training reaches a 1-nearest-neighbour classifier exactly."""
    made = bottleneck(dim=2, codebooks=1, pairs=20, splitter="chunk")
    z, labels = draws(20, 2), torch.arange(20) % 4
    made.keys.copy_(z[None])
    trained(made, z, labels, epochs=30, learning_rate=20.0)
    probe = draws(200, 2, seed=5)
    nearest = torch.cdist(probe, z).argmin(1)
    chosen = VotingHead()(made(probe).values).argmax(-1)
    assert torch.equal(chosen, labels[nearest])


def test_the_order_of_the_pairs_does_not_matter() -> None:
    """Permuting the K pairs of a codebook (keys with values) leaves outputs unchanged."""
    made, z = bottleneck(value_std=1.0, topk=2), draws(9, 6)
    before = VotingHead()(made(z).values)
    order = torch.tensor([3, 1, 4, 0, 2])
    made.keys.copy_(made.keys[:, order])
    made.values.data.copy_(made.values.data.view(3, 5, 4)[:, order].flatten(0, 1))
    made.use_counts.copy_(made.use_counts[:, order])
    assert torch.allclose(VotingHead()(made(z).values), before, atol=1e-6)


def test_values_of_zero_give_uniform_classes() -> None:
    """Zero-init values give uniform class probabilities; CE = ln(classes)."""
    logits = VotingHead()(bottleneck()(draws(6, 6)).values)
    loss = nn.functional.cross_entropy(logits, torch.arange(6) % 4)
    assert loss.item() == pytest.approx(math.log(4))


def test_tasks_that_share_no_pair_may_come_in_any_order() -> None:
    """If tasks never share a pair, training tasks in any order gives identical values."""
    centres = torch.tensor([[-9.0, -9.0], [0.0, 0.0], [9.0, 9.0]])
    results = []
    for order in ((0, 1, 2), (2, 0, 1)):
        made = bottleneck(dim=2, codebooks=1, pairs=3, splitter="chunk", dim_values=3)
        made.keys.copy_(centres[None])
        for task in order:
            trained(made, centres[task] + draws(12, 2, seed=task), torch.full((12,), task))
        results.append(made.values.detach().clone())
    assert torch.equal(*results)
    assert results[0].argmax(1).tolist() == [0, 1, 2]


def test_a_step_of_the_moving_average_by_hand() -> None:
    """EMA worked step: n=(1,0.5), m=(1,5), keys=(1,10); n starts at 0 while m starts at the key."""
    made = DiscreteKeyValueBottleneck(1, 1, 2, 1, 2, splitter="chunk", decay=0.5, eps=0.0, threshold_factor=0.0)
    for buffer in (made.keys, made.key_sums):
        buffer.copy_(torch.tensor([[[0.0], [4.0]]]))
    made.init_keys([torch.tensor([[0.0], [2.0], [6.0]])])
    assert made.cluster_size.tolist() == [[1.0, 0.5]]
    assert made.key_sums.flatten().tolist() == [1.0, 5.0]
    assert made.keys.flatten().tolist() == [1.0, 10.0]


def figure_2() -> tuple[Tensor, Tensor]:
    """Eight classes on a grid: points [8, 50, 2], and their classes [8, 50]."""
    grid = [(.25, .25), (.75, .25), (.75, .75), (.25, .75), (.75, .5), (.5, .75), (.25, .5), (.5, .25)]  # fmt: skip
    z = torch.tensor(grid)[:, None] + 0.035 * draws(8, 50, 2)
    return z, torch.arange(8)[:, None].expand(8, 50)


def test_the_toy_of_figure_2_is_learned_task_by_task_and_a_linear_probe_forgets() -> None:
    """Final accuracy on all 8 classes should be ~1.0; MLP(32) and linear probe keep only the last task(s)."""
    z, labels = figure_2()
    made = bottleneck(dim=2, codebooks=1, pairs=400, splitter="chunk", dim_values=8)
    made.keys.copy_(torch.rand(1, 400, 2, generator=torch.Generator().manual_seed(1)))
    probe = nn.Linear(2, 8)
    optimizer = torch.optim.SGD(probe.parameters(), lr=1.0)
    for task in range(4):
        rows, classes = z[[task, task + 4]].flatten(0, 1), labels[[task, task + 4]].flatten()
        trained(made, rows, classes, epochs=100, batch_size=100, learning_rate=10.0)
        for _ in range(200):
            optimizer.zero_grad()
            nn.functional.cross_entropy(probe(rows), classes).backward()
            optimizer.step()
    rows, classes = z.flatten(0, 1), labels.flatten()
    outputs = VotingHead()(made(rows).values), probe(rows)
    scores = [float((logits.argmax(-1) == classes).float().mean()) for logits in outputs]
    assert scores[0] > 0.97
    assert scores[1] < 0.6


# --- The layer --------------------------------------------------------------------------------------------------------


def test_heads_are_projections_of_unit_columns_or_chunks() -> None:
    z = draws(2, 3, 6)
    made = bottleneck()
    assert torch.allclose(made.splitter.projection.norm(dim=1), torch.ones(3, 2))
    expected = torch.stack([z @ made.splitter.projection[c] for c in range(3)], 1)
    assert torch.allclose(made.heads(z), expected, atol=1e-6)
    assert torch.equal(bottleneck(splitter="chunk").heads(z)[:, 1], z[..., 2:4])
    assert torch.equal(made.heads(z[:, 0]), made.heads(z)[:, :, :1])
    with pytest.raises(IntaglioError, match=r"splitter is chunk with 3 .* together 6; .* width is 7"):
        bottleneck(dim=7, splitter="chunk")
    with pytest.raises(IntaglioError, match="topk is 9; a codebook has 5 pairs"):
        bottleneck(topk=9)


def test_the_nearest_pairs_are_fetched_with_their_distances_whatever_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    from intaglio.methods.activations.dkvb import bottleneck as module

    made, z = bottleneck(topk=2, value_std=1.0), draws(4, 3, 6)
    found = made.eval()(z)
    distance = torch.cdist(made.heads(z).double(), made.keys[None].double()).square()  # [B, C, N, K]
    expected = distance.topk(2, largest=False)
    assert torch.equal(found.indices, expected.indices.transpose(2, 3))
    assert torch.allclose(found.distances.double(), expected.values.transpose(2, 3), atol=1e-5)
    values = made.values.view(3, 5, 4)
    assert torch.equal(found.values[1, 2, 1, 0], values[2, found.indices[1, 2, 1, 0]])
    assert torch.equal(found.keys[1, 2, 1, 0], made.keys[2, found.indices[1, 2, 1, 0]])
    monkeypatch.setattr(module, "MAX_DISTANCES", 1)
    assert torch.equal(made(z).indices, found.indices)


def test_evaluation_falls_back_to_the_nearest_trained_key() -> None:
    """An unseen key falls back to the nearest TRAINED key; a codebook without one to the nearest."""
    made = bottleneck(dim=1, codebooks=2, pairs=3, dim_keys=1, value_std=1.0)
    made.keys.copy_(torch.tensor([0.0, 5.0, 9.0])[None, :, None].expand(2, 3, 1))
    heads = torch.tensor([8.0]).expand(1, 2, 1, 1)
    assert made.lookup(heads, restrict=True)[0].flatten().tolist() == [2, 2]
    made.use_counts[0, :2] = 1
    assert made.lookup(heads, restrict=True)[0].flatten().tolist() == [1, 2]
    assert made.lookup(heads)[0].flatten().tolist() == [2, 2]


def test_training_fetches_the_nearest_pair_even_if_it_is_new() -> None:
    made = bottleneck(dim=1, codebooks=1, pairs=3, dim_keys=1, splitter="chunk")
    made.keys.copy_(torch.tensor([0.0, 5.0, 9.0])[None, :, None])
    made.use_counts[0, 0] = 1
    assert made.eval()(torch.tensor([[8.0]])).indices.item() == 0
    assert made.train()(torch.tensor([[8.0]])).indices.item() == 2


def test_training_counts_its_fetches_and_evaluation_does_not() -> None:
    made, z = bottleneck(), draws(7, 6)
    made.train()(z)
    assert int(made.use_counts.sum()) == 21
    assert made(z).counts.min() >= 1
    total = int(made.use_counts.sum())
    made.eval()(z)
    assert int(made.use_counts.sum()) == total == 42


def test_gumbel_sampling_prefers_near_keys() -> None:
    made = bottleneck(dim=1, codebooks=1, pairs=3, dim_keys=1, temperature=1.0)
    made.keys.copy_(torch.tensor([0.0, 1.0, 9.0])[None, :, None])
    index = made.lookup(torch.zeros(4000, 1, 1, 1))[0].flatten()
    shares = torch.bincount(index, minlength=3) / 4000
    assert shares.tolist() == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.e), 0.0], abs=0.04)


def test_dead_keys_become_heads_of_the_batch_and_kmeans_starts_at_the_means() -> None:
    z = torch.cat([draws(30, 1) * 0.1, 10 + draws(30, 1) * 0.1])
    made = DiscreteKeyValueBottleneck(1, 1, 2, 1, 2, splitter="chunk", threshold_factor=3.0)
    made.init_keys([z])
    assert all(float((key - z).abs().min()) == 0 for key in made.keys.flatten())
    made = DiscreteKeyValueBottleneck(1, 1, 8, 1, 2, splitter="chunk", key_init="kmeans", threshold_factor=0.0)
    made.init_keys([z], epochs=3)
    assert all(float((key - z).abs().min()) < 0.3 for key in made.keys.flatten())
    assert float(torch.cdist(z, made.keys[0]).amin(1).max()) < 0.4
    made._kmeans(torch.tensor([5.0, 9.0]).repeat(6)[None, :, None])  # eight keys, two distinct heads
    assert set(made.keys.flatten().tolist()) == {5.0, 9.0}  # empty clusters keep their mean
    open_projection = DiscreteKeyValueBottleneck(4, 1, 2, 1, 2, splitter="learned_projection")
    with pytest.raises(IntaglioError, match="the learned projection is not frozen"):
        open_projection.init_keys([draws(3, 4)])
    open_projection.freeze_splitter()
    open_projection.init_keys([draws(3, 4)])


@pytest.mark.parametrize(("factor", "replaced"), [(0.19, False), (0.21, True)])
def test_a_key_is_dead_below_a_share_of_uniform_use(factor: float, replaced: bool) -> None:
    """thr = threshold_factor * batch_size * H * W / K."""
    made = DiscreteKeyValueBottleneck(1, 1, 2, 1, 2, splitter="chunk", decay=0.0, threshold_factor=factor)
    made.keys.copy_(torch.tensor([[[0.0], [9.0]]]))
    z = torch.cat([torch.linspace(-1, 1, 18)[:, None], torch.tensor([[9.0], [10.0]])])
    made.init_keys([z])
    assert made.cluster_size.tolist() == [[18.0, 2.0]]
    assert float(made.keys[0, 0]) == pytest.approx(0, abs=1e-4)
    assert (float(made.keys[0, 1]) == pytest.approx(9.5, abs=1e-3)) is not replaced


def test_decoders_read_the_codebooks_and_real_tokens_alone() -> None:
    values, mask = draws(2, 3, 2, 4, 5), torch.tensor([[True, True, False, False], [True] * 4])
    logits = VotingHead()(values, mask)
    assert torch.allclose(logits[0], values[0].sum(1).mean(0)[:2].mean(0), atol=1e-6)
    assert torch.allclose(logits[1], VotingHead()(values)[1], atol=1e-6)
    linear, mlp = ProbeHead(3, 5, 7), ProbeHead(3, 5, 7, hidden=6)
    assert [layer.weight.shape for layer in (linear.layers[0], *mlp.layers[::2])] == [(7, 15), (6, 15), (7, 6)]
    flat = values[:, :, :, :1].sum(2).transpose(1, 2).reshape(2, 15)
    assert torch.allclose(linear(values[:, :, :, :1]), linear.layers[0](flat), atol=1e-5)


def test_gradients_are_clipped_to_a_joint_norm() -> None:
    dense, sparse = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4, 2))
    dense.grad = torch.full((3,), 2.0)
    sparse.grad = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.full((2, 2), 1.0), (4, 2))
    clip_grad_norm([dense, sparse], 0.0)
    assert sparse.grad.to_dense()[1].tolist() == [2.0, 2.0]
    clip_grad_norm([dense, sparse], 1.0)
    both = torch.cat([dense.grad, sparse.grad.to_dense().flatten()])
    assert float(both.norm()) == pytest.approx(1.0, abs=1e-5)


# --- Learning classes -------------------------------------------------------------------------------------------------


def blobs(classes: int = 4, count: int = 20) -> tuple[Tensor, list[str]]:
    centres = 4 * draws(classes, 16, seed=11)
    z = (centres[:, None] + draws(classes, count, 16)).flatten(0, 1)
    return z, [f"c{index}" for index in range(classes) for _ in range(count)]


METHOD = DKVB(num_codebooks=16, num_pairs=32, key_dim=4, init_epochs=3, epochs=10, batch_size=16, learning_rate=2.0)


def accuracy(ready: DKVB, z: Tensor, labels: list[str]) -> float:
    chosen = ready.probs(z).argmax(-1).tolist()
    return sum(ready.classes[index] == label for index, label in zip(chosen, labels, strict=True)) / len(labels)


@pytest.mark.parametrize("place", [None, 6])
def test_later_classes_are_learned_without_forgetting(place: int | None) -> None:
    z, labels = blobs()
    method = METHOD.model_copy(update={"max_classes": place})
    ready = method.fit_embeddings(z[:40], labels[:40], keys_ND=z)
    assert ready.classes == ("c0", "c1")
    for start in (40, 60):
        ready.learn_embeddings(z[start : start + 20], labels[start : start + 20])
    assert ready.classes == ("c0", "c1", "c2", "c3")
    assert accuracy(ready, z, labels) > 0.95
    probs = ready.probs(z)
    assert probs.shape == (80, 4)
    assert torch.allclose(probs.sum(1), torch.ones(80))
    assert METHOD._bottleneck is None


def test_keys_are_fitted_to_the_embeddings_given_for_them() -> None:
    z, labels = blobs()
    own, other = (METHOD.fit_embeddings(z[:40], labels[:40], keys_ND=keys)._bottleneck.keys for keys in (None, z[40:]))
    assert torch.equal(own, METHOD.start(z[:40], ["c0", "c1"])._bottleneck.keys)
    assert torch.equal(other, METHOD.start(z[40:], ["c0", "c1"])._bottleneck.keys)
    assert not torch.equal(own, other)


def test_classifying_fetches_pairs_that_training_fetched() -> None:
    z, labels = blobs()
    probs = []
    for restrict in (True, False):
        method = METHOD.model_copy(update={"restrict_to_used": restrict, "init_epochs": 0, "num_pairs": 64})
        ready = method.fit_embeddings(z[::4], labels[::4])
        indices = ready._bottleneck(3 * z).indices
        used = ready._bottleneck.use_counts.gather(1, indices[:, :, 0, 0].T)
        assert bool((used > 0).all()) is restrict
        probs.append(ready.probs(3 * z))
    assert not torch.equal(*probs)


def test_a_decoder_with_weights_is_frozen_when_more_is_learned_and_has_a_fixed_number_of_classes() -> None:
    z, labels = blobs()
    method = METHOD.model_copy(update={"head": "linear", "value_std": 0.3, "max_classes": 3, "head_learning_rate": 0.5})
    ready = method.fit_embeddings(z[:40], labels[:40], keys_ND=z)
    before = [value.clone() for value in ready._decoder.parameters()]
    ready.learn_embeddings(z[40:60], labels[40:60])
    assert all(torch.equal(a, b) for a, b in zip(before, ready._decoder.parameters(), strict=True))
    assert accuracy(ready, z[:60], labels[:60]) > 0.6
    with pytest.raises(IntaglioError, match="make 4 classes with those known; there is place for 3"):
        ready.learn_embeddings(z[60:], labels[60:])
    assert ready.classes == ("c0", "c1", "c2")


def test_two_fits_are_equal_and_seeds_differ() -> None:
    z, labels = blobs()
    one, two, other = (METHOD.fit_embeddings(z, labels, seed=seed).probs(z) for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_the_papers_values() -> None:
    paper = DKVB.paper()
    assert (paper.num_codebooks, paper.num_pairs, paper.key_dim, paper.learning_rate) == (256, 4096, 14, 0.3)
    assert (paper.batch_size, paper.epochs, paper.key_texts, paper.label_smoothing) == (256, 2000, "recipe", 0.1)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def test_labels_are_a_file_or_given(tmp_path: Path) -> None:
    with_file, given = encoder(), encoder()
    DKVB(labels=LABELS, **SIZES).fit(with_file)
    DKVB(**SIZES).fit(given, ROWS)
    tensors = [ckpt.attachments["dkvb"].tensors for ckpt in (with_file, given)]
    assert all(torch.equal(tensors[0][name], value) for name, value in tensors[1].items())
    step = with_file.record.steps[-1]
    assert (step.verb, step.chosen["classes"], step.chosen["texts"]) == ("fit", ["code", "question", "story"], 36)
    path = tmp_path / "one.jsonl"
    path.write_text("".join(json.dumps({**row, "label": "same"}) + "\n" for row in ROWS))
    for method, texts, says in (
        (DKVB(labels=str(path)), None, "have one class; at least two are needed"),
        (DKVB(), TEXTS, "labels is missing"),
        (DKVB(), None, "labels is missing"),
        (DKVB(labels=LABELS, key_texts="recipe"), None, "key_texts is recipe; give labels: FILE, and the texts"),
        (DKVB(labels=LABELS, max_classes=2), None, "make 3 classes with those known; there is place for 2"),
        (DKVB(labels=LABELS, splitter="chunk"), None, "splitter is chunk with 64 codebooks"),
    ):
        ckpt = encoder()
        with pytest.raises(IntaglioError, match=says) as caught:
            method.fit(ckpt, texts)
        assert "\n" not in str(caught.value)
        assert not ckpt.attachments
        assert not ckpt.record.steps


@pytest.mark.parametrize("family", ["bert", "modernbert", "llama", "gemma3"])
def test_any_encoder_is_fitted_saved_and_taught(family: str, tmp_path: Path) -> None:
    ckpt = encoder(family)
    before = {name: value.clone() for name, value in ckpt.model.state_dict().items()}
    DKVB(**SIZES).fit(ckpt, [row for row in ROWS if row["label"] != "story"])
    ckpt.save(tmp_path / "a")
    back = load(tmp_path / "a")
    ready = back.fitted("dkvb")
    assert ready.classify(back, TEXTS) == ckpt.fitted("dkvb").classify(ckpt, TEXTS)
    ready.learn(back, [row for row in ROWS if row["label"] == "story"])
    assert ready.classes == ("code", "question", "story")
    back.save_attachment("dkvb")
    again = load(tmp_path / "a")
    taught = again.fitted("dkvb", restrict_to_used=True)
    assert taught.classify(again, TEXTS) == ready.classify(back, TEXTS)
    assert [step.verb for step in again.record.steps] == ["fit", "fit"]
    assert again.record.steps[-1].chosen["new_classes"] == ["story"]
    assert again.record.steps[-1].seed == 0
    assert all(torch.equal(before[name], value) for name, value in again.model.state_dict().items())
    assert ready.classify(back, []) == []


def test_what_cannot_change_and_other_models_are_refused(tmp_path: Path) -> None:
    ckpt = encoder()
    DKVB(labels=LABELS, **SIZES).fit(ckpt)
    with pytest.raises(IntaglioError, match="key_dim cannot change after the fit; fit dkvb again"):
        ckpt.fitted("dkvb", key_dim=3)
    assert ckpt.fitted("dkvb", epochs=7).epochs == 7
    other = Checkpoint(tiny_model("bert", layers=1, hidden_size=16), tiny_tokenizer("bert"), "tiny")
    other.attachments = ckpt.attachments
    with pytest.raises(IntaglioError, match="does not fit BertForMaskedLM of width 16"):
        other.fitted("dkvb")
    with pytest.raises(IntaglioError, match="dkvb has not been fitted"):
        DKVB().classify(ckpt, ["a"])
    with pytest.raises(IntaglioError, match="no tokenizer"):
        DKVB(labels=LABELS).fit(Checkpoint(tiny_model("bert", layers=1)))
    with pytest.raises(IntaglioError, match="wanda is not fitted to a checkpoint"):
        ckpt.fitted("wanda")
    with pytest.raises(IntaglioError, match="dkvb is no decoder"):
        ckpt.decoder("dkvb")
    with pytest.raises(IntaglioError, match="was not read from a directory"):
        ckpt.save_attachment("dkvb")


# --- The command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ckpt, path = encoder(), tmp_path_factory.mktemp("dkvb") / "model"
    DKVB(**SIZES | {"epochs": 20}).fit(ckpt, [row for row in ROWS if row["label"] != "story"])
    ckpt.save(path)
    return path


def run(*words: Any, code: int = 0) -> Any:
    done = CliRunner().invoke(app, ["classify", *map(str, words)])
    assert done.exit_code == code, done.output
    return done


def test_the_command_classifies_learns_and_measures(model: Path, tmp_path: Path) -> None:
    lines = tmp_path / "texts.txt"
    lines.write_text("def f(x): return x\n\nis it in the town\n")
    found = json.loads(run(model, lines, "--json").stdout)
    assert [row["text"] for row in found["texts"]] == ["def f(x): return x", "is it in the town"]
    assert all(set(row["probs"]) == {"code", "question"} for row in found["texts"])
    assert "accuracy" not in found
    out = tmp_path / "out"
    taught = json.loads(run(model, LABELS, "--learn", LABELS, "-o", out, "--json").stdout)
    assert (taught["new_classes"], taught["checkpoint"]) == (["story"], str(out))
    assert taught["accuracy"] == sum(row["class"] == row["label"] for row in taught["texts"]) / 36
    shown = run(out, LABELS).stdout
    assert "accuracy:" in shown
    assert "story" in shown
    assert set(json.loads(run(model, lines, "--json").stdout)["texts"][0]["probs"]) == {"code", "question"}
    assert "new classes: none" in run(out, "--learn", LABELS).stdout
    assert len(load(out).record.steps) == 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["MODEL"], "INPUTS are missing"),
        (["MODEL", LABELS, "-o", "x"], "--output and --overwrite belong to --learn"),
        (["MODEL", "none.txt"], "cannot read the text none.txt"),
        (["MODEL", "none.jsonl"], "cannot read the texts none.jsonl"),
        (["MODEL", "EMPTY"], "are empty; one text a line is needed"),
        (["MODEL", "--learn", "BAD"], "line 1 of"),
        (["PLAIN", LABELS], "nothing is attached to"),
        (["user/name", "--learn", LABELS], "user/name is no directory that could be changed"),
    ],
)
def test_bad_input_is_one_sentence(words: list[str], says: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "EMPTY").write_text("\n")
    (tmp_path / "BAD").write_text("{}\n")
    if "PLAIN" in words:
        encoder().save(tmp_path / "PLAIN")
    files = {"MODEL": model, **{name: tmp_path / name for name in ("EMPTY", "BAD", "PLAIN")}}
    done = run(*[files.get(word, word) for word in words], code=2)
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
