"""MarkovLM: exact quantities by the card, geometry, probes, real models of every family, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

from intaglio.checkpoint import Checkpoint
from intaglio.cli.app import app
from intaglio.data.texts import load_texts
from intaglio.errors import IntaglioError
from intaglio.methods.probes import markov_lm
from intaglio.methods.probes.markov_lm import MarkovLM, as_kernels, draft_acceptance, linear_head, surplus
from intaglio.methods.probes.markov_lm.finite import (
    categorical_entropy,
    compose,
    copy,
    decompose_loss,
    direct_entropy,
    discard,
    divergence,
    information_surplus,
    mutual_information,
    product,
)
from intaglio.methods.probes.markov_lm.geometry import (
    alignment_and_uniformity,
    dirichlet_energy,
    fisher_metric,
    fisher_weighted,
    induced_kernel,
    kernel_alignment,
    mean_fisher_metric,
    participation_ratio,
    predictive_kernel,
    sensitivity,
    spectral_functional,
    subspace_overlap,
    whiten,
)
from intaglio.methods.probes.markov_lm.reference import ngram_distributions
from intaglio.methods.probes.markov_lm.surplus import Positions, surplus_terms
from intaglio.modeling.anatomy import anatomy
from intaglio.trainer.rng import generator
from tests.alive import alive
from tests.families import DECODERS, ENCODERS, tiny_checkpoint_dir, tiny_model, tiny_tokenizer

SIZES = {"contexts": 12, "length": 16, "tokens": 640, "probe_width": 8, "probe_epochs": 2, "directions": 3}
EXAMPLES = (SIZES, {**SIZES, "kernel": "prototype", "extra_tokens": 2})
ALIVE = {
    "contexts": 10,
    "length": 20,
    "tokens": 480,
    "kernel": "linear",
    "beta": alive(2.0, kernel="hellinger"),
    "reference": "test_the_reference_may_be_a_model",
    "renyi_order": 0.7,
    "directions": 2,
    "extra_tokens": 2,
    "vocabulary": 5,
    "probe_width": 5,
    "probe_epochs": 1,
}
TEXTS = [
    f"the {a} fox number {n} jumps over the lazy {b}, and the {b} sleeps in the sun while the {a} fox runs away {n}"
    for n in range(12)
    for a, b in (("quick", "dog"), ("brown", "cat"), ("old", "river"), ("small", "town"))
]
NAMES = ["kl", "tv", "hellinger", "renyi"]


def model(family: str = "llama", **more: Any) -> Checkpoint:
    return Checkpoint(tiny_model(family, layers=1, **more), tiny_tokenizer(family), "tiny")


def observe(method: Any) -> Any:
    found = method.measure(model(), TEXTS)
    return {name: value for name, value in found.items() if name != "parameters"}


def distributions(rows: int, outcomes: int, seed: int = 0) -> Tensor:
    drawn = torch.rand(rows, outcomes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.pow(3) / drawn.pow(3).sum(1, keepdim=True)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- Faithful means ---------------------------------------------------------------------------------------------------


def test_entropies_of_three_outcomes() -> None:
    """p=[.5,.25,.25]: H_KL = 1.03972 nats = H(p); H_TV = 0.625 = 1 - sum p^2; the definition gives the same."""
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    assert float(categorical_entropy(p)) == pytest.approx(1.03972, abs=1e-5)
    assert float(categorical_entropy(p, "tv")) == pytest.approx(0.625)
    for name in NAMES:
        for order in (0.3, 0.5, 1.5):
            own, direct = categorical_entropy(p, name, order), direct_entropy(p, name, order)  # type: ignore[arg-type]
            assert float(own) == pytest.approx(float(direct))


@pytest.mark.parametrize("name", NAMES)
def test_a_deterministic_kernel_has_no_entropy(name: Any) -> None:
    """Deterministic kernel -> H_D = 0 for every D; uniform over V -> log V (KL)."""
    assert torch.allclose(categorical_entropy(torch.eye(4, dtype=torch.float64), name), torch.zeros(4).double())
    assert torch.allclose(categorical_entropy(torch.full((2, 5), 0.2)), torch.full((2,), math.log(5)))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.sampled_from(NAMES), st.sampled_from([0.3, 0.7, 1.6]))
def test_a_kernel_brings_distributions_nearer(seed: int, name: Any, order: float) -> None:
    """Data processing: D(pk || qk) <= D(p || q) for random finite kernels."""
    p, q, kernel = distributions(1, 5, seed), distributions(1, 5, seed + 1), distributions(5, 4, seed + 2)
    after = divergence(compose(p, kernel), compose(q, kernel), name, order)
    assert float(after) <= float(divergence(p, q, name, order)) + 1e-12


def test_kernels_compose_and_stay_stochastic() -> None:
    """Composition associativity and causality (rows sum to 1) for random finite kernels."""
    a, b, c = distributions(3, 4), distributions(4, 5, 1), distributions(5, 2, 2)
    assert torch.allclose(compose(compose(a, b), c), compose(a, compose(b, c)))
    for kernel in (compose(a, b), product(a, b), copy(3), compose(a, discard(4))):
        assert torch.allclose(kernel.sum(1), torch.ones(len(kernel)).double())
    assert torch.allclose(compose(copy(3), product(a, discard(3))), a)  # copy, keep one, discard the other
    assert copy(3).nonzero().tolist() == [[0, 0], [1, 4], [2, 8]]


def test_the_loss_is_entropy_plus_divergence_and_alignment_plus_uniformity() -> None:
    """CE - H(data) = mean KL exactly on a finite source; alignment + uniformity = CE exactly."""
    data, distribution = distributions(6, 5), distributions(1, 6, 3)[0]
    hidden, head, bias = normal(6, 3), normal(5, 3, seed=1), normal(5, seed=2)
    own = (hidden @ head.T + bias).softmax(1)
    parts = decompose_loss(data, own, distribution)
    assert parts["loss"] == pytest.approx(parts["data_entropy"] + parts["kl"], abs=1e-9)
    assert decompose_loss(data, data, distribution) == pytest.approx(
        {"loss": parts["data_entropy"], "data_entropy": parts["data_entropy"], "kl": 0.0, "entropy_gap": 0.0}
    )
    terms = alignment_and_uniformity(hidden, head, data, distribution, bias)
    assert terms["alignment"] + terms["uniformity"] == pytest.approx(parts["loss"], abs=1e-9)
    assert terms["loss"] == pytest.approx(parts["loss"], abs=1e-9)
    bare = decompose_loss(data, (hidden @ head.T).softmax(1), torch.full((6,), 1 / 6, dtype=torch.float64))
    assert alignment_and_uniformity(hidden, head, data)["loss"] == pytest.approx(bare["loss"], abs=1e-9)


def test_the_metric_is_a_covariance_and_the_curvature_of_the_divergence() -> None:
    """W^T(diag p - pp^T)W equals E s s^T; KL / (e^2/2 v^T g v) -> 1; rank bound; shift invariance."""
    head, hidden, direction = normal(7, 4), normal(4, seed=1), normal(4, seed=2)
    p = (head @ hidden).softmax(0)
    metric = fisher_metric(head, p)
    centred = head - p @ head
    assert torch.allclose(metric, torch.einsum("v,vd,ve->de", p, centred, centred), atol=1e-14)
    ratios = []
    for step in (1e-1, 1e-2, 1e-3):
        moved = (head @ (hidden + step * direction)).softmax(0)
        ratios.append(float(divergence(moved, p)) / (step**2 / 2 * float(direction @ metric @ direction)))
    assert [abs(ratio - 1) for ratio in ratios] == sorted((abs(ratio - 1) for ratio in ratios), reverse=True)
    assert ratios[-1] == pytest.approx(1, abs=5e-3)
    assert torch.allclose(fisher_metric(head + normal(4, seed=3), p), metric, atol=1e-12)
    assert int(torch.linalg.matrix_rank(fisher_metric(normal(3, 6), distributions(1, 3)[0]))) == 2
    assert float(torch.linalg.eigvalsh(metric)[0]) >= -1e-12
    jacobian = torch.func.jacrev(lambda h: (head @ h).softmax(0).log())(hidden)
    assert torch.allclose((jacobian * p[:, None]).T @ jacobian, metric, atol=1e-12)
    assert sensitivity(metric, 3 * direction) == pytest.approx(
        float(direction @ metric @ direction / direction.square().sum())
    )


def xor_source(state: Any) -> Tensor:
    """Joint distribution of a state (the last two bits) and the next two tokens, each their xor flipped at prob 0.1."""
    joint = torch.zeros(4, 2, 2, dtype=torch.float64)
    for a in (0, 1):
        for b in (0, 1):
            for first in (0, 1):
                for second in (0, 1):
                    p = 0.25 * (0.9 if first == a ^ b else 0.1) * (0.9 if second == b ^ first else 0.1)
                    joint[state(a, b), first, second] += p
    return joint


def test_two_encoders_of_equal_loss_and_different_surplus() -> None:
    """h = (W_{t-2}, W_{t-1}) gives Surplus_2 = log 2 - H(0.1) = 0.36806 nats; h = their xor has Surplus_2 = 0."""
    both, xor = (information_surplus(xor_source(state)) for state in (lambda a, b: 2 * a + b, lambda a, b: a ^ b))
    assert both["next"] == pytest.approx(xor["next"])
    assert both["surplus"] == pytest.approx(0.36806, abs=1e-5)
    assert xor["surplus"] == pytest.approx(0, abs=1e-12)
    for found in (both, xor):
        assert found["information"] == pytest.approx(found["next"] + found["surplus"])
        assert found["surplus"] == pytest.approx(found["term 1"])


def test_a_source_of_order_one_has_no_surplus_and_terms_add_up() -> None:
    """order-1 source -> 0 for every encoder; the chain rule holds exactly."""
    start, step, encoder = (
        distributions(1, 4)[0],
        distributions(4, 4, 1),
        distributions(4, 3, 2),
    )  # encoder: state given the last token
    joint = torch.einsum("a,ah,ab,bc,cd->hbcd", start, encoder, step, step, step)
    found = information_surplus(joint)
    assert found["surplus"] == pytest.approx(0, abs=1e-12)
    free = distributions(1, 3 * 2 * 2 * 2, 5)[0].view(3, 2, 2, 2)
    found = information_surplus(free)
    assert found["surplus"] == pytest.approx(found["term 1"] + found["term 2"])
    assert 0 < found["surplus"] < math.log(4)
    assert found["next"] == pytest.approx(float(mutual_information(free.sum((2, 3)))))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 9999))
def test_divergences_bound_each_other(seed: int) -> None:
    """TV^2 <= KL/2; (1-BC) <= KL/2; with d_H^2 = 2(1-BC) it is d_H^2 <= KL."""
    p, q = distributions(2, 4, seed)
    kl = float(divergence(p, q))
    assert float(divergence(p, q, "tv")) ** 2 <= kl / 2 + 1e-12
    assert float(divergence(p, q, "hellinger")) <= kl + 1e-12


def test_dirichlet_energy() -> None:
    """constant phi -> 0; equals the quadratic form with the Laplacian; K = delta -> 0."""
    kernel, feature, distribution = predictive_kernel(distributions(6, 4)), normal(6), distributions(1, 6, 3)[0]
    assert dirichlet_energy(kernel, torch.ones(6).double(), distribution) == pytest.approx(0, abs=1e-15)
    assert dirichlet_energy(torch.eye(6).double(), feature, distribution) == pytest.approx(0, abs=1e-15)
    pairs = (feature[:, None] - feature).square() * kernel * torch.outer(distribution, distribution)
    assert dirichlet_energy(kernel, feature, distribution) == pytest.approx(0.5 * float(pairs.sum()))
    uniform = (feature[:, None] - feature).square() * kernel / 36
    assert dirichlet_energy(kernel, feature) == pytest.approx(0.5 * float(uniform.sum()))


def test_kernels_of_distributions_and_their_alignment() -> None:
    """BC kernel PSD, diagonal 1; CKA(h,h) = 1; permuting contexts of K drops CKA to the null level."""
    probs, hidden = distributions(60, 5), normal(60, 4)
    kernel = predictive_kernel(probs)
    assert torch.allclose(kernel.diag(), torch.ones(60).double())
    assert float(torch.linalg.eigvalsh(kernel)[0]) > -1e-12
    similar = hidden @ hidden.T
    assert kernel_alignment(similar, similar) == pytest.approx(1)
    aligned = probs.sqrt() @ normal(5, 5, seed=4)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    near, far = (kernel_alignment(aligned @ aligned.T, k) for k in (kernel, kernel[order][:, order]))
    assert near > 0.7
    assert far < 0.25


# --- Geometry ---------------------------------------------------------------------------------------------------------


def test_each_kernel_by_its_formula() -> None:
    probs, head = distributions(5, 4), normal(4, 3)
    coefficient = probs.sqrt() @ probs.sqrt().T
    assert torch.allclose(predictive_kernel(probs, "hellinger", 0.7), (-1.4 * (1 - coefficient)).exp())
    assert torch.allclose(predictive_kernel(probs, "hellinger"), (-2 * (1 - coefficient)).exp())
    assert torch.allclose(predictive_kernel(probs, "linear"), probs @ probs.T)
    mixture = 0.5 * (probs[0] + probs[1])
    js = 0.5 * (divergence(probs[0], mixture) + divergence(probs[1], mixture))
    assert float(predictive_kernel(probs, "jensen_shannon", 2.0)[0, 1]) == pytest.approx(math.exp(-2 * float(js)))
    unit = head / head.norm(dim=1, keepdim=True)
    expected = float((probs[0] @ unit) @ (probs[1] @ unit))
    assert float(predictive_kernel(probs, "prototype", prototypes_VD=head)[0, 1]) == pytest.approx(expected)


def test_contexts_that_share_a_state_are_averaged_by_their_probabilities() -> None:
    kernel, distribution = normal(3, 3), torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    found = induced_kernel(kernel, torch.tensor([0, 0, 1]), distribution)
    assert float(found[0, 1]) == pytest.approx(0.4 * float(kernel[0, 2]) + 0.6 * float(kernel[1, 2]))
    assert torch.allclose(induced_kernel(kernel, torch.arange(3), distribution), kernel)


def test_alignment_weights_contexts_as_repeats_would() -> None:
    """CKA must be weighted by the context distribution mu when contexts are not uniform."""
    hidden, probs = normal(5, 3), distributions(5, 4, 1)
    counts = torch.tensor([3, 1, 1, 2, 1])
    repeated = torch.repeat_interleave(torch.arange(5), counts)
    a, b = hidden @ hidden.T, predictive_kernel(probs)
    distribution = counts.double() / counts.sum()
    assert kernel_alignment(a, b, distribution) == pytest.approx(
        kernel_alignment(a[repeated][:, repeated], b[repeated][:, repeated])
    )
    assert spectral_functional(hidden, b, distribution) == pytest.approx(
        spectral_functional(hidden[repeated], b[repeated][:, repeated])
    )
    assert kernel_alignment(torch.ones(4, 4), torch.eye(4)) == 0


def test_spectra_subspaces_and_whitening() -> None:
    assert participation_ratio(torch.tensor([1.0, 1.0, 0.0])) == pytest.approx(2)
    assert participation_ratio(torch.zeros(3)) == 0
    head, probs = normal(6, 4), distributions(5, 6, 1)
    mean = sum(fisher_metric(head, p) for p in probs) / 5
    assert torch.allclose(mean_fisher_metric(head, probs), mean)
    distribution = distributions(1, 5, 2)[0]
    weighted = sum(w * fisher_metric(head, p) for w, p in zip(distribution, probs, strict=True))
    assert torch.allclose(mean_fisher_metric(head, probs, distribution), weighted)
    hidden = normal(40, 4)
    own = fisher_weighted(hidden, mean)
    assert torch.allclose(own @ own.T, hidden @ mean @ hidden.T, atol=1e-9)
    white = whiten(hidden, hidden.mean(0), hidden.T.cov())
    assert torch.allclose(white.T.cov(), torch.eye(4).double(), atol=1e-6)
    assert torch.allclose(white.mean(0), torch.zeros(4).double(), atol=1e-9)
    kernel = hidden @ hidden.T
    assert subspace_overlap(hidden, kernel, 3) == pytest.approx(1)
    assert subspace_overlap(hidden, normal(40, 40, seed=8) @ normal(40, 40, seed=8).T, 2) < 0.7


# --- References and probes --------------------------------------------------------------------------------------------


def test_an_n_gram_reference_by_hand() -> None:
    stream = torch.tensor([0, 1, 2, 0, 1, 3, 1, 2])
    found = ngram_distributions(stream, [[9, 0, 1], [1]], 4).double()
    unigram = torch.tensor([2, 3, 2, 1]).double().add(3 / 4) / 11
    bigram = (torch.tensor([0, 0, 2, 1]) + 3 * unigram) / 6
    trigram = (torch.tensor([0, 0, 1, 1]) + 3 * bigram) / 5
    assert torch.allclose(found[0], trigram, atol=1e-6)
    assert torch.allclose(found[1], bigram, atol=1e-6)
    assert torch.allclose(found.sum(1), torch.ones(2).double(), atol=1e-6)


def order_2_chain(count: int, informed: bool) -> Positions:
    """Bits that are the xor of the two before, flipped with prob 0.1; h is both bits, or their xor alone."""
    draws = torch.Generator().manual_seed(0)
    flips = (torch.rand(count + 4, generator=draws) < 0.1).long().tolist()
    bits = [0, 1]
    for flip in flips:
        bits.append(bits[-1] ^ bits[-2] ^ flip)
    stream = torch.tensor(bits)
    before, last = stream[:count], stream[1 : count + 1]
    hidden = torch.stack([before, last] if informed else [before ^ last], 1).float()
    tokens = torch.stack([stream[2 : count + 2], stream[3 : count + 3]], 1)
    part = torch.tensor([0, 0, 0, 1, 2]).repeat_interleave(count // 5)
    return Positions(hidden, tokens, part)


@pytest.mark.parametrize(("informed", "low", "high"), [(True, 0.28, 0.44), (False, -0.03, 0.03)])
def test_probes_estimate_the_exact_surplus(informed: bool, low: float, high: float) -> None:
    """Off by one: H_t predicts W_t; surplus concerns W_{t+1} onward GIVEN W_t: 0.368 nats, and 0 for the xor."""
    (term,) = surplus_terms(order_2_chain(3000, informed), torch.eye(2), width=16, epochs=6)
    assert low < term.surplus < high
    assert term.without_hidden == pytest.approx(math.log(2), abs=0.03)
    assert term.outcomes == 3


def test_probes_stop_two_epochs_after_their_best_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation has the opposite outcomes, so that every epoch makes it worse."""
    epochs: list[int] = []
    monkeypatch.setattr(surplus, "generator", lambda *args: epochs.append(args[-1]) or generator(*args))
    part, x = torch.arange(120) % 3, torch.arange(120)[:, None] % 2 * 2.0 - 1
    outcome = torch.where(part == 0, x[:, 0] > 0, x[:, 0] < 0).long()
    surplus._fit(x, outcome, 2, part, 8, 9, 1e-2, 0)
    assert epochs == [0, 1, 2]


def test_a_table_counts_training_pairs_alone() -> None:
    """Each row is smoothed by the unigram distribution of the training outcomes."""
    before, outcome = torch.tensor([0, 0, 1, 0, 1]), torch.tensor([0, 1, 1, 0, 0])
    validation, held_out = surplus._table(before, outcome, 2, torch.tensor([0, 0, 0, 1, 2]))
    unigram, prior = 1.5 / 4, surplus.TABLE_PRIOR
    assert validation.tolist() == pytest.approx([(1 + prior * unigram) / (2 + prior)])
    assert held_out.tolist() == pytest.approx([prior * unigram / (1 + prior)])


# --- Models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
def test_the_composition_is_the_models_softmax_and_every_family_is_measured(family: str) -> None:
    """Composition must equal model(ids).logits.softmax exactly; verify head(h) == logits."""
    ckpt = model(family)
    ids = torch.randint(8, 150, (2, 9), generator=torch.Generator().manual_seed(0))
    kernels = as_kernels(ckpt)
    with torch.no_grad():
        logits = ckpt.model(ids).logits
    assert torch.equal(kernels.head(kernels.encode(ids)), logits.softmax(-1))
    head, bias = linear_head(ckpt, kernels.encode(ids)[0])
    linear = kernels.encode(ids) @ head.T + (0 if bias is None else bias)
    assert torch.allclose(linear, logits, atol=1e-4)
    found = MarkovLM(**SIZES).measure(ckpt, TEXTS)
    steps = found["steps"]
    assert steps["alignment"] + steps["uniformity"] == pytest.approx(steps["loss"], abs=1e-6)
    assert found["alignment"]["own_cka"] > found["alignment"]["permuted_cka"]
    assert sum(count for _, _, count in steps["histogram"]) > 0
    assert json.loads(json.dumps(found)) == found


def test_the_steps_of_a_model_by_hand() -> None:
    ckpt, method = model(), MarkovLM(**SIZES)
    found = method.measure(ckpt, TEXTS)
    again = method.measure(ckpt, TEXTS)
    assert found == again == method.measure(ckpt, ["a short text", *TEXTS])
    assert found != method.measure(ckpt, TEXTS, seed=1)
    text = method._read(ckpt, load_texts(TEXTS), 4, lambda *_: None)
    ids = text.ids_NL[text.part_N == 2]
    with torch.no_grad():
        logits = ckpt.model(ids).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert found["steps"]["loss"] == pytest.approx(float(loss), rel=1e-4)
    entropy = categorical_entropy(logits[:, :-1].softmax(-1)).mean()
    assert found["steps"]["entropy"] == pytest.approx(float(entropy), rel=1e-4)
    assert found["steps"]["entropy_gap"] == pytest.approx(found["steps"]["entropy"] - found["steps"]["loss"])
    assert found["fisher"]["leading_shares"][-1][1] == pytest.approx(1)
    assert len(found["fisher"]["largest"]) == 3 == len(found["alignment"]["dirichlet"])


def test_what_is_fitted_reads_training_texts_and_tokens_come_after_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """H_t predicts W_t; surplus concerns W_{t+1} onward. Whitening and n-grams do not see the measured contexts."""
    ckpt, method, seen = model(), MarkovLM(**SIZES, extra_tokens=2), {}

    def spied(module: Any, name: str) -> None:
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: seen.update({name: (a, k)}) or own(*a, **k))

    spied(markov_lm.geometry, "whiten")
    spied(markov_lm, "ngram_distributions")
    spied(markov_lm, "surplus_terms")
    method.measure(ckpt, TEXTS)
    text = method._read(ckpt, load_texts(TEXTS), 4, lambda *_: None)
    known = text.hidden_NLD[text.part_N == 0].flatten(0, 1)
    assert torch.allclose(seen["whiten"][0][1], known.double().mean(0))
    assert torch.equal(seen["ngram_distributions"][0][0], text.ids_NL[text.part_N == 0].flatten())
    positions = seen["surplus_terms"][0][0]
    windows, last = len(text.ids_NL), SIZES["length"] - 3
    assert torch.equal(positions.hidden_ND, text.hidden_NLD[:, :last].flatten(0, 1))
    for j in range(3):
        assert torch.equal(positions.tokens_NJ[:, j].view(windows, last), text.ids_NL[:, 1 + j : 1 + j + last])
    assert torch.equal(positions.part_N.view(windows, last)[:, 0], text.part_N)


def test_the_reference_may_be_a_model(tmp_path: Path) -> None:
    ckpt, path = model(), str(tiny_checkpoint_dir("llama", tmp_path / "same", layers=1))
    found = MarkovLM(**SIZES, reference=path).measure(ckpt, TEXTS)["alignment"]
    assert found["cka"] == pytest.approx(found["own_cka"], abs=1e-5)
    other = MarkovLM(**SIZES).measure(ckpt, TEXTS)["alignment"]
    assert other["cka"] != pytest.approx(other["own_cka"], abs=1e-3)
    small = str(tiny_checkpoint_dir("llama", tmp_path / "small", layers=1, vocab_size=170))
    with pytest.raises(IntaglioError, match="has a vocabulary of 170, the model of 160"):
        MarkovLM(**SIZES, reference=small).measure(ckpt, TEXTS)


def test_bundled_heads_are_named_with_their_acceptance(monkeypatch: pytest.MonkeyPatch) -> None:
    from intaglio.checkpoint.bundled import bundled_heads

    assert draft_acceptance(model()) == []
    (head,) = bundled_heads("chimera")
    monkeypatch.setattr(markov_lm, "fingerprint", lambda _: head.about["model"])
    found = {draft["slug"]: draft["tokens_a_pass"] for draft in draft_acceptance(model())}
    assert found["chimera"] == head.acceptance["tokens_a_pass"]


def test_bad_input_is_one_sentence() -> None:
    causal = model()
    untied, broken = model(vocab_size=170), model()
    anatomy(broken.model).final_norm.weight.data[0] = torch.nan
    capped = Checkpoint(tiny_model("gemma3", layers=1, final_logit_softcapping=1.0), tiny_tokenizer("gemma3"), "tiny")
    for method, ckpt, texts, says in (
        (MarkovLM(**SIZES), model(ENCODERS[0]), TEXTS, "predicts no next tokens"),
        (MarkovLM(**SIZES), Checkpoint(causal.model), TEXTS, "has no tokenizer"),
        (MarkovLM(**SIZES), causal, TEXTS[:1], "text of 16 tokens; more texts are needed"),
        (MarkovLM(length=500), causal, TEXTS, "length is 500; the model's context is 128"),
        (MarkovLM(**SIZES, renyi_order=1.0), causal, TEXTS, "renyi_order is 1"),
        (MarkovLM(**SIZES | {"length": 8}, extra_tokens=4), untied, TEXTS, ""),
        (MarkovLM(**SIZES), broken, TEXTS, "the hidden states hold NaN or infinite values in batch 0"),
        (MarkovLM(**SIZES), capped, TEXTS, "are not linear in its hidden state"),
    ):
        if not says:
            assert len(method.measure(ckpt, TEXTS)["surplus"]) == 4
            continue
        with pytest.raises(IntaglioError, match=says) as caught:
            method.measure(ckpt, texts)
        assert "\n" not in str(caught.value)
    assert MarkovLM(**SIZES, extra_tokens=0).measure(causal, TEXTS)["surplus"] == []


# --- The command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("diagnostics")
    (folder / "texts.json").write_text(json.dumps([*TEXTS, "<script>alert(1)</script>"]))
    return str(tiny_checkpoint_dir("llama", folder / "model", layers=1)), str(folder / "texts.json")


def run(*words: str, code: int = 0) -> Any:
    done = CliRunner().invoke(app, ["inspect", *words])
    assert done.exit_code == code, done.output
    return done


SET = [word for name, value in SIZES.items() for word in ("--set", f"{name}={value}")]


def test_the_command_prints_and_draws(saved: tuple[str, str], tmp_path: Path) -> None:
    path, texts = saved
    page = tmp_path / "page.html"
    shown = run(path, "--diagnostics", texts, *SET, "-o", str(page)).stdout
    for words in ("Information surplus", "Fisher metric", "contexts permuted", f"page: {page}"):
        assert words in shown
    html = page.read_text()
    assert html.count("<svg") == 4
    assert "<script" not in html
    found = json.loads(run(path, "--diagnostics", texts, *SET, "--json").stdout)
    assert found["model"] == path
    assert found["parameters"]["contexts"] == 12


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "an option is missing"),
        (["--masks", "--diagnostics", "x"], "--masks and --diagnostics are given; give one of them"),
        (["--masks", "--set", "contexts=9"], "--set belongs to --diagnostics"),
        (["--diagnostics", "x", "--set", "kernels=9"], "there is no such field here"),
        (["--diagnostics", "x", "-o", "a.svg"], "the page a.svg must be an .html file"),
        (["--diagnostics", "none.txt"], "none.txt"),
    ],
)
def test_wrong_words_are_one_sentence(words: list[str], says: str, saved: tuple[str, str]) -> None:
    done = run(saved[0], *words, code=2)
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
