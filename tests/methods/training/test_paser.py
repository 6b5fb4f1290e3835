"""PASER: divergences, clusters, budgets, the graph and the walk, each by what is exactly true of it."""

from __future__ import annotations

import atexit
import copy
import dataclasses
import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.from_scratch import new
from intaglio.errors import IntaglioError
from intaglio.methods.base import Workload
from intaglio.methods.training.paser import PASER, ConsistencyGraph, Pool, Sample, budgets, efficiency, jsd, key_phrases
from intaglio.methods.training.paser.clusters import affinity, cluster, coordinates
from intaglio.methods.training.paser.concepts import merge_synonyms
from intaglio.methods.training.paser.divergence import degradation, positions, shared_vocabulary
from intaglio.methods.training.paser.embeddings import TFIDF, embed
from intaglio.methods.training.paser.result import _cluster_names
from intaglio.methods.training.paser.select import select_samples
from intaglio.trainer import CausalLM, KeyedRNG, Selection, Selector
from intaglio.trainer.dataset import all_examples
from intaglio.trainer.recipe_step import Train
from intaglio.trainer.tokenised_samples import read_samples
from tests.alive import alive
from tests.families import tiny_checkpoint_dir
from tests.trainer.helpers import TEXTS, checkpoint, run, same, weights

EXAMPLES = (
    {"embedding": "tfidf", "clusters": 3},
    {"embedding": "tfidf", "clusters": None, "scope": "both", "concepts": None, "synonyms": 0.9, "order": "sequential"},
)
_MODELS = Path(tempfile.mkdtemp(prefix="intaglio-paser-"))
atexit.register(shutil.rmtree, _MODELS, ignore_errors=True)
_TOPICS = ("quick dog", "lazy fox", "river town", "red sun", "wide area", "return width")
_DRAW = Random(0)
MIXED = [
    {"prompt": " and the ".join(_DRAW.sample(_TOPICS, 2)), "answer": " ".join(_DRAW.choices(_TOPICS, k=1 + n % 4))}
    for n in range(24)
]
BASE = {"embedding": "tfidf", "clusters": 3, "budget": 0.5}
ALIVE = {
    "budget": 0.25,
    "count": 4,
    "original": str(tiny_checkpoint_dir("llama", _MODELS / "other", layers=2, seed=5)),
    "embedding": str(tiny_checkpoint_dir("bert", _MODELS / "encoder", layers=1)),
    "clusters": 2,
    "most_clusters": alive(2, clusters=None),
    "neighbours": 2,
    "landmarks": 4,
    "time": 2.0,
    "start": "random",
    "scope": "both",
    "reduce": "sum",
    "budgets": "uniform",
    "rank": "degradation",
    "leftover": "dropped",
    "order": "sequential",
    "consistency": False,
    "concepts": 1,
    "synonyms": 0.1,
    "inconsistent": alive("last", budget=1.0, concepts=2),
    "most_rejected": 1.0,
    "candidates": 14,
    "length": 12,
    "chat": False,
    "batch_size": 3,
}


def observe(method: PASER) -> Any:
    """The choice, its summary without times, and the progress of scoring."""
    ckpt, calls = checkpoint(), []
    choice = method.choose(MIXED, pruned(ckpt), ckpt, progress=lambda *call: calls.append(call))
    return choice.indices, choice.summary, choice.bars, calls


PAIRS = [
    {"prompt": f"{ask} number {n} of the river", "answer": f"{reply} {n} and then it is in the sun"}
    for n in range(6)
    for ask, reply in (("name the dog", "the dog is"), ("write the function area", "def area(width): return"))
]
WORDS: dict[str, Any] = {"embedding": "tfidf"}


def pruned(ckpt: Checkpoint) -> Checkpoint:
    """A copy with half of the second block's weights gone."""
    other = Checkpoint(copy.deepcopy(ckpt.model), ckpt.tokenizer, "pruned")
    with torch.no_grad():
        for name, value in other.model.named_parameters():
            if ".layers.1." in name and value.ndim == 2:
                value[value.abs() < value.abs().median()] = 0
    return other


def examples(ckpt: Checkpoint, data: Sequence[Any] = PAIRS) -> list[dict[str, Any]]:
    found = all_examples(ckpt, list(data))
    assert found is not None
    return found


def pool(scores: Sequence[float], tokens: Sequence[int], labels: Sequence[int] | None = None) -> Pool:
    samples = [Sample((1,), (2,), count, f"prompt {n}", f"prompt {n}") for n, count in enumerate(tokens)]
    return Pool(range(len(samples)), samples, labels or [0] * len(samples), scores)


# The divergence.


def logs(*rows: Sequence[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def test_clusters_are_named_by_words_that_are_not_in_all_of_them() -> None:
    texts = ["kindly sort the numbers", "kindly sort the words", "kindly translate a poem", "kindly translate a novel"]
    samples = [Sample((1,), (2,), 1, text, text) for text in texts]
    names = [name.split() for name in _cluster_names(samples, [0, 0, 1, 1])]
    assert [words[0] for words in names] == ["sort", "translate"]
    assert not any("kindly" in words for words in names)
    assert "kindly" in _cluster_names(samples, [0, 0, 0, 0])[0]


def test_a_known_divergence() -> None:
    p, q = logs([0.5, 0.5, 0.0]), logs([0.25, 0.25, 0.5])
    assert float(jsd(p, q)) == pytest.approx(0.215762, abs=1e-6)
    assert float(jsd(q, p)) == pytest.approx(0.215762, abs=1e-6)
    assert float(jsd(logs([1.0, 0.0]), logs([0.0, 1.0]))) == pytest.approx(math.log(2))


@given(st.integers(0, 2**20), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=20, deadline=None)
def test_divergences_are_symmetric_bounded_and_zero_only_between_equals(seed: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(5, 40, generator=draw, dtype=dtype).mul(4).log_softmax(-1) for _ in range(2))
    found = jsd(p, q)
    assert torch.allclose(found, jsd(q, p), atol=1e-6)
    assert bool(((found > 0) & (found <= math.log(2) + 1e-6)).all())
    assert bool((jsd(p, p) == 0).all())
    mixed = (p.exp() + q.exp()) / 2
    kl = [(one.exp() * (one - mixed.log())).sum(-1) for one in (p, q)]
    assert torch.allclose(found, (kl[0] + kl[1]) / 2, atol=1e-5)


@pytest.fixture(scope="module")
def dense() -> Checkpoint:
    return checkpoint()


def test_padding_and_company_do_not_change_a_score(dense: Checkpoint) -> None:
    carved = pruned(dense)
    samples = read_samples(examples(dense), dense, None, chat=True)
    together = degradation([*samples, samples[0]], carved, dense, batch_size=13)
    alone = [degradation([sample], carved, dense)[0] for sample in samples]
    assert together[:-1] == pytest.approx(alone, rel=1e-3)
    assert together[-1] == pytest.approx(together[0], rel=1e-5)
    assert all(0 < value < math.log(2) for value in alone)


def test_a_score_is_the_divergence_of_stock_logits_where_the_answer_is_predicted(dense: Checkpoint) -> None:
    carved = pruned(dense)
    (sample,) = read_samples(examples(dense, PAIRS[:1]), dense, None, chat=True)
    ids = torch.tensor([[*sample.prompt, *sample.answer]])
    with torch.no_grad():
        p, q = (one.model(input_ids=ids).logits[0].float().log_softmax(-1) for one in (carved, dense))
    by_token, ask = jsd(p, q), len(sample.prompt)
    wanted = {"answer": by_token[ask - 1 : -1], "prompt": by_token[:ask], "both": by_token[:-1]}
    for scope, value in wanted.items():
        (mean,) = degradation([sample], carved, dense, scope=scope)  # type: ignore[arg-type]
        (total,) = degradation([sample], carved, dense, scope=scope, reduce="sum")  # type: ignore[arg-type]
        assert mean == pytest.approx(float(value.mean()), rel=1e-4)
        assert total == pytest.approx(float(value.sum()), rel=1e-4)
    assert len(positions(sample, "answer")) == len(sample.answer)
    assert sample.answer[-1] == dense.tokenizer.eos_token_id


def test_a_text_is_scored_on_all_of_its_tokens(dense: Checkpoint) -> None:
    text, one = read_samples(examples(dense, [TEXTS[0], [7]]), dense, None, chat=True)
    assert text.prompt == ()
    assert text.instruction == text.words == TEXTS[0]
    assert {len(positions(text, scope)) for scope in ("answer", "prompt", "both")} == {len(text.answer) - 1}  # type: ignore[arg-type]
    assert degradation([one], pruned(dense), dense) == [0.0]  # nothing is predicted


def test_what_is_scored_may_be_less_than_what_is_trained_on(dense: Checkpoint) -> None:
    data = examples(dense, [PAIRS[0], {"prompt": "dog", "answer": PAIRS[0]["answer"]}, TEXTS[0]])
    whole, some = (read_samples(data, dense, length, chat=False) for length in (None, 16))
    assert [sample.tokens for sample in some] == [sample.tokens for sample in whole]
    assert [len(sample.prompt) + len(sample.answer) for sample in some] == [16] * 3
    assert some[0].prompt == whole[0].prompt[-8:]  # too long: its beginning goes
    assert some[0].answer == whole[0].answer[:8]
    assert some[1].prompt == whole[1].prompt
    assert some[1].answer == whole[1].answer[: 16 - len(whole[1].prompt)]
    assert some[2].answer == whole[2].answer[:16]


# Clusters.


def blobs(count: int, seed: int, size: int = 12) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    centres = 8 * np.eye(count, 6)
    return np.concatenate([centre + 0.4 * draw.normal(size=(size, 6)) for centre in centres]), np.repeat(
        range(count), size
    )


@pytest.mark.parametrize("how", [{}, {"init": "random"}, {"neighbours": 5}, {"landmarks": 14}])
def test_two_blobs_are_found(how: dict[str, Any]) -> None:
    x, truth = blobs(2, 0)
    assert cluster(x, 2, **how).labels.tolist() == truth.tolist()


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_number_of_blobs_is_found(count: int) -> None:
    x, truth = blobs(count, count)
    found = cluster(x)
    assert found.labels.tolist() == truth.tolist()
    assert min(found.errors) == 2


def test_clusters_do_not_hang_on_order_or_place() -> None:
    x, truth = blobs(3, 1)
    order = np.random.default_rng(0).permutation(len(x))
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))
    plain, mixed, moved = (cluster(one, 3).labels for one in (x, x[order], x @ turn + 5))
    assert plain.tolist() == moved.tolist() == truth.tolist()
    assert [(a == b) for a in mixed for b in mixed] == [(a == b) for a in truth[order] for b in truth[order]]


@pytest.mark.parametrize("neighbours", [None, 3])
def test_the_smallest_eigenvalue_is_zero_with_a_constant_vector(neighbours: int | None) -> None:
    x, _ = blobs(3, 2)  # with three neighbours the graph is in pieces, and joined
    graph = affinity(x, neighbours)
    phi, values = coordinates(graph, 4)
    assert values[0] == pytest.approx(0, abs=1e-9)
    assert np.abs(phi[:, 0]) == pytest.approx(len(x) ** -0.5, rel=1e-6)
    assert values[1] > 1e-12
    assert (np.diff(values) >= 0).all()
    assert np.allclose(coordinates(graph, 4, 2.0)[0], phi * (1 - values) ** 2)
    walk_NN = np.eye(len(x)) - graph.toarray() / graph.toarray().sum(1, keepdims=True)
    assert np.allclose(walk_NN @ phi, phi * values, atol=1e-8)  # L itself, which is not symmetric


def test_the_sparse_solver_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = affinity(blobs(3, 2)[0])
    phi, values = coordinates(graph, 3)
    monkeypatch.setattr("intaglio.methods.training.paser.clusters.DENSE", 10)
    other, others = coordinates(graph, 3)
    assert np.allclose(values, others, atol=1e-8)
    assert np.allclose(phi @ phi.T, other @ other.T, atol=1e-6)


def test_odd_clusterings() -> None:
    alike = np.ones((5, 3))
    assert cluster(alike, 3).labels.tolist() == [0] * 5
    assert cluster(np.eye(3), 10).labels.max() <= 2  # no more clusters than samples
    assert cluster(np.concatenate([alike, 2 * alike]), 2).labels.tolist() == [0] * 5 + [1] * 5
    assert embed(["...", "!"], "tfidf").tolist() == [[0.0], [0.0]]
    many = embed([f"word{n} word{n + 1} other{n % 3}" for n in range(150)], "tfidf")
    assert many.shape == (150, 100)
    assert np.linalg.norm(many, axis=1) == pytest.approx(1)


# Budgets and ranks.


def test_budgets_by_hand() -> None:
    big = [1000] * 3
    assert budgets([0.3, 0.1, 0.1], big, 100) == budgets([0.3, 0.1, 0.1], big, 100, redistribute=False) == [60, 20, 20]
    assert budgets([1, 1, 1], big, 100, redistribute=False) == [33, 33, 33]
    assert budgets([1, 1, 1], big, 100) == [34, 33, 33]
    assert budgets([0, 0, 0], [50, 5, 50], 30) == [12, 5, 13] or sum(budgets([0, 0, 0], [50, 5, 50], 30)) == 30
    assert budgets([1, 0], [3, 9], 8) == [3, 5]
    assert budgets([1, 0], [3, 9], 8, redistribute=False) == [3, 0]


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 30)), min_size=1, max_size=6), st.integers(0, 80), st.booleans()
)
@settings(max_examples=60, deadline=None)
def test_budgets_keep_to_the_total_and_to_the_clusters(rows: list[tuple[float, int]], total: int, whole: bool) -> None:
    weights_K, sizes = [weight for weight, _ in rows], [size for _, size in rows]
    found = budgets(weights_K, sizes, total, redistribute=whole)
    assert all(0 <= count <= size for count, size in zip(found, sizes, strict=True))
    assert sum(found) == min(total, sum(sizes)) if whole else sum(found) <= total


def test_efficiency_by_hand() -> None:
    cheap, dear = efficiency(0.2, round(math.e**2)), efficiency(0.3, round(math.e**5))
    assert (cheap, dear) == (pytest.approx(0.05, abs=2e-3), pytest.approx(0.03, abs=1e-4))
    assert cheap > dear
    assert efficiency(0.4, 1) == efficiency(0.4, 0) == 0.4


def test_one_cluster_without_a_graph_takes_the_most_efficient() -> None:
    scores, tokens = [0.3, 0.1, 0.25, 0.25, 0.4], [40, 4, 30, 8, 4000]
    paser = PASER(clusters=1, consistency=False)
    best = sorted(range(5), key=lambda n: -scores[n] / math.log(tokens[n] ** 2))
    assert list(paser.pick(pool(scores, tokens), 3).indices) == best[:3]
    assert list(PASER.top().pick(pool(scores, tokens), 2).indices) == [4, 0]


def test_among_equally_degraded_samples_the_shorter_come_first() -> None:
    paser = PASER(consistency=False)
    for value in (0.2, 0.0):
        choice = paser.pick(pool([value] * 6, [9, 3, 7, 3, 5, 8], [0, 0, 0, 1, 1, 1]), 4)
        assert sorted(choice.indices) == [1, 2, 3, 4]
        assert [row["budget"] for row in choice.summary["clusters"]] == [2, 2]  # an undamaged model has uniform budgets


# The graph and the walk.


def test_the_graph_by_hand() -> None:
    graph = ConsistencyGraph()
    for concepts, fits in (("ab", True), ("cd", True), ("ac", False), ("ae", True), ("be", False), ("abe", False)):
        assert graph.consistent(concepts) is fits
        if fits:
            graph.add(concepts)
    assert graph.consistent("z")
    graph.add("z")
    assert len(graph) == 5


@given(
    st.lists(st.sets(st.sampled_from("abcdefg"), max_size=4), max_size=12),
    st.sampled_from(["round_robin", "sequential"]),
)
@settings(max_examples=60, deadline=None)
def test_what_was_taken_is_consistent(concepts: list[set[str]], order: Any) -> None:
    ranked = [list(range(0, len(concepts), 2)), list(range(1, len(concepts), 2))]
    done = select_samples(ranked, [2.0, 1.0], 6, concepts=lambda n: sorted(concepts[n]), order=order)
    graph = ConsistencyGraph()
    for n in done.taken:
        assert graph.consistent(concepts[n])
        graph.add(concepts[n])
    assert len(set(done.taken + done.skipped)) == len(done.taken + done.skipped)
    assert len(done.taken) <= 6
    # All is looked at before the budget is left unfilled.
    assert len(done.taken) == 6 or len(done.taken) + len(done.skipped) == len(concepts)
    late = select_samples(ranked, [2.0, 1.0], 6, concepts=lambda n: sorted(concepts[n]), order=order, last=True)
    assert late.taken[: len(done.taken)] == done.taken
    assert len(late.taken) == min(6, len(concepts))


def test_the_order_of_clusters() -> None:
    ranked = [[0, 1], [2, 3]]
    assert select_samples(ranked, [1, 1], 4).taken == [0, 2, 1, 3]
    assert select_samples(ranked, [1, 1], 4, order="sequential").taken == [0, 1, 2, 3]
    by_hand = {0: "ab", 1: "ac", 2: "cd", 3: "ef"}
    done = select_samples(ranked, [1, 1], 4, concepts=by_hand.__getitem__, redistribute=False)
    assert (done.taken, done.skipped, done.rate) == ([0, 2, 3], [1], 0.25)


def test_a_graph_that_refuses_too_much_is_left_out() -> None:
    samples = pool([0.4, 0.3, 0.2, 0.1], [5] * 4)
    known = dataclasses.replace(samples, concepts=["ab", "cd", "ac", "bd"])
    strict, lenient = (PASER(clusters=1, most_rejected=share) for share in (0.4, 0.5))
    assert list(lenient.pick(known, 3).indices) == [0, 1]
    choice = strict.pick(known, 3)
    assert list(choice.indices) == [0, 1, 2]
    assert choice.summary["consistency"].startswith("left out: 50%")
    late = PASER(clusters=1, inconsistent="last").pick(known, 3)
    assert list(late.indices) == [0, 1, 2]
    assert late.summary["rejection_rate"] == 0.5


def test_key_phrases() -> None:
    text = "Compatibility of systems of linear constraints. Linear constraints, and the set of natural numbers"
    found = key_phrases(text)
    assert found[:2] == ["linear constraints", "natural numbers"]
    assert set(found) == {"linear constraints", "natural numbers", "compatibility", "systems", "set"}
    assert key_phrases(text, 2) == found[:2]
    assert key_phrases("42, 7! ...") == []
    assert key_phrases("don't stop-words Words\nwords") == ["don't stop-words words", "words"]


def test_synonyms_are_one_concept() -> None:
    near = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    assert merge_synonyms(["a", "b", "c"], near, 0.7) == {"a": "a", "b": "a", "c": "c"}
    assert merge_synonyms(["a", "b", "c"], near, 0.95) == {"a": "a", "b": "b", "c": "c"}


# The method.


def test_it_chooses_again_the_same_without_duplicates(dense: Checkpoint) -> None:
    carved, before = pruned(dense), weights(dense)
    twice = examples(dense, [*PAIRS, *PAIRS[:4]])
    paser = PASER(budget=0.5, clusters=2, **WORDS)
    seen: list[str] = []
    found = [paser.choose(twice, carved, dense, progress=lambda done, total, what: seen.append(what)) for _ in range(2)]
    assert found[0].indices == found[1].indices
    assert len(found[0].indices) == len(set(found[0].indices)) == 8
    assert max(found[0].indices) < len(PAIRS)  # the first of equal ones
    told = found[0].summary
    assert (told["examples"], told["duplicates"], told["chosen"]) == (16, 4, 8)
    assert told["chosen_tokens"] < told["tokens"]
    assert set(told["seconds"]) == {"embedding", "clustering", "comparing", "concepts"}
    assert [row["examples"] for row in told["clusters"]] == [6, 6]
    assert {row["about"].split()[0] for row in told["clusters"]} == {"dog", "area"}
    assert len(found[0].table().splitlines()) == 4
    assert set(seen) == {"paser: comparing predictions"}
    assert same(weights(dense), before)


def test_it_may_look_at_some_only(dense: Checkpoint) -> None:
    seen: list[int] = []
    paser = PASER(count=3, candidates=5, clusters=2, **WORDS)
    choice = paser.choose(examples(dense), pruned(dense), dense, progress=lambda done, total, what: seen.append(total))
    assert set(seen) == {5}
    assert choice.summary["looked_at"] == 5
    assert len(choice.indices) == 3
    other = paser.choose(examples(dense), pruned(dense), dense, seed=1)
    assert set(other.indices) != set(choice.indices)


def test_it_trains_on_what_it_chose_and_says_so(dense: Checkpoint) -> None:
    whole, part = pruned(dense), pruned(dense)
    asked: list[int] = []

    def original() -> Checkpoint:
        asked.append(1)
        return dense

    selector = PASER(count=3, clusters=2, **WORDS)
    assert isinstance(selector, Selector)
    choice = selector.choose(examples(dense, TEXTS), part, dense)
    run(part, select=selector, original=original, steps=2, objective=CausalLM(length=24))
    run(whole, [TEXTS[n] for n in sorted(choice.indices)], steps=2, objective=CausalLM(length=24))
    assert same(weights(part), weights(whole))
    assert asked == [1]
    noted = part.record.steps[-1].chosen
    assert noted["selection"]["chosen"] == 3
    assert noted["selection"]["clusters"] == choice.summary["clusters"]
    assert sum(noted["bars"]["items"].values()) == pytest.approx(
        sum(r["degradation"] for r in choice.summary["clusters"])
    )


def test_baselines_run_no_model(dense: Checkpoint) -> None:
    selector = PASER.uniform(budget=0.5, clusters=2, **WORDS)
    assert not selector.compares
    found = selector.select(examples(dense), dense, None, 0.5, KeyedRNG(0))
    assert isinstance(found, Selection)
    assert len(found) == 6
    assert [row["chosen"] for row in found.metadata["clusters"]] == [3, 3]
    other = selector.select(examples(dense), dense, None, 0.5, KeyedRNG(1))
    assert list(found) != list(other)
    by_size = PASER(budgets="size", rank="random", consistency=False, clusters=2, **WORDS)
    assert not by_size.compares
    assert PASER().compares
    assert PASER.top().compares
    assert not PASER(original="smollm2").compares


def test_the_paper_and_the_code_as_they_are(dense: Checkpoint) -> None:
    carved = pruned(dense)
    assert PASER.paper().clusters is None
    assert PASER.released().scope == "prompt"
    for selector in (
        PASER.paper(budget=1.0, **{**WORDS, "length": 64}),
        PASER.released(budget=1.0, **WORDS, length=64),
    ):
        choice = selector.choose(examples(dense), carved, dense)
        assert 1 <= len(choice.indices) <= 12


def test_an_undamaged_model_has_uniform_budgets(dense: Checkpoint) -> None:
    choice = PASER(budget=0.5, clusters=2, **WORDS).choose(examples(dense), dense, checkpoint())
    assert [row["degradation"] for row in choice.summary["clusters"]] == [0.0, 0.0]
    assert [row["budget"] for row in choice.summary["clusters"]] == [3, 3]


def test_a_vocabulary_that_grew_is_compared_on_what_both_have(dense: Checkpoint) -> None:
    grown = pruned(dense)
    grown.model.resize_token_embeddings(dense.vocabulary + 3, mean_resizing=False)
    (sample,) = read_samples(examples(dense, PAIRS[:1]), dense, None, chat=True)
    assert degradation([sample], grown, dense) == pytest.approx(degradation([sample], pruned(dense), dense), rel=1e-5)


def test_what_choosing_takes() -> None:
    work = Workload(((8, 8),), 100, 150, 8, 1000, 100, 4)
    cost = PASER().training_cost(work, 10, 100, 1.0)
    assert (cost.flops, cost.extra_bytes) == (600_000, 600)
    assert PASER.uniform().training_cost(work, 10, 100, 1.0).flops == 0
    assert PASER(candidates=20, length=10).training_cost(work, 10, 100, 1.0).flops == 120_000
    step = {"epochs": 2.0, "batch_size": 2, "length": 10}
    chosen, all_of_them = (
        Train(**step, **more).estimate(work).flops for more in ({"select": {"random": {"budget": 0.25}}}, {})
    )
    assert chosen == 0.25 * all_of_them
    some = Train(**step, select={"paser": {"count": 5, "candidates": 20, "length": 10}}).estimate(work)
    assert some.flops == 6 * 150 * 2 * 5 * 10 + 120_000


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"budget": 0.01}, "budget is 0.01, which is none of 12 examples; at least 0.084 is accepted"),
        ({"count": 3, "candidates": 2}, "candidates is 2, and 3 of 12 examples are to be chosen"),
        ({"count": 13}, "count is 13, and there are 12 examples; 1 to 12 fit"),
        ({"embedding": "nowhere/encoder-x"}, "nowhere/encoder-x"),
    ],
)
def test_bad_input_is_one_sentence(dense: Checkpoint, fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(IntaglioError, match=sentence) as caught:
        PASER(**{**WORDS, **fields}).choose(examples(dense), pruned(dense), dense)
    assert "\n" not in str(caught.value)


def test_tokenizers_without_a_common_id_are_refused() -> None:
    first, second = (
        SimpleNamespace(
            vocabulary=4, source=name, tokenizer=SimpleNamespace(get_vocab=lambda index=index: {"a": index})
        )
        for index, name in enumerate(("first", "second"))
    )
    assert shared_vocabulary(first, first) == 4
    with pytest.raises(IntaglioError, match=r"with second, whose tokenizer differs \(no id is common to both\)"):
        shared_vocabulary(first, second)


def test_refusals_about_models(dense: Checkpoint) -> None:
    paser = PASER(**WORDS)
    with pytest.raises(IntaglioError, match="the model before it was carved, and there is none"):
        paser.choose(examples(dense), dense)
    with pytest.raises(IntaglioError, match="whose tokenizer differs"):
        paser.choose(examples(dense), dense, new("llama", width=8, depth=1))
    bare = Checkpoint(checkpoint("bert").model, None, "other")
    bare.model.resize_token_embeddings(90, mean_resizing=False)
    with pytest.raises(IntaglioError, match="vocabularies of 160 and 90 tokens"):
        paser.choose(examples(dense), dense, bare)
    with pytest.raises(IntaglioError, match="example 1 of the training data: its prompt is"):
        paser.choose([*PAIRS[:1], {**PAIRS[1], "prompt": "the dog " * 90}, *PAIRS[2:]], dense, dense)
    with pytest.raises(IntaglioError, match="neither a pair nor a text; its fields: word"):
        paser.choose([{"word": "x", "id": 0}] * 9, dense, dense)
    with pytest.raises(IntaglioError, match="only token ids"):
        paser.choose([{"input_ids": [3, 4], "id": 0}] * 9, Checkpoint(dense.model, None, "bare"), dense)
    broken = pruned(dense)
    broken.model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(IntaglioError, match="not finite"):
        paser.choose(examples(dense), broken, dense)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"budget": 0.0}, "budget"),
        ({"clusters": 0}, "clusters"),
        ({"original": "smollm2", "budgets": "uniform", "rank": "random"}, "neither budgets nor rank compares"),
        ({"synonyms": 0.9, "consistency": False}, "synonyms belong to the graph"),
    ],
)
def test_fields_that_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        PASER(**fields)


def test_three_texts_of_many_words_keep_two_components() -> None:
    texts = [" ".join(f"w{text}x{word}" for word in range(60)) + " shared" for text in range(3)]
    assert embed(texts, TFIDF).shape == (3, 2)
    assert embed(texts[:2], TFIDF).shape == (2, 121)
