"""DySpec: slots, draws and trees as the card has them, output that is the target's, and what is refused."""

from __future__ import annotations

import heapq
import math
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers.generation.streamers import TextStreamer

from intaglio.checkpoint import Checkpoint, load
from intaglio.cli.settings import check_settings
from intaglio.errors import IntaglioError
from intaglio.methods.decoding.dyspec import AcceptanceTable, DySpec, tree_growth
from intaglio.methods.decoding.dyspec.calibration import BINS, EDGES, Acceptance, count_acceptance
from intaglio.methods.decoding.dyspec.residual import Residual
from intaglio.methods.decoding.dyspec.tree_growth import TreeGrower
from intaglio.speculative import Speculative, Step, TokenTree
from intaglio.speculative.drafters import NGramStore
from intaglio.speculative.drafters.dynamic_tree import PartialTree
from intaglio.speculative.drafters.rank_statistics import draft_ranks
from tests.alive import alive
from tests.conftest import TinyDir
from tests.families import DECODERS, VOCAB, tiny_model, tiny_tokenizer
from tests.speculative.test_sampling import Toy, p_value
from tests.speculative.toys import cousin, prompt, ragged, target

EXAMPLES = (
    {"draft": tiny_model("llama", seed=1, layers=1, dtype=torch.float64), "budget": 9},
    {"draft": NGramStore.build([list(range(5, 40)) * 2], VOCAB), "algorithm": "threshold", "order": "blocks"},
)
ALIVE = {
    "draft": tiny_model("llama", seed=2, layers=1, dtype=torch.float64),
    "ngram": "test_drafts_and_budgets_that_do_not_fit",
    "algorithm": "threshold",
    "budget": 4,
    "threshold": alive(0.5, algorithm="threshold"),
    "depth": 1,
    "temperature": 3.0,
    "top_k": 1,
    "top_p": 0.2,
    "draw": "sample",
    "calibrate": True,
    "carry_over": alive(True, calibrate=True),
    "acceptance": AcceptanceTable(tried=(9,) * 11, accepted=(0,) * 5 + (9,) * 6),
    "order": "blocks",
    "seed": alive(1, draw="sample"),
}
V = 6
Laws = Callable[[int], torch.Tensor]


def markov(seed: int, scale: float = 2.0, size: int = V) -> Laws:
    """A draft whose law depends on the last token alone."""
    table = torch.softmax(scale * torch.randn(size, size, generator=torch.Generator().manual_seed(seed)), -1)
    return lambda token: table[token]


def grow(grower: TreeGrower, laws: Laws, *, least: float | None = None, root: int = 0) -> tuple[TokenTree, list[int]]:
    """Drive a growth by hand; the tree, and what its nodes are called by the grower."""
    tree = PartialTree(root, grower.depth)
    growing = grower.heap(tree) if least is None else grower.threshold(tree, least)
    wanted = next(growing, None)
    while wanted is not None:
        try:
            wanted = growing.send(torch.stack([laws(tree.tokens[node]) for node in wanted]))
        except StopIteration:
            wanted = None
    return tree.finish()


def by_law(probs_V: torch.Tensor, drawn: bool, generator: Any) -> Residual:
    """A residual whose draws follow from the law alone, so that two algorithms see the same ones."""
    return Residual(probs_V, drawn, torch.Generator().manual_seed(int(1e6 * float(probs_V[0]))))


def likeliest(probs_V: torch.Tensor, drawn: bool, generator: Any) -> Residual:
    """As though each draw had come out as the likeliest token."""
    return Residual(probs_V, False, generator)


def grower(nodes: int, depth: int = 99, drawn: bool = True, **more: Any) -> TreeGrower:
    return TreeGrower(nodes, depth, drawn, torch.Generator().manual_seed(0), **more)


def paths(tree: TokenTree) -> list[tuple[int, ...]]:
    return [tuple(tree.tokens[n] for n in tree.path(node)[1:]) for node in range(1, len(tree))]


# --- the residual ----------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 60))
def test_tokens_come_once_each_with_their_share_of_what_is_left(seed: int, size: int) -> None:
    law = torch.softmax(4 * torch.randn(size, generator=torch.Generator().manual_seed(seed)), -1)
    law[law < 1e-4] = 0
    law /= law.sum()
    for drawn in (True, False):
        left, taken, seen = Residual(law, drawn, torch.Generator().manual_seed(seed)), 0.0, []
        assert not left.empty
        while not left.empty and left.peek() is not None:
            token, share = left.take()
            assert share == pytest.approx(float(law[token]) / (1 - taken), rel=1e-2, abs=1e-3)
            assert 0 < share <= 1
            taken += float(law[token])
            seen.append(token)
        assert sorted(seen) == law.nonzero()[:, 0].tolist()
        if not drawn:
            assert all(law[a] >= law[b] for a, b in pairwise(seen))


def test_draws_without_replacement_have_their_law() -> None:
    law, generator = torch.tensor([0.5, 0.25, 0.15, 0.1]), torch.Generator().manual_seed(0)
    found = np.zeros((4, 4), dtype=np.int64)
    for _ in range(4_000):
        left = Residual(law, True, generator)
        found[left.take()[0], left.take()[0]] += 1
    expected = np.array([[float(law[a] * law[b] / (1 - law[a])) * (a != b) for b in range(4)] for a in range(4)])
    assert p_value(found, expected) > 1e-4


# --- the growth ------------------------------------------------------------------------------------------------------


def test_the_worked_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_growth, "Residual", likeliest)
    law = torch.tensor([0.6, 0.3, 0.1])
    four = grower(4)
    tree, order = grow(four, lambda token: law, root=2)
    assert paths(tree) == [(0,), (0, 0), (1,), (0, 0, 0)]
    values = [slot.value for node in order[1:] if (slot := four.slots[node]) is not None]
    assert values == pytest.approx([1, 0.6, 0.4, 0.36])
    assert [four.shares[node] for node in order[1:]] == pytest.approx([0.6, 0.6, 0.75, 0.6])


def algorithm_1(laws: Laws, nodes: int, depth: int, drawn: bool) -> list[tuple[int, ...]]:
    """The card's words, slot by slot from one heap, a draft call for each node; the paths in the order of the pops."""
    found: list[tuple[int, ...]] = []
    ages = count()

    def entry(value: float, path: tuple[int, ...], left: Residual) -> tuple[Any, ...]:
        worth = value if drawn else value * left.peek()[1]  # type: ignore[index]
        return (-worth, next(ages), value, path, left)

    heap = [entry(1.0, (), tree_growth.Residual(laws(0), drawn, None))]
    while heap and len(found) < nodes:
        _, _, value, path, left = heapq.heappop(heap)
        token, share = left.take()
        found.append((*path, token))
        if value * (1 - share) > 0 and left.peek() is not None:
            heapq.heappush(heap, entry(value * (1 - share), path, left))
        if len(path) + 1 < depth and value * share > 0:
            below = tree_growth.Residual(laws(token), drawn, None)
            heapq.heappush(heap, entry(value * share, (*path, token), below))
    return found


@pytest.mark.parametrize("drawn", [True, False])
@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 24), st.integers(1, 6), st.floats(0.5, 4))
def test_level_by_level_gives_the_heaps_tree(drawn: bool, seed: int, nodes: int, depth: int, scale: float) -> None:
    laws = markov(seed, scale, 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_growth, "Residual", by_law)
        expected = algorithm_1(laws, nodes, depth, drawn)
        tree, _ = grow(grower(nodes, depth, drawn), laws)
    found = paths(tree)
    assert len(found) == len(expected)
    # Two ways round a ring of tokens have the same chance, and rounding says which comes first.
    for one, other in zip(found, expected, strict=True):
        assert one == other or chance(laws, one) == pytest.approx(chance(laws, other), rel=1e-5)


def chance(laws: Laws, path: tuple[int, ...]) -> float:
    """Of a path behind token 0."""
    return math.prod(float(laws(before)[token]) for before, token in zip((0, *path), path, strict=False))


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 24))
def test_values_telescope_and_never_grow(seed: int, nodes: int) -> None:
    laws = markov(seed, 1.5, 10)
    found = grower(nodes)
    tree, order = grow(found, laws)
    slots = [found.slots[node] for node in order[1:]]
    values = [slot.value for slot in slots if slot is not None]
    assert len(values) == len(tree) - 1
    assert all(a >= b for a, b in pairwise(values))
    reached = [1.0] * len(tree)
    for node, below in enumerate(tree.children):
        left = 1.0
        for child in below:
            law = laws(tree.tokens[node])
            # The i-th slot: the path's probability times what the law gives to none of the earlier children.
            assert values[child - 1] == pytest.approx(reached[node] * left, rel=1e-3, abs=1e-6)
            share = found.shares[order[child]]
            assert share == pytest.approx(float(law[tree.tokens[child]]) / left, rel=1e-3, abs=1e-5)
            reached[child] = values[child - 1] * share
            left -= float(law[tree.tokens[child]])
    assert tree.q is not None
    assert set(tree.q) == {node for node, below in enumerate(tree.children) if below}


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(2, 20), st.booleans())
def test_the_threshold_at_the_last_value_gives_the_same_tree(seed: int, nodes: int, drawn: bool) -> None:
    laws = markov(seed, 1.5, 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_growth, "Residual", by_law)
        heap = grower(nodes, drawn=drawn)
        expected, order = grow(heap, laws)
        last = heap.slots[order[-1]]
        assert last is not None
        tree, _ = grow(grower(999, drawn=drawn), laws, least=-last.priority)
    assert sorted(paths(tree)) == sorted(paths(expected))


def test_a_cap_stops_a_level_by_values() -> None:
    law = torch.tensor([0.4, 0.3, 0.2, 0.1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_growth, "Residual", likeliest)
        tree, _ = grow(grower(3), lambda token: law, least=0.01)
        # Slots 1, .6, .3 of the root, and no node of a second level.
        assert paths(tree) == [(0,), (1,), (2,)]
        tree, _ = grow(grower(6), lambda token: law, least=0.25)
        # Below 0, of value .4: .4 and .24 < .25; below 1, of value .3: .3. The root's fourth slot is worth .1.
        assert paths(tree) == [(0,), (1,), (2,), (0, 0), (1, 0)]


@pytest.mark.parametrize("drawn", [True, False])
def test_a_draft_that_is_certain_gives_a_chain(drawn: bool) -> None:
    laws = {token: torch.eye(V)[(token + 1) % V] for token in range(V)}
    for least in (None, 0.5):
        tree, _ = grow(grower(9, drawn=drawn), laws.__getitem__, least=least)
        assert list(tree.tokens) == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
        assert list(tree.parents) == list(range(-1, 9))
        shallow, _ = grow(grower(9, 4, drawn), laws.__getitem__, least=least)
        assert len(shallow) == 5
        none, _ = grow(grower(9, 0, drawn), laws.__getitem__, least=least)
        assert len(none) == 1


def test_small_vocabularies_end_a_tree() -> None:
    tree, _ = grow(grower(999, 2), markov(0))
    assert len(tree) == 1 + V + V * V


def test_one_node_is_ordinary_speculative_decoding() -> None:
    laws, generator = markov(3, 1.0), torch.Generator().manual_seed(1)
    counts = np.zeros(V, dtype=np.int64)
    for _ in range(2_000):
        tree, _ = grow(TreeGrower(1, 99, True, generator), laws)
        assert list(tree.parents) == [-1, 0]
        counts[tree.tokens[1]] += 1
    assert p_value(counts, laws(0).double().numpy()) > 1e-4


def test_depth_first_keeps_parents_before_children_and_siblings_in_order() -> None:
    tree = PartialTree(0, 9)
    for parent, token in ((0, 1), (0, 2), (1, 3), (2, 4), (1, 5), (3, 6)):
        tree.add(parent, token)
    tree.q = {0: torch.ones(1), 1: torch.ones(2)}
    found, order = tree.finish(depth_first=True)
    assert order == [0, 1, 3, 6, 5, 2, 4]
    assert list(found.tokens) == [0, 1, 3, 6, 5, 2, 4]
    assert list(found.parents) == [-1, 0, 1, 2, 1, 0, 5]
    assert found.q is not None
    assert {node: len(law) for node, law in found.q.items()} == {0: 1, 1: 2}
    plain, order = tree.finish()
    assert order == list(range(7))
    assert list(plain.parents) == [-1, 0, 0, 1, 2, 1, 3]


# --- the law of sampled output ---------------------------------------------------------------------------------------


class Sampled(Toy):
    """The verify loop's toy (a Markov target and draft, V = 6) with trees that DySpec grows."""

    def __init__(self, warp: str = "temperature", *, least: float | None = None, chance: Any = float) -> None:
        super().__init__(warp, (), True)
        self.least, self.chance = least, chance
        self.draws = torch.Generator().manual_seed(7)

    def tree(self, root: int) -> TokenTree:
        one = TreeGrower(6, 4, True, self.draws, self.chance)
        return grow(one, self.q.__getitem__, least=self.least, root=root)[0]


class Pruned(Sampled):
    """The same, but of the children drawn only the likelier half is verified: what EAGLE's reranking does."""

    def tree(self, root: int) -> TokenTree:
        tree = super().tree(root)
        assert tree.q is not None
        kept = [0]
        for node in range(1, len(tree)):
            siblings = tree.children[tree.parents[node]]
            law = tree.q[tree.parents[node]]
            ahead = sum(float(law[tree.tokens[other]]) > float(law[tree.tokens[node]]) for other in siblings)
            if tree.parents[node] in kept and ahead < math.ceil(len(siblings) / 2):
                kept.append(node)
        place = {node: index for index, node in enumerate(kept)}
        return TokenTree(
            [tree.tokens[node] for node in kept],
            [place.get(tree.parents[node], -1) for node in kept],
            {place[node]: law for node, law in tree.q.items() if node in place},
        )


def optimistic(share: float) -> float:
    return 0.5 + 0.5 * share


@pytest.mark.slow
@pytest.mark.parametrize(
    ("warp", "options", "draws"),
    [
        ("temperature", {}, 40_000),
        ("top_p", {}, 15_000),
        ("temperature", {"least": 0.15}, 15_000),
        ("top_k", {"chance": optimistic}, 15_000),
    ],
)
def test_the_first_two_tokens_have_the_targets_joint_law(warp: str, options: dict[str, Any], draws: int) -> None:
    toy = Sampled(warp, **options)
    assert p_value(toy.counts(draws), toy.law) > 1e-4


def test_a_short_look_at_the_joint_law() -> None:
    toy = Sampled()
    assert p_value(toy.counts(1_200), toy.law) > 1e-4


def test_pruning_after_the_draws_is_found_out() -> None:
    toy = Pruned()
    assert p_value(toy.counts(1_500), toy.law) < 1e-4


# --- in the loop -----------------------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "heap": {"budget": 7},
    "one node": {"budget": 1},
    "large": {"budget": 40, "depth": 3},
    "threshold": {"algorithm": "threshold", "budget": 20, "threshold": 0.04},
    "drawn": {"budget": 12, "draw": "sample", "order": "blocks"},
    "learnt": {"budget": 12, "draw": "sample", "calibrate": True, "order": "blocks"},
    "learnt, not drawn": {"budget": 12, "calibrate": True, "temperature": 2.0, "top_k": 9, "top_p": 0.9},
}


@pytest.mark.parametrize("family", DECODERS)
def test_greedy_ids_are_stock(family: str) -> None:
    model, draft = target(family), cousin("gemma3" if family == "llama" else family)
    names = CASES if family == "llama" else ("heap", "threshold", "learnt")
    for inputs in ({"input_ids": prompt(9)}, ragged([4, 9, 2])):
        options = {"do_sample": False, "max_new_tokens": 9, "eos_token_id": [2, 15, 33, 60], "pad_token_id": 0}
        expected = model.generate(**inputs, **options)
        for fields in (CASES[name] for name in names):
            found = model.generate(**inputs, custom_generate=DySpec(draft=draft, **fields), **options)
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", CASES)
def test_a_table_and_the_target_itself_as_drafts(name: str) -> None:
    model, inputs = target("llama"), ragged([5, 11, 3])
    options = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(**inputs, **options)
    store = NGramStore.build(expected.tolist(), 160)
    for draft in (store, model):
        decoder = DySpec(draft=draft, **CASES[name])
        assert torch.equal(model.generate(**inputs, custom_generate=decoder, **options), expected)
        assert decoder.calls.nodes > 0
    if name in ("heap", "large", "one node"):  # its own likeliest token is always accepted
        assert min(decoder.statistics.lengths[:-3]) >= 1


@pytest.mark.parametrize("fields", [{}, {"order": "blocks"}, {"algorithm": "threshold"}, {"calibrate": True}])
def test_a_target_that_drafts_for_itself_accepts_every_first_child(fields: dict[str, Any]) -> None:
    model, steps = target("mistral_window"), list[Step]()
    decoder = DySpec(draft=model, budget=6, on_step=steps.append, generator=torch.Generator().manual_seed(3), **fields)
    options: dict[str, Any] = {"do_sample": True, "temperature": 0.3, "top_k": 20, "eos_token_id": None}
    model.generate(**ragged([5, 9]), max_new_tokens=14, pad_token_id=0, custom_generate=decoder, **options)
    assert decoder.statistics.accepted > 0
    for step in steps:
        if step.tree is not None:
            node, length = 0, 0
            while step.tree.children[node]:
                node, length = step.tree.children[node][0], length + 1
            assert step.drafted == length


@torch.no_grad()
def test_the_trees_logits_are_those_of_plain_passes() -> None:
    """Of the target at every node, and the draft's law at every node with children: caches, masks and positions."""
    model, draft = target("gemma3", dtype=torch.float32), cousin("gemma3", dtype=torch.float32)
    inputs, steps = ragged([6, 11, 4]), list[tuple[Step, torch.Tensor]]()
    decoder = DySpec(
        draft=draft, budget=9, order="blocks", temperature=0.8, top_k=30,
        on_step=lambda step: steps.append((step, step.logits.clone())),
    )  # fmt: skip
    torch.manual_seed(0)
    options: dict[str, Any] = {"do_sample": True, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 9}
    found = model.generate(**inputs, custom_generate=decoder, **options)
    seen = [found[row, : inputs["input_ids"].shape[1]][mask.bool()].tolist()
            for row, mask in enumerate(inputs["attention_mask"])]  # fmt: skip
    checked = 0
    for step, logits_NV in steps:
        tree = step.tree
        for node in range(len(tree) if tree is not None else 0):
            assert tree is not None
            ids = torch.tensor([seen[step.row] + [tree.tokens[n] for n in tree.path(node)[1:]]])
            assert torch.allclose(model(ids).logits[0, -1], logits_NV[node], atol=1e-4)
            if tree.q is not None and node in tree.q:
                scores = draft(ids).logits[0, -1] / 0.8
                scores[scores < scores.topk(30).values[-1]] = -torch.inf
                assert torch.allclose(torch.softmax(scores, -1), tree.q[node], atol=1e-4)
                checked += 1
        seen[step.row] += step.tokens
    assert checked > 10


def test_drafts_are_counted() -> None:
    model, draft = target("llama"), cousin("llama")
    decoder = DySpec(draft=draft, budget=24)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": None}
    model.generate(prompt(6), custom_generate=decoder, **options)
    passes = decoder.statistics.passes - 1
    # One pass a level, and no level without a node of the next.
    assert passes < decoder.calls.passes <= 1 + 25 * passes
    chain = DySpec(draft=draft, budget=24, depth=1)
    model.generate(prompt(6), custom_generate=chain, **options)
    assert chain.calls.passes == 1 + sum(length is not None for length in chain.statistics.lengths[:-1])


def test_draws_for_a_greedy_target_follow_the_seed_and_leave_the_global_generator_alone() -> None:
    model, trees = target("llama"), dict[int, list[Any]]()
    before = torch.get_rng_state()
    for seed in (0, 0, 1):
        steps: list[Step] = []
        decoder = DySpec(draft=cousin("llama"), draw="sample", budget=5, seed=seed, on_step=steps.append)
        model.generate(prompt(6), do_sample=False, max_new_tokens=8, eos_token_id=None, custom_generate=decoder)
        found = [list(step.tree.tokens) for step in steps if step.tree is not None]
        assert trees.setdefault(seed, found) == found
    assert trees[0] != trees[1]
    assert torch.equal(before, torch.get_rng_state())


def test_the_law_drafted_from_is_warped_as_asked() -> None:
    model, steps = target("llama"), list[Step]()
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 8, "eos_token_id": None, "top_k": 5}
    torch.manual_seed(0)
    decoder = DySpec(draft=cousin("llama"), top_p=0.8, on_step=steps.append)
    model.generate(prompt(6), custom_generate=decoder, **options)
    laws = [law for step in steps if step.tree is not None for law in (step.tree.q or {}).values()]
    assert laws
    assert all(1 <= int((law > 0).sum()) <= 5 for law in laws)
    steps.clear()
    top = DySpec(draft=cousin("llama"), draw="top", on_step=steps.append)
    model.generate(prompt(6), custom_generate=top, **options)
    assert all(step.tree is None or step.tree.q is None for step in steps)


# --- the estimate ----------------------------------------------------------------------------------------------------


def test_chances_are_learnt_from_what_was_tried() -> None:
    found = Acceptance()
    assert found(0.4) == pytest.approx(0.4)
    #            0 -> 1, 2, 3; 2 -> 4
    tree = TokenTree([9, 5, 6, 7, 8], [-1, 0, 0, 0, 2])
    # 5 was rejected, 6 accepted, 7 never tried; below 6 the target said something else than 8.
    found.learn(tree, [0, 2], [6, 1], 1, [1.0, 0.4, 0.4, 0.4, 0.7])
    assert (sum(found.tried), sum(found.accepted)) == (3, 1)
    assert found(0.4) == pytest.approx((1 + 8 * 0.4) / (2 + 8))
    assert found(0.7) == pytest.approx(8 * 0.7 / 9)
    # The row ended on an accepted token: the path has no node for it.
    found.learn(tree, [0], [5], 1, [1.0, 0.4, 0.4, 0.4, 0.7])
    assert found.accepted[found.tried.index(3)] == 2


BIN = st.integers(0, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))


@st.composite
def tables(draw: st.DrawFn) -> AcceptanceTable:
    bins = draw(st.lists(BIN, min_size=BINS, max_size=BINS))
    return AcceptanceTable(tried=tuple(n for n, _ in bins), accepted=tuple(k for _, k in bins))


@given(tables(), st.lists(st.floats(0, 1), min_size=2, max_size=12))
def test_chances_never_fall_and_stay_chances(table: AcceptanceTable, shares: list[float]) -> None:
    found = Acceptance(table)
    at = sorted([*shares, *EDGES, *(math.nextafter(edge, 0) for edge in EDGES)])
    chances = [found(share) for share in at]
    assert all(0 <= chance <= 1 for chance in chances)
    assert all(a <= b + 1e-12 for a, b in pairwise(chances))
    assert found.table() == table


@given(st.integers(0, BINS - 1), BIN, st.floats(0, 1))
def test_bins_without_a_trial_give_the_draft_probability(seen: int, counts: tuple[int, int], share: float) -> None:
    tried, accepted = (tuple(value if place == seen else 0 for place in range(BINS)) for value in counts)
    found = Acceptance(AcceptanceTable(tried=tried, accepted=accepted))
    low, high = ((counts[1] + 8 * edge) / (counts[0] + 8) for edge in ((0.0, *EDGES)[seen], (*EDGES, 1.0)[seen]))
    place = bisect(EDGES, share)
    if not counts[0]:
        assert found(share) == share
    elif place == seen:
        assert found(share) == pytest.approx((counts[1] + 8 * share) / (counts[0] + 8))
    else:  # as far as what was seen allows
        assert found(share) == pytest.approx(min(share, low) if place < seen else max(share, high))


def test_bins_that_contradict_each_other_are_pooled() -> None:
    tried, accepted = [0] * BINS, [0] * BINS
    tried[4], accepted[4] = 10, 9  # 0.2 to 0.35: nearly all
    tried[6], accepted[6] = 20, 2  # 0.5 to 0.65: hardly any
    found = Acceptance(AcceptanceTable(tried=tuple(tried), accepted=tuple(accepted)))
    for share in (0.2, 0.3, 0.4, 0.6):
        assert found(share) == pytest.approx((11 + 16 * share) / 46)
    assert (found(0.1), found(0.7)) == pytest.approx((0.1, 0.7))
    tried[6], accepted[6] = 2, 2
    found = Acceptance(AcceptanceTable(tried=tuple(tried), accepted=tuple(accepted)))
    for share in (0.2, 0.3, 0.6):
        assert found(share) == pytest.approx((11 + 16 * share) / 28)


def test_bins_without_a_trial_are_held_between_their_neighbours() -> None:
    tried, accepted = [0] * BINS, [0] * BINS
    tried[3], accepted[3] = 8, 6  # 0.1 to 0.2
    tried[8], accepted[8] = 8, 8  # 0.8 to 0.9
    found = Acceptance(AcceptanceTable(tried=tuple(tried), accepted=tuple(accepted)))
    assert found(0.15) == pytest.approx((6 + 8 * 0.15) / 16)
    assert found(0.85) == pytest.approx((8 + 8 * 0.85) / 16)
    below, above = (6 + 8 * 0.2) / 16, (8 + 8 * 0.9) / 16
    shares = (0.05, 0.3, 0.7, 0.93, 0.99)
    assert [found(share) for share in shares] == pytest.approx([0.05, below, 0.7, above, 0.99])


def test_a_greedy_text_is_counted_child_by_child() -> None:
    laws = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [1.0, 0.0, 0.0]])

    def table(most: int) -> AcceptanceTable:
        return count_acceptance([(laws, [0, 2, 1])], most, lambda probs_V: Residual(probs_V, False, None))

    def of(*pairs: tuple[float, bool]) -> AcceptanceTable:
        found = Acceptance()
        for share, hit in pairs:
            found.count(share, hit)
        return found.table()

    # The second token is the third choice: .5, then .3 of .5, then all that is left; the third is none of the draft's.
    assert table(9) == of((0.5, True), (0.5, False), (0.6, False), (1.0, True), (1.0, False))
    assert table(2) == of((0.5, True), (0.5, False), (0.6, False), (1.0, False))
    with pytest.raises(IntaglioError, match="at least one text with a continuation"):
        count_acceptance([], 3, lambda probs_V: Residual(probs_V, False, None))


def test_acceptance_fitted_beforehand() -> None:
    model, draft = target("llama"), cousin("llama")
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None}
    expected = model.generate(prompt(6), **options)
    texts = [(expected[0].tolist(), 7)]  # the first new token is the prefill's
    chain = DySpec(draft=draft, budget=1, depth=1)
    table = chain.fit_acceptance(model, texts)
    assert sum(table.tried) == 19  # a token of the draft's at each
    assert sum(table.accepted) == sum(rank == 0 for rank in draft_ranks(draft, texts[0]))
    shapes = []
    for acceptance in (None, table, AcceptanceTable.model_validate_json(table.model_dump_json())):
        steps: list[Step] = []
        decoder = DySpec(draft=draft, budget=9, acceptance=acceptance, on_step=steps.append)
        assert torch.equal(model.generate(prompt(6), custom_generate=decoder, **options), expected)
        shapes.append([list(step.tree.tokens) for step in steps if step.tree is not None])
    assert shapes[0] != shapes[1] == shapes[2]
    # Drawn children are counted as they are drawn.
    drawn = DySpec(draft=draft, budget=1, draw="sample", seed=3)
    assert drawn.fit_acceptance(model, texts) == drawn.fit_acceptance(model, texts) != table
    with pytest.raises(IntaglioError, match="has a prompt of 0"):
        chain.fit_acceptance(model, [([1, 2], 0)])


def test_a_table_from_a_file(tmp_path: Path) -> None:
    table = AcceptanceTable(tried=(5,) * BINS, accepted=(1,) * BINS)
    file = tmp_path / "table.json"
    file.write_text(table.model_dump_json())
    assert DySpec(draft="x", acceptance=file).acceptance == table  # type: ignore[arg-type]
    assert check_settings("dyspec", {"draft": "x", "acceptance": str(file)})["acceptance"] == table
    file.write_text("{")
    for name, says in ((file, "is no JSON file with a table"), (tmp_path / "none", "cannot read the table .*No such")):
        with pytest.raises(IntaglioError, match=says) as caught:
            check_settings("dyspec", {"draft": "x", "acceptance": str(name)})
        assert "\n" not in str(caught.value)


def test_what_is_learnt_is_added_to_the_table() -> None:
    model, table = target("llama"), AcceptanceTable(tried=(5,) * BINS, accepted=(1,) * BINS)
    decoder = DySpec(draft=cousin("llama"), budget=6, calibrate=True, carry_over=True, acceptance=table)
    model.generate(prompt(6), do_sample=False, max_new_tokens=9, eos_token_id=None, custom_generate=decoder)
    assert sum(decoder._learnt.tried) > 5 * BINS
    assert decoder.acceptance == table


def test_learnt_chances_change_the_trees() -> None:
    model, shapes = target("llama"), []
    for calibrate in (False, True):
        steps: list[Step] = []
        decoder = DySpec(draft=cousin("llama"), budget=6, calibrate=calibrate, on_step=steps.append)
        model.generate(prompt(6), do_sample=False, max_new_tokens=24, eos_token_id=None, custom_generate=decoder)
        shapes.append([list(step.tree.tokens) for step in steps if step.tree is not None])
    assert shapes[0][0] == shapes[1][0]
    assert shapes[0] != shapes[1]


def test_nothing_learnt_outlives_a_run_unless_asked() -> None:
    model, tried = target("llama"), dict[bool, list[int]]()
    for carry in (False, True):
        decoder = DySpec(draft=cousin("llama"), budget=6, calibrate=True, carry_over=carry)
        for _ in range(2):
            model.generate(prompt(6), do_sample=False, max_new_tokens=9, eos_token_id=None, custom_generate=decoder)
            tried.setdefault(carry, []).append(sum(decoder._learnt.tried))
    assert tried[False] == [0, 0]
    assert 0 < tried[True][0] < tried[True][1]


# --- how it is called, and what is refused ---------------------------------------------------------------------------


def test_the_papers_constants() -> None:
    paper = DySpec.paper(draft="smollm2")
    assert (paper.budget, paper.temperature, paper.draw, paper.algorithm) == (64, 0.6, "sample", "heap")
    large = DySpec.paper(draft="smollm2", algorithm="threshold")
    assert (large.budget, large.threshold) == (768, 0.001)
    assert DySpec.paper(draft="x", budget=9).budget == 9


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "Field required"),
        ({"draft": 3}, "a draft cannot be int; accepted: a model's name"),
        ({"draft": ""}, "the draft is empty"),
        ({"draft": "x", "budget": 0}, "greater than or equal to 1"),
        ({"draft": "x", "algorithm": "threshold", "threshold": 0.0}, "greater than 0"),
        ({"draft": "x", "algorithm": "threshold", "threshold": 1.5}, "less than or equal to 1"),
        ({"draft": "x", "threshold": 0.1}, "threshold belongs to algorithm: threshold"),
        ({"draft": "x", "carry_over": True}, "carry_over keeps what calibrate learns"),
        ({"draft": "x", "acceptance": {"tried": [1] * 10, "accepted": [0] * 10}}, "at least 11 items"),
        ({"draft": "x", "acceptance": {"tried": [1] * 11, "accepted": [-1] * 11}}, "greater than or equal to 0"),
        ({"draft": "x", "acceptance": {"tried": [1] * 11, "accepted": [2] * 11}}, "bin 0 has 2 tokens accepted of 1"),
        ({"draft": "x", "temperature": 0.0}, "greater than 0"),
        ({"draft": "x", "draw": "beam"}, "'auto', 'sample' or 'top'"),
        ({"draft": tiny_model("llama", layers=1), "ngram": True}, "give it their name"),
    ],
)
def test_settings_that_are_wrong(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        DySpec(**fields)


def test_drafts_and_budgets_that_do_not_fit(tiny_dir: TinyDir, tmp_path: Path) -> None:
    model = load(tiny_dir("llama")).model
    ids, other = torch.tensor([[5, 6, 7]]), tiny_tokenizer("llama")
    other.add_tokens(["new word"])
    foreign = Checkpoint(tiny_model("llama", layers=1), other, "foreign")
    short = tiny_model("llama", layers=1, max_position_embeddings=16)
    small = NGramStore.build([[1, 2, 3]], 10)
    small.save(tmp_path / "small.safetensors")
    text = tmp_path / "texts.txt"
    text.write_text("the quick brown fox jumps over the lazy dog")
    refused: list[tuple[dict[str, Any], str]] = [
        ({"draft": tiny_model("llama", layers=1, vocab_size=99)}, "the draft model knows 99 token ids and the target"),
        ({"draft": foreign}, "the draft model foreign has another tokenizer than the target"),
        ({"draft": short}, "the draft model's context is 16 tokens; this run may need 23"),
        ({"draft": model, "budget": 126}, "the budget is 126 nodes; a prompt of 3 tokens leaves room for 125 in the"),
        ({"draft": str(tmp_path / "small.safetensors")}, "counted over 10 token ids; the target has 160"),
        ({"draft": str(tmp_path / "none")}, "does not exist"),
        ({"draft": str(tmp_path / "none.safetensors")}, "there is no n-gram store"),
        ({"draft": "nowhere.txt", "ngram": True}, "are no file, no folder and no bundled name"),
        ({"draft": tiny_model("bert", layers=1)}, "no causal language model"),
    ]
    for fields, says in refused:
        with pytest.raises(IntaglioError, match=says) as caught:
            model.generate(ids, max_new_tokens=20, do_sample=False, custom_generate=DySpec(**fields))
        assert "\n" not in str(caught.value)
    nameless = tiny_model("llama", layers=1)
    with pytest.raises(IntaglioError, match="is text and the target's tokenizer is not known"):
        nameless.generate(ids, max_new_tokens=2, custom_generate=DySpec(draft=str(text), ngram=True))
    found = model.generate(ids, max_new_tokens=9, do_sample=False, custom_generate=DySpec(draft=str(text), ngram=True))
    assert torch.equal(found, model.generate(ids, max_new_tokens=9, do_sample=False))


def test_the_default_budget_fits_into_what_the_context_has_left() -> None:
    model = target("llama")
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None}
    found = model.generate(prompt(123), custom_generate=DySpec(draft=model), **options)
    assert torch.equal(found, model.generate(prompt(123), **options))


def test_drafts_by_name_are_loaded_once_for_a_target(tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch) -> None:
    model, loaded = load(tiny_dir("llama"), dtype="float64").model, Counter[str]()

    def noted(name: str, **options: Any) -> Checkpoint:
        loaded[f"{Path(name).name} {options['dtype']}"] += 1
        return load(name, **options)

    monkeypatch.setattr("intaglio.methods.decoding.dyspec.load", noted)
    decoder = DySpec(draft=Path(tiny_dir("llama")))
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    for _ in range(2):
        model.generate(torch.tensor([[5, 6, 7]]), custom_generate=decoder, **options)
    assert loaded.total() == 1
    assert next(iter(loaded)).endswith("float64")
    assert decoder.statistics.lengths[0] >= 1  # itself


def test_streaming_and_a_loop_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = tiny_model("llama", layers=2, dtype=torch.float64), tiny_tokenizer("llama")
    decoder = DySpec(draft=model, streamer=TextStreamer(tokenizer, skip_prompt=True))
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8}
    found = model.generate(prompt(5), custom_generate=decoder, **options)
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(found[0, 5:]).rstrip("\n")
    again = model.generate(prompt(5), custom_generate=Speculative(DySpec(draft=model)), **options)
    assert torch.equal(found, again)


def test_no_row_sees_another() -> None:
    """Trees of a row are the same alone and in a batch, whatever the others do."""
    model, draft = target("llama"), cousin("llama")
    whole = ragged([5, 9, 7])
    seen: dict[str, list[Any]] = {}
    for name, inputs in (("batch", whole), ("alone", {"input_ids": whole["input_ids"][1:2]})):
        steps: list[Any] = []
        decoder = DySpec(draft=draft, draw="sample", budget=5, on_step=steps.append)
        options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
        model.generate(**inputs, custom_generate=decoder, **options)
        row = 1 if name == "batch" else 0
        seen[name] = [list(s.tree.tokens) for s in steps if s.row == row and s.tree is not None]
    assert seen["batch"] == seen["alone"]


def test_rows_that_have_ended_are_left_out() -> None:
    model, draft = target("llama"), cousin("llama")
    inputs = ragged([6, 4, 9], seed=5)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0}
    free = model.generate(**inputs, eos_token_id=None, **options)
    stops = [int(free[0, 9 + 3]), int(free[2, 9 + 8])]
    expected = model.generate(**inputs, eos_token_id=stops, **options)
    found = model.generate(**inputs, eos_token_id=stops, custom_generate=DySpec(draft=draft, budget=9), **options)
    assert torch.equal(found, expected)


def said(tokens: Sequence[int], path: Sequence[int], tree: TokenTree | None) -> Any:
    return SimpleNamespace(row=0, tokens=tokens, path=path, tree=tree, drafted=len(tokens) - 1, hidden=None)


def test_a_step_without_room_leaves_the_draft_where_it_is() -> None:
    model = target("llama")
    run = SimpleNamespace(model=model, prompts=((5, 6, 7),), sampling=False, config=model.generation_config, limit=9,
                          generator=None, prepack=False, branches=True)  # fmt: skip
    session = DySpec(draft=model, budget=2).start(run)  # type: ignore[arg-type]
    session.observe([said([8], [], None)])
    tree = session.propose([0], [0])[0]
    assert list(tree.tokens) == [8]
    session.observe([said([9], [0], tree)])
    tree = session.propose([0], [5])[0]
    greedy = model.generate(torch.tensor([[5, 6, 7, 8, 9]]), do_sample=False, max_new_tokens=1, eos_token_id=None)
    assert list(tree.tokens)[:2] == [9, int(greedy[0, -1])]
