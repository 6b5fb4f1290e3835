"""AMTRLLasso: relevance and allocation by the card, the algorithm on arrays, checkpoints, the command `classify`."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn
from typer.testing import CliRunner

from intaglio.checkpoint import Checkpoint, load
from intaglio.cli.app import app
from intaglio.errors import IntaglioError
from intaglio.methods.training.amtrl_lasso import (
    ActiveSettings,
    AMTRLLasso,
    Samples,
    allocate,
    basis_pursuit,
    excess_risk,
    lasso,
    least_norm,
    sampling_cost,
)
from intaglio.methods.training.amtrl_lasso.allocation import largest_penalty
from intaglio.methods.training.amtrl_lasso.labelled_sources import Inputs, drawing_order, signs
from intaglio.methods.training.amtrl_lasso.representation import linear_representation, neural_representation
from tests.alive import alive
from tests.families import tiny_model, tiny_tokenizer

DATA = Path(__file__).parent / "data"
TASKS = {name: str(DATA / f"{name}.jsonl") for name in ("animals", "colours", "numbers")}
TARGET = str(DATA / "target.jsonl")
FIELDS = {"tasks": TASKS, "target": TARGET, "samples": 30, "explore": 6, "rank": 2, "components": 5, "length": 12}
EXAMPLES = (FIELDS, {**FIELDS, "hidden": 4, "steps": 5, "rounds": 2, "most_tasks": 1})
ALIVE = {
    "samples": 24,
    "explore": 8,
    "rank": 3,
    "strategy": "l2",
    "penalty": 0.9,
    "penalty_rule": "absolute",
    "rounds": alive(2, explore=3, samples=48),
    "most_tasks": 1,
    "ridge": 0.5,
    "iterations": 1,
    "hidden": 3,
    "steps": alive(3, hidden=4, steps=2),
    "learning_rate": alive(0.1, hidden=4, steps=2),
    "tasks": {name: TASKS[name] for name in ("animals", "numbers")},
    "target": TASKS["animals"],
    "components": 3,
    "pooling": "mean",
    "length": 4,
    "cost_shape": alive("hyperbolic", cost_shape="saltus", fixed_cost=5.0),
    "fixed_cost": alive(7.0, cost_shape="saltus", fixed_cost=5.0),
}


def tiny() -> Checkpoint:
    return Checkpoint(tiny_model("llama", layers=1), tiny_tokenizer("llama"), "tiny")


def observe(method: AMTRLLasso) -> Any:
    """Tensors and record of a fit."""
    ckpt = method.fit(tiny(), seed=1)
    attachment = ckpt.attachments["amtrl_lasso"]
    return attachment.tensors, attachment.about, ckpt.record.steps[-1].chosen


def heads(k: int, t: int, seed: int = 0) -> np.ndarray:
    W_KT = np.random.default_rng(seed).normal(size=(k, t))
    return W_KT / np.linalg.norm(W_KT, axis=0)


# --- relevance ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000))
def test_the_norms_of_the_two_solutions_are_ordered(seed: int) -> None:
    """||nu^1||_1 <= ||nu^2||_1 always, ||nu^2||_2 <= ||nu^1||_2."""
    W_KT, w_K = heads(3, 9, seed), heads(3, 1, seed + 7)[:, 0]
    sparse, dense = basis_pursuit(W_KT, w_K), least_norm(W_KT, w_K)
    assert np.allclose(W_KT @ sparse, w_K, atol=1e-7)
    assert np.allclose(W_KT @ dense, w_K, atol=1e-7)
    assert np.abs(sparse).sum() <= np.abs(dense).sum() + 1e-7
    assert np.linalg.norm(dense) <= np.linalg.norm(sparse) + 1e-7
    assert (np.abs(sparse) > 1e-7).sum() <= 3


def test_the_lasso_tends_to_basis_pursuit_and_ends_at_zero() -> None:
    """Lasso as lam -> 0+ converges to basis pursuit; lam >= max|W^T w| gives nu = 0."""
    W_KT, w_K = heads(3, 9), heads(3, 1, 5)[:, 0]
    wanted = basis_pursuit(W_KT, w_K)
    off = [float(np.abs(lasso(W_KT, w_K, penalty) - wanted).max()) for penalty in (1e-1, 1e-3, 1e-5)]
    assert off[0] > off[1] > off[2]
    assert off[2] < 1e-3
    most = largest_penalty(W_KT, w_K)
    assert not lasso(W_KT, w_K, most).any()
    assert lasso(W_KT, w_K, 0.99 * most).any()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([0.5, 0.05, 0.005]))
@example(66, 0.005)
def test_the_lasso_is_optimal_for_heads_that_repeat(seed: int, share: float) -> None:
    """Non-unique nu^1 with duplicate tasks: the objective is the least nonetheless, by its duality gap."""
    draws = np.random.default_rng(seed)
    W_KT = draws.normal(size=(int(draws.integers(1, 6)), 30))
    W_KT[:, 1], W_KT[:, 2], W_KT[:, 3] = W_KT[:, 0], -W_KT[:, 0], 0
    w_K = W_KT[:, -1] if seed % 2 else draws.normal(size=len(W_KT))
    penalty = share * largest_penalty(W_KT, w_K)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nu_T = lasso(W_KT, w_K, penalty)
    left_K = w_K - W_KT @ nu_T
    objective = 0.5 * np.square(left_K).sum() + penalty * np.abs(nu_T).sum()
    dual_K = left_K * min(1.0, penalty / np.abs(W_KT.T @ left_K).max())
    assert objective - 0.5 * (np.square(w_K).sum() - np.square(w_K - dual_K).sum()) < 1e-6 * objective


def test_orthonormal_heads_give_the_soft_threshold() -> None:
    """Orthonormal W (T = K): Lasso = soft-threshold of W^T w."""
    W_KK = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    w_K = np.random.default_rng(1).normal(size=5)
    inner = W_KK.T @ w_K
    assert np.allclose(lasso(W_KK, w_K, 0.3), np.sign(inner) * np.maximum(np.abs(inner) - 0.3, 0), atol=1e-6)


def test_copies_of_the_target_share_its_relevance() -> None:
    """m copies of the target head: nu^2 = 1/m each (||nu^2||_1 = 1); nu^1 any convex combination."""
    w_K = np.array([0.6, -0.8, 0.0])
    W_KT = np.tile(w_K[:, None], (1, 4))
    assert np.allclose(least_norm(W_KT, w_K), 0.25)
    sparse = basis_pursuit(W_KT, w_K)
    assert np.abs(sparse).sum() == pytest.approx(1)
    assert np.allclose(W_KT @ sparse, w_K)


def test_a_target_equal_to_a_source_needs_that_source_alone() -> None:
    """Target equal to source 0, others random unit heads, K=4, T=60: nu^1 = e_0, nu^2 dense."""
    W_KT = heads(4, 60)
    wanted = np.eye(60)[0]
    assert np.allclose(basis_pursuit(W_KT, W_KT[:, 0]), wanted, atol=1e-8)
    dense = least_norm(W_KT, W_KT[:, 0])
    assert (np.abs(dense) > 1e-3).sum() > 50
    assert float(np.abs(dense).sum()) > 1.5


def test_basis_pursuit_refuses_a_target_outside_the_span() -> None:
    with pytest.raises(IntaglioError, match="no combination of the sources"):
        basis_pursuit(np.array([[1.0], [0.0]]), np.array([0.0, 1.0]))


# --- allocation --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(0, 10), min_size=2, max_size=8),
    st.integers(0, 20),
    st.integers(0, 400),
    st.integers(0, 60),
)
def test_counts_add_up_exactly_and_keep_to_their_limits(
    weights: list[float], least: int, more: int, spare: int
) -> None:
    """sum n_t = N exactly after rounding (largest remainder), n_t >= n_min."""
    total = least * len(weights) + more
    most = [least + more + spare] + [least + more // 2 + spare] * (len(weights) - 1)
    counts = allocate(np.array(weights), total, least, most)
    assert int(counts.sum()) == total
    assert all(least <= n <= limit for n, limit in zip(counts, most, strict=True))
    for a, b in zip(*np.triu_indices(len(weights), 1), strict=True):
        if weights[a] > weights[b] and counts[a] < most[a]:
            assert counts[a] >= counts[b] - 1


def test_the_numbers_of_the_card() -> None:
    """nu=(.6,.3,.1), N=100: n=(60,30,10) gives .01; n ~ nu^2 gives .01380; uniform gives .0138."""
    nu = np.array([0.6, 0.3, 0.1])
    assert allocate(nu, 100).tolist() == [60, 30, 10]
    assert allocate(nu**2, 100).tolist() == [78, 20, 2]
    assert allocate(np.zeros(3), 100).tolist() == [34, 33, 33]
    assert excess_risk(nu, np.array([60, 30, 10])) == pytest.approx(0.01)
    assert excess_risk(nu, 100 * nu**2 / (nu**2).sum()) == pytest.approx(0.0138, abs=5e-5)
    assert excess_risk(nu, np.full(3, 100 / 3)) == pytest.approx(0.0138, abs=5e-5)
    assert excess_risk(np.array([1.0, 0.0]), np.array([10, 0])) == pytest.approx(0.1)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=6), st.lists(st.floats(0.01, 1), min_size=6, max_size=6))
def test_no_allocation_beats_the_proportional_one(nu: list[float], other: list[float]) -> None:
    """For any allocation with the same N, sum nu_t^2 / n_t >= ||nu||_1^2 / N with equality at n ~ |nu|."""
    nu_S, n_S = np.array(nu), np.array(other[: len(nu)])
    bound = float(np.abs(nu_S).sum()) ** 2
    assert excess_risk(nu_S, n_S / n_S.sum()) >= bound - 1e-9
    assert excess_risk(nu_S, nu_S / nu_S.sum()) == pytest.approx(bound)


def test_floors_and_limits_bend_the_shares() -> None:
    assert allocate(np.array([1.0, 0.0, 0.0]), 100, 10).tolist() == [80, 10, 10]
    assert allocate(np.array([1.0, 0.0, 0.0]), 100, 10, [30, 200, 200]).tolist() == [30, 35, 35]
    assert allocate(np.array([3.0, 1.0]), 10, [0, 6]).tolist() == [4, 6]
    assert allocate(np.array([1e-9, 3e-9]), 8).tolist() == [2, 6]
    for total in (19, 231):
        with pytest.raises(IntaglioError, match=f"samples is {total}; the sources take at least 20 and have at most"):
            allocate(np.ones(2), total, 10, [30, 200])


def test_costs_of_samples() -> None:
    """Linear, a fixed cost of activation (saltus), hyperbolic."""
    counts = np.array([10, 0, 30])
    assert sampling_cost(counts) == 40
    assert sampling_cost(counts, "saltus", 5.0) == 50
    assert sampling_cost(counts, "hyperbolic", 30.0) == pytest.approx(10 / (1 + 1 / 3) + 15)


# --- the algorithm on arrays -------------------------------------------------------------------------------------


class Linear:
    """A source of the linear model, with any number of samples."""

    available = None

    def __init__(self, B_DK: np.ndarray, w_KH: np.ndarray, seed: int, noise: float = 0.1) -> None:
        self.B_DK, self.w_KH, self.seed, self.noise = B_DK, w_KH, seed, noise
        self.drawn: list[int] = []

    def draw(self, count: int) -> Samples:
        self.drawn.append(count)
        draws = np.random.default_rng(self.seed)
        x = draws.normal(size=(2000, len(self.B_DK)))[:count]
        noise = draws.normal(size=(2000, self.w_KH.shape[1]))[:count]
        return Samples(x, x @ self.B_DK @ self.w_KH + self.noise * noise)


def problem(
    d: int = 8, k: int = 2, t: int = 6, noise: float = 0.1
) -> tuple[np.ndarray, np.ndarray, list[Linear], Samples]:
    B_DK = np.linalg.qr(np.random.default_rng(0).normal(size=(d, k)))[0]
    W_KT = heads(k, t, 1)
    sources = [Linear(B_DK, W_KT[:, [n]], n, noise) for n in range(t)]
    return B_DK, W_KT, sources, Linear(B_DK, W_KT[:, [0]], 99, noise).draw(200)


def test_alternating_least_squares_finds_the_subspace() -> None:
    B_DK, _, sources, _ = problem()
    estimate = linear_representation([source.draw(200) for source in sources], 2)
    assert np.allclose(estimate.T @ estimate, np.eye(2), atol=1e-10)
    assert np.linalg.svd(B_DK.T @ estimate)[1].min() > 0.99
    few = [source.draw(12) for source in sources]
    first, last = (linear_representation(few, 2, iterations=n) for n in (1, 20))
    assert np.linalg.svd(B_DK.T @ last)[1].min() > np.linalg.svd(B_DK.T @ first)[1].min()


def test_a_network_is_trained_on_all_sources_and_whitened() -> None:
    _, _, sources, _ = problem()
    drawn = [source.draw(40) for source in sources]
    settings_ = {"steps": 30, "learning_rate": 1e-2, "strength": 1e-4, "seed": 0}
    made: list[nn.Module] = []

    def make() -> nn.Module:
        made.append(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)))
        return made[-1]

    state = torch.get_rng_state()
    phi = neural_representation(drawn, 2, make, **settings_)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.from_numpy(np.concatenate([s.x for s in drawn]))
    z = phi(x)
    assert torch.allclose(z.T @ z / len(x), torch.eye(2).double(), atol=1e-6)
    assert len(made) == 1
    again = neural_representation(drawn, 2, make, **settings_)  # type: ignore[arg-type]
    assert torch.equal(again(x), z)


def test_images_pass_through_a_network_of_the_user() -> None:
    draws = np.random.default_rng(0)

    class Pictures:
        available = 30

        def draw(self, count: int) -> Samples:
            x = draws.normal(size=(count, 1, 4, 4))
            return Samples(x, x.mean((1, 2, 3))[:, None])

    make = lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(12, 2))  # noqa: E731
    solution = ActiveSettings(samples=40, explore=5, rank=2, steps=3).solve(
        [Pictures(), Pictures()], Pictures().draw(20), network=make
    )
    assert solution.predict(draws.normal(size=(7, 1, 4, 4))).shape == (7, 1)


@pytest.mark.parametrize(("strategy", "power"), [("l1", 1), ("l2", 2)])
def test_samples_go_to_sources_by_their_relevance(strategy: str, power: int) -> None:
    _, W_KT, sources, target = problem()
    method = ActiveSettings(samples=600, explore=20, rank=2, strategy=strategy, penalty=0.05)  # type: ignore[arg-type]
    solution = method.solve(sources, target)
    assert solution.counts_RS[0].tolist() == [20] * 6
    assert int(solution.counts_RS[-1].sum()) == 600
    assert solution.counts_RS[-1].tolist() == allocate(solution.relevance_S**power, 600, 20).tolist()
    assert int(solution.counts_RS[-1].argmax()) == 0
    assert np.allclose(solution.relevance_S, np.abs(solution.nu_TC[:, 0]))
    exact = basis_pursuit(W_KT, W_KT[:, 0]) if strategy == "l1" else least_norm(W_KT, W_KT[:, 0])
    assert np.abs(np.abs(exact) - solution.relevance_S).max() < 0.15
    assert [source.drawn[-1] for source in sources] == solution.counts_RS[-1].tolist()
    uniform = ActiveSettings(samples=600, explore=20, rank=2, strategy="uniform").solve(sources, target)
    assert uniform.counts_RS[-1].tolist() == [100] * 6
    assert uniform.nu_TC.shape == (6, 1)


def test_known_coefficients_replace_the_estimate() -> None:
    _, _, sources, target = problem()
    nu = np.array([[0.0], [3.0], [0.0], [-1.0], [0.0], [0.0]])
    solution = ActiveSettings(samples=400, explore=10, rank=2).solve(sources, target, nu=nu)
    assert solution.counts_RS[-1].tolist() == [10, 270, 10, 90, 10, 10]


def test_rounds_draw_four_times_the_samples_each() -> None:
    _, _, sources, target = problem()
    solution = ActiveSettings(samples=800, explore=5, rank=2, rounds=3).solve(sources, target)
    assert solution.counts_RS.sum(1).tolist() == [30, 50, 200, 800]
    assert (np.diff(solution.counts_RS, axis=0) >= 0).all()
    few = ActiveSettings(samples=100, explore=15, rank=2, rounds=3).solve(sources, target)
    assert few.counts_RS.sum(1).tolist() == [90, 90, 90, 100]


def test_only_the_most_relevant_sources_are_drawn_from() -> None:
    _, _, sources, target = problem()
    method = ActiveSettings(samples=300, explore=10, rank=2, strategy="l2", most_tasks=2)
    counts = method.solve(sources, target).counts_RS[-1]
    assert (counts > 10).sum() == 2


def test_penalties_are_what_their_rule_says() -> None:
    _, _, sources, target = problem()
    first = ActiveSettings(samples=120, explore=20, rank=2, penalty=0.2)
    share = first.solve(sources, target).penalty
    rules = {rule: first.model_copy(update={"penalty_rule": rule}) for rule in ("absolute", "theory", "validation")}
    penalties = {rule: method.solve(sources, target).penalty for rule, method in rules.items()}
    assert penalties["absolute"] == 0.2
    _, W = first.represent([source.draw(20) for source in sources])
    w_K = first.solve(sources, target)
    assert share == pytest.approx(
        0.2 * largest_penalty(np.hstack(W), np.linalg.lstsq(w_K.features(target.x), target.y_NH, rcond=None)[0][:, 0]),
        rel=0.05,
    )
    # The residual is near the noise, 0.1, and below it by the fitted parameters.
    assert penalties["theory"] == pytest.approx(0.2 * 0.1 * np.sqrt((2 + np.log(6)) / 20), rel=0.2)
    # Of four fifths of the target's samples, so that the scale is a little different.
    shares = penalties["validation"] / (share / 0.2)
    assert min(abs(shares / tried - 1) for tried in (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005)) < 0.1
    assert penalties["validation"] < 0.2 * share / 0.2  # the data are nearly exact, so that a small one is best


def test_heads_of_a_source_share_its_samples() -> None:
    B_DK, W_KT, sources, _ = problem()
    both = Linear(B_DK, W_KT[:, :2], 3)
    target = Linear(B_DK, W_KT[:, [1, 4]], 50).draw(200)
    solution = ActiveSettings(samples=300, explore=20, rank=2).solve([both, *sources[2:]], target)
    assert solution.nu_TC.shape == (6, 2)
    joint = np.sqrt(np.square(solution.nu_TC[:2]).sum())
    assert solution.relevance_S[0] == pytest.approx(joint)
    assert len(solution.relevance_S) == 5
    assert solution.predict(target.x).shape == (200, 2)


def test_more_samples_of_the_right_source_help_the_target() -> None:
    B_DK, W_KT, sources, target = problem(d=20, k=3, t=12, noise=1.0)

    def error(nu: np.ndarray) -> float:
        method = ActiveSettings(samples=1200, explore=10, rank=3)
        head_D = np.linalg.lstsq(np.eye(20), B_DK @ W_KT[:, 0], rcond=None)[0]
        solution = method.solve(sources, target, nu=nu[:, None])
        return float(np.square(solution.predict(np.eye(20))[:, 0] - head_D).sum())

    assert error(np.eye(12)[0]) < error(np.eye(12)[5])


def test_arrays_that_do_not_fit_are_refused() -> None:
    _, _, sources, target = problem()
    with pytest.raises(IntaglioError, match="samples is 59; exploring 6 sources takes 60"):
        ActiveSettings(samples=59, explore=10, rank=2).solve(sources, target)
    with pytest.raises(IntaglioError, match="rank is 7; 6 heads or inputs"):
        ActiveSettings(samples=100, explore=10, rank=7).solve(sources, target)


# --- labelled texts ----------------------------------------------------------------------------------------------


def test_inputs_are_standardised_components_and_a_constant() -> None:
    z_ND = np.random.default_rng(0).normal(size=(50, 6)) * [5, 3, 1, 1, 1, 0] + 2
    inputs = Inputs.fitted(z_ND, 4)
    x = inputs(z_ND)
    assert x.shape == (50, 5)
    assert np.allclose(x[:, :4].T @ x[:, :4] / 50, np.eye(4), atol=1e-9)
    assert np.allclose(x[:, 4], 1)
    assert Inputs.fitted(z_ND, 64)(z_ND).shape == (50, 6)


def test_the_samples_drawn_are_recorded_drawn_in_the_report_and_handed_out() -> None:
    ckpt = AMTRLLasso(**FIELDS).fit(tiny(), seed=1)
    chosen = ckpt.record.steps[-1].chosen
    assert list(chosen["drawn"]) == list(TASKS)
    assert sum(chosen["drawn"].values()) == 30 == chosen["cost"]
    assert chosen["explored"] == dict.fromkeys(TASKS, 6)
    assert list(chosen["bars"]["items"].values()) == list(chosen["drawn"].values())
    assert ckpt.record.steps[-1].verb == "fit"
    mixture = ckpt.fitted("amtrl_lasso").mixture()
    for name, count in chosen["drawn"].items():
        rows = [row for row in mixture if row["task"] == name]
        assert len(rows) == count
        lines = [json.loads(line) for line in Path(TASKS[name]).read_text().splitlines()]
        assert all({"text": row["text"], "label": row["label"]} in lines for row in rows)
        assert len({row["text"] for row in rows}) == count


def test_only_drawn_texts_are_embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    plain = AMTRLLasso._embed

    def embed(self: Any, checkpoint: Any, texts: Any, *more: Any, **fields: Any) -> Any:
        seen.extend(texts)
        return plain(self, checkpoint, texts, *more, **fields)

    monkeypatch.setattr(AMTRLLasso, "_embed", embed)
    method = AMTRLLasso(**{**FIELDS, "samples": 24})
    ckpt = method.fit(tiny(), seed=1)
    drawn = [row["text"] for row in ckpt.fitted("amtrl_lasso").mixture()]
    targets = [json.loads(line)["text"] for line in Path(TARGET).read_text().splitlines()]
    assert sorted(seen) == sorted([*targets, *drawn])


def test_the_seed_of_a_fit_is_that_of_the_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds, plain = [], AMTRLLasso.solve

    def solve(self: Any, *args: Any, **fields: Any) -> Any:
        seeds.append(fields.get("seed"))
        return plain(self, *args, **fields)

    monkeypatch.setattr(AMTRLLasso, "solve", solve)
    AMTRLLasso(**FIELDS).fit(tiny(), seed=3)
    assert seeds == [3]


@pytest.mark.parametrize("index", [0, 1])
def test_a_checkpoint_is_saved_and_classifies_as_before(index: int, tmp_path: Path) -> None:
    ckpt = AMTRLLasso(**EXAMPLES[index]).fit(tiny(), seed=1)
    method, texts = ckpt.fitted("amtrl_lasso"), ["the dog", "seven red birds"]
    probs = method.classify(ckpt, texts)
    assert [list(row) for row in probs] == [["no", "yes"]] * 2
    assert all(sum(row.values()) == pytest.approx(1) for row in probs)
    again = load(ckpt.save(tmp_path / "out"))
    assert again.fitted("amtrl_lasso").classify(again, texts) == probs
    assert again.fitted("amtrl_lasso").mixture() == method.mixture()
    assert method.classify(ckpt, []) == []


def test_learning_later_equals_fitting_the_heads_to_all_texts() -> None:
    ckpt = AMTRLLasso(**FIELDS).fit(tiny(), seed=1)
    method = ckpt.fitted("amtrl_lasso")
    rows = [json.loads(line) for line in Path(TARGET).read_text().splitlines()]
    more = [{"text": "maybe a cat", "label": "perhaps"}, {"text": "no dog at all", "label": "no"}]
    method.learn(ckpt, more)
    assert method.classes == ("no", "yes", "perhaps")
    assert ckpt.record.steps[-1].chosen["new_classes"] == ["perhaps"]
    fit, every = method._fit, [*rows, *more]
    Z = torch.from_numpy(fit.inputs(method._embed(ckpt, [row["text"] for row in every])))
    z = fit.phi(Z).detach().numpy()
    wanted = signs([row["label"] for row in every], method.classes)
    expected = np.linalg.solve(z.T @ z + 1e-3 * len(z) * np.eye(2), z.T @ wanted)
    assert np.allclose(fit.target_KC, expected, atol=1e-6)
    assert fit.count == len(every)
    again = ckpt.fitted("amtrl_lasso")
    assert again.classes == method.classes
    assert again.classify(ckpt, ["a cat"]) == method.classify(ckpt, ["a cat"])


def test_a_recipe_fits_it_and_the_command_classifies(tmp_path: Path) -> None:
    from intaglio.recipe.run import carve
    from intaglio.recipe.schema import Recipe
    from tests.families import tiny_checkpoint_dir

    model = tiny_checkpoint_dir("llama", tmp_path / "model", layers=1)
    recipe = Recipe.from_dict({
        "calibration": {"texts": TARGET, "samples": 2, "length": 16}, "steps": [{"fit": {"amtrl_lasso": FIELDS}}],
        "measure": {"texts": TARGET, "samples": 2, "length": 16, "speed": False},
    })  # fmt: skip
    document = carve(recipe, tmp_path / "out", model=str(model))
    assert sum(document["steps"][0]["chosen"]["drawn"].values()) == 30
    assert "Samples drawn of each source" in (tmp_path / "out" / "report.html").read_text()
    result = CliRunner().invoke(app, ["classify", str(tmp_path / "out"), TARGET, "--json"])
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.output)["texts"]) == 12


def test_the_order_of_drawing_is_keyed_by_seed_and_task() -> None:
    from intaglio.data.labelled_texts import load_labelled_texts

    texts = load_labelled_texts(TASKS["animals"])
    orders = [drawing_order(seed, name, texts) for seed, name in ((0, "a"), (1, "a"), (0, "b"))]
    assert orders[0] == drawing_order(0, "a", texts)
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == list(range(len(texts))) for order in orders)


def test_the_rank_is_what_the_tasks_allow_up_to_eight(tmp_path: Path) -> None:
    """K = 8 features, fewer where three tasks of two classes have three heads between them."""
    fields = {name: value for name, value in FIELDS.items() if name != "rank"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ckpt = AMTRLLasso(**fields).fit(tiny(), seed=1)
    again = load(ckpt.save(tmp_path / "out"))
    assert len(again.fitted("amtrl_lasso")._fit.gram_KK) == 3
    texts = ["the dog", "seven red birds"]
    whole = ckpt.fitted("amtrl_lasso").classify(ckpt, texts)
    assert again.fitted("amtrl_lasso").classify(again, texts) == whole
    assert AMTRLLasso(**fields, rank=3).fit(tiny(), seed=1).fitted("amtrl_lasso").classify(ckpt, texts) == whole
    _, _, sources, target = problem()
    drawn = [source.draw(30) for source in sources]
    assert ActiveSettings(samples=100).represent(drawn)[1][0].shape[0] == 6
    many = [Samples(s.x, np.hstack([s.y_NH] * 2)) for s in drawn]
    assert ActiveSettings(samples=100).represent(many)[1][0].shape[0] == 8
    with pytest.raises(IntaglioError, match="rank is missing; a network needs it"):
        ActiveSettings(samples=200).solve(sources, target, network=lambda: nn.Linear(12, 2))


def test_texts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    one = tmp_path / "one.jsonl"
    one.write_text('{"text": "a", "label": "x"}\n' * 9)
    for fields, message in (
        ({"target": str(one)}, "have one class; at least two are needed"),
        ({"samples": 17}, "samples is 17; exploring 3 sources takes 18"),
        ({"samples": 1000}, "exploring 3 sources takes 18, and they have 60"),
        ({"tasks": {**TASKS, "more": str(tmp_path / "none.jsonl")}}, "cannot read the labelled texts"),
        ({"rank": 7}, "rank is 7; 3 heads or inputs"),
    ):
        with pytest.raises(IntaglioError, match=message):
            AMTRLLasso(**{**FIELDS, **fields}).fit(tiny())
    for fields, message in (
        ({"cost_shape": "hyperbolic"}, "the hyperbolic price tends to it"),
        ({"fixed_cost": 2.0}, "the linear price has none"),
        ({"tasks": {"a": TARGET}}, "at least 2 items"),
    ):
        with pytest.raises(ValidationError, match=message):
            AMTRLLasso(**{**FIELDS, **fields})
    with pytest.raises(IntaglioError, match="amtrl_lasso has not been fitted"):
        AMTRLLasso(**FIELDS).classify(tiny(), ["a"])
    ckpt = AMTRLLasso(**FIELDS).fit(tiny())
    with pytest.raises(IntaglioError, match="rank cannot change after the fit"):
        ckpt.fitted("amtrl_lasso", rank=3)
    moved = ckpt.fitted("amtrl_lasso", tasks={**TASKS, "animals": str(one)})
    with pytest.raises(IntaglioError, match="have one class"):
        moved.mixture()
