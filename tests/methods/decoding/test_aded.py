"""ADED: the table, the adaptation, the search and the draft as the card has them, and output that is the target's."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.streamers import TextStreamer

from intaglio.checkpoint import Checkpoint, load
from intaglio.data.texts import Corpus
from intaglio.errors import IntaglioError
from intaglio.methods.decoding.aded import ADED, ADEDRow, ADEDSession, Table
from intaglio.methods.decoding.aded.adaptive_table import AdaptiveTable
from intaglio.methods.decoding.aded.search import (
    best_first,
    full,
    greedy,
    mcts,
    most_visited,
    path_probs,
    puct,
    trim,
)
from intaglio.speculative.loop import Speculative
from intaglio.speculative.pass_cost import prune_by_cost
from intaglio.speculative.target_model import CachedModel, stack
from intaglio.speculative.tree import TokenTree, trie
from tests.alive import alive, drafted
from tests.conftest import TinyDir
from tests.families import DECODERS, VOCAB, tiny_model, tiny_tokenizer
from tests.speculative.test_sampling import p_value

EXAMPLES = (
    {},
    {"search": "best", "nodes": 7},
    {"trim": "distinct", "draft_cost": 0.0, "token_cost": 0.0, "carry_over": True},
)
CORPUS = [Random(n).choices(range(4, 12), k=60) for n in range(6)]
BASE: dict[str, Any] = {"corpus": CORPUS}
ALIVE = {
    "corpus": None,
    "entries": 20,
    "discount": 0.0,
    "top": 1,
    "adaptive": False,
    "prompt": 0,
    "window": 3,
    "boost": 0.04,
    "cap": 0.1,
    "carry_over": True,
    "search": "best",
    "reward": "official",
    "iterations": 4,
    "length": 2,
    "c1": 1.0,
    "c2": alive(0.01, c1=1.0),
    "candidates": 3,
    "trim": alive("distinct", choices=3),
    "choices": alive(3, trim="distinct"),
    "nodes": 2,
    "draft_cost": 5.0,
    "token_cost": 0.3,
    "seed": 1,
}


def observe(method: ADED) -> Any:
    model = tiny_model("llama", layers=1, vocab_size=12, eos_token_id=None, dtype=torch.float64)
    return drafted(method, model, prompt=[5, 6, 7, 5, 6, 8, 5, 6, 7])


V = 10
a, b, c, d, e = range(1, 6)
SEQUENCES = st.lists(st.lists(st.integers(0, V - 1), max_size=30), min_size=1, max_size=5)
CHAIN = [[1, 2, 3, 4, 5, 6, 7, 8]]


def key(first: int, second: int) -> int:
    return first * V + second


def adaptive_table(sequences: Sequence[Sequence[int]], top: int = 12) -> AdaptiveTable:
    long_enough = [ids for ids in sequences if len(ids) > 2]
    return AdaptiveTable(Table.build(long_enough, V) if long_enough else Table.empty(V), top)


def drafting(settings: ADED, prompt: Sequence[int], corpus: Sequence[Sequence[int]] = ()) -> ADEDRow:
    table = Table.build(corpus, V) if corpus else Table.empty(V)
    return ADEDRow(settings, table, prompt)


def said(*tokens: int) -> Any:
    return SimpleNamespace(tokens=tokens, drafted=0)


# --- the table -------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(SEQUENCES)
def test_the_table_is_the_shares_of_what_followed(sequences: list[list[int]]) -> None:
    counts: dict[int, Counter[int]] = {}
    for ids in sequences:
        for x, y, z in zip(ids, ids[1:], ids[2:], strict=False):
            counts.setdefault(key(x, y), Counter())[z] += 1
    if not counts:
        with pytest.raises(IntaglioError, match="no three tokens in a row"):
            Table.build(sequences, V)
        return
    table = Table.build(sequences, V)
    assert table.keys_R.tolist() == sorted(counts)
    for pair, found in counts.items():
        total = sum(found.values())
        expected = sorted(((-count, token) for token, count in found.items()))
        tokens, weights = table.row(pair, 99)
        assert tokens == [token for _, token in expected]
        assert weights == pytest.approx([-count / total for count, _ in expected], rel=1e-6)
        # The front of a row, not renormalised.
        assert table.row(pair, 2) == (tokens[:2], weights[:2])
    unknown = next(pair for pair in range(V * V + 1) if pair not in counts)
    assert table.row(unknown, 99) == ([], [])


def test_twelve_successors_are_taken_and_learnt_rows_grow_beyond() -> None:
    table = Table.build([[1, 2, token] for token in range(20)], 20)
    found = AdaptiveTable(table, ADED().top)
    row = found.row(22)
    assert row is not None
    assert (len(row.tokens), sum(row.weights)) == (12, pytest.approx(12 / 20))
    for token in range(12, 16):
        found.boost(22, token, 0.04, 3.0)
    row = found.row(22)
    assert row is not None
    assert len(row.tokens) == 16
    assert row.weight(13) == pytest.approx(0.04)


@settings(max_examples=40)
@given(SEQUENCES)
def test_texts_in_any_order_give_the_same_table(sequences: list[list[int]]) -> None:
    sequences = [*sequences, [1, 2, 3]]
    one, other = (Table.build(order, V).arrays() for order in (sequences, sequences[::-1]))
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_bounded_table_keeps_the_most_frequent() -> None:
    sequences = [[1, 2, 3]] * 3 + [[1, 2, 4]] + [[5, 6, 7]] * 2
    table = Table.build(sequences, V, entries=2)
    assert table.row(key(1, 2), 9) == ([3], [0.75])
    assert table.row(key(5, 6), 9) == ([7], [1.0])
    assert len(table.tokens_E) == 2


def test_a_discount_trusts_what_stands_once_less() -> None:
    table = Table.build([[1, 2, 3]] * 3 + [[1, 2, 4]] + [[5, 6, 7]], V, discount=1.0)
    assert table.row(key(1, 2), 9) == ([3, 4], pytest.approx([3 / 5, 1 / 5]))
    assert table.row(key(5, 6), 9) == ([7], [0.5])


def test_a_table_comes_back_from_its_file(tmp_path: Path) -> None:
    table = Table.build([[1, 2, 3, 1, 2, 4]], V, tokenizer="t")
    table.save(tmp_path / "t.safetensors")
    back = Table.load(tmp_path / "t.safetensors")
    assert all(np.array_equal(back.arrays()[name], array) for name, array in table.arrays().items())
    assert (back.vocabulary, back.tokenizer) == (V, "t")


def test_what_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(IntaglioError, match="there is no tri-gram table"):
        Table.load(tmp_path / "none.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"123")
    with pytest.raises(IntaglioError, match=r"x\.safetensors is no tri-gram table"):
        Table.load(tmp_path / "x.safetensors")
    table = Table.build([[1, 2, 3], [2, 3, 4]], V)
    damaged = {
        "tokens": np.array([3, V], np.int32),
        "keys": table.keys_R[::-1].copy(),
        "weights": np.array([1, np.nan], np.float32),
        "starts": np.array([0, 1], np.int64),
    }
    for name, array in damaged.items():
        with pytest.raises(IntaglioError, match="f is no tri-gram table, or a damaged one"):
            Table.from_arrays(table.arrays() | {name: array}, table.about(), "f")
    with pytest.raises(IntaglioError, match="is no tri-gram table"):
        Table.from_arrays(table.arrays(), {}, "f")


# --- the adaptation --------------------------------------------------------------------------------------------------


def test_an_empty_table_learns_from_the_prompt() -> None:
    # The prompt is "a b c a b", and the target has said d.
    found = drafting(ADED.paper(), [a, b, c, a, b])
    found.observe(said(d))
    found.propose(8)
    assert found.table.learnt == {
        key(a, b): {c: 0.04, d: 0.04}, key(b, c): {a: 0.04}, key(c, a): {b: 0.04}
    }  # fmt: skip
    found.observe(said(e))
    found.propose(8)
    # Once a step while it stays in the window.
    assert found.table.learnt[key(a, b)] == {c: 0.08, d: 0.08}
    assert found.table.learnt[key(b, d)] == {e: 0.04}


def test_the_whole_prompt_is_learnt_as_if_it_had_stood_in_the_window_for_some_steps() -> None:
    prompt = [a, b, c, *[9] * 30]
    found = drafting(ADED(prompt=3), prompt).table.learnt
    assert found[key(a, b)] == {c: pytest.approx(3 * 0.2)}
    assert found[key(9, 9)] == {9: 3.0}
    said_so = drafting(ADED(prompt=0), prompt[:2])
    said_so.observe(said(c))
    for _ in range(3):
        said_so.propose(8)
    assert said_so.table.learnt[key(a, b)] == {c: pytest.approx(3 * 0.2)}
    assert drafting(ADED.paper(), prompt).table.learnt == drafting(ADED(adaptive=False), prompt).table.learnt == {}


def test_a_trigram_is_boosted_as_often_as_it_stands_in_the_window() -> None:
    found = drafting(ADED.paper(), [a, a, a, a])
    found.observe(said(a))
    found.propose(0)
    assert found.table.learnt[key(a, a)][a] == pytest.approx(3 * 0.04)


def test_only_the_last_sixteen_tokens_are_boosted() -> None:
    ids = [token % V for token in range(0, 3 * 24, 3)][:23]
    found = drafting(ADED.paper(), ids)
    found.observe(said(9))
    found.propose(0)
    window = [*ids, 9][-16:]
    expected = {key(x, y) for x, y in pairwise(window[:-1])}
    assert set(found.table.learnt) == expected


def test_weights_end_at_the_cap() -> None:
    found = adaptive_table([])
    for _ in range(75):
        found.boost(key(a, b), c, 0.04, 3.0)
    assert found.learnt[key(a, b)][c] == pytest.approx(3.0)
    for _ in range(10):
        found.boost(key(a, b), c, 0.04, 3.0)
    assert found.learnt[key(a, b)][c] == 3.0


def test_without_adaptation_nothing_is_learnt() -> None:
    found = drafting(ADED.paper(adaptive=False), [a, b, c, a])
    found.observe(said(b))
    assert len(found.propose(8)) == 1
    assert found.table.learnt == {}


@settings(max_examples=40)
@given(SEQUENCES, st.lists(st.integers(0, V - 1), min_size=3, max_size=40))
def test_what_is_learnt_leaves_the_table_alone(sequences: list[list[int]], ids: list[int]) -> None:
    table = Table.build([*sequences, [1, 2, 3]], V)
    before = {name: array.copy() for name, array in table.arrays().items()}
    first = ADEDRow(ADED(), table, ids[:2])
    for token in ids[2:]:
        first.observe(said(token))
        first.propose(8)
    assert all(np.array_equal(table.arrays()[name], array) for name, array in before.items())
    # Another run knows nothing of it, and the same run again drafts the same.
    assert ADEDRow(ADED(), table, ids[:2]).table.learnt == {}
    one, other = (ADEDRow(ADED(), table, ids) for _ in range(2))
    assert (one.propose(8).tokens, one.propose(8).tokens) == (other.propose(8).tokens, other.propose(8).tokens)


# --- the search ------------------------------------------------------------------------------------------------------


def test_the_puct_number() -> None:
    assert puct(reward=1.5, visits=1, prior=0.5, parent_visits=3) == pytest.approx(
        1.5 + (32 + math.log(1.5)) * 0.5 * math.sqrt(3) / 2
    )
    assert puct(1.5, 1, 0.5, 3) == pytest.approx(15.53, abs=0.01)
    assert puct(0.0, 0, 0.5, 3) == math.inf


class Node:
    """A node of the plain search below."""

    def __init__(self, pair: int, prior: float, parent: Node | None) -> None:
        self.pair, self.prior, self.parent = pair, prior, parent
        self.children: list[Node] = []
        self.visits, self.reward = 0, 0.0


def plain_mcts(
    table: AdaptiveTable, root: int, iterations: int, length: int, reward: str, rng: Random, c1: float, c2: float
) -> list[Node]:
    """The card's words, line by line, without any thought of speed; nodes in the order they are made."""
    top, made = Node(root, 0.0, None), []
    made.append(top)
    for _ in range(iterations):
        path = [top]
        while path[-1].children and len(path) < length:
            parent = path[-1]
            path.append(max(parent.children, key=lambda x: puct(x.reward, x.visits, x.prior, parent.visits, c1, c2)))
        leaf, keys = path[-1], [node.pair for node in path]
        row = table.row(leaf.pair)
        if row is not None and len(path) < length and not leaf.children:
            pairs = zip(row.tokens, row.weights, strict=True)
            leaf.children = [Node(key(leaf.pair % V, token), weight, leaf) for token, weight in pairs]
            made += leaf.children
            path.append(leaf.children[-1])
            keys.append(path[-1].pair)
        while len(keys) < length and (row := table.row(keys[-1])) is not None:
            keys.append(key(keys[-1] % V, row.tokens[row.draw(rng.random())]))
        value = 1.0
        for before, after in pairwise(keys):
            row = table.row(before)
            assert row is not None
            value += row.weight(after % V if reward == "path" else before % V)
        for node in path:
            node.visits += 1
            node.reward += value
    return made


@settings(max_examples=40)
@given(SEQUENCES, st.integers(0, V * V - 1), st.sampled_from(["path", "official"]), st.integers(1, 6))
def test_the_search_is_the_cards(
    sequences: list[list[int]], root: int, reward: Literal["path", "official"], length: int
) -> None:
    table = adaptive_table(sequences)
    for c1 in (32.0, 0.5):
        tree = mcts(table, root, iterations=40, length=length, c1=c1, c2=8.0, reward=reward, rng=Random(3))
        plain = plain_mcts(table, root, 40, length, reward, Random(3), c1, 8.0)
        assert tree.keys == [node.pair for node in plain]
        assert tree.visits == [node.visits for node in plain]
        assert tree.rewards == pytest.approx([node.reward for node in plain])
        # The root has one visit an iteration, and no node fewer than its children together.
        assert tree.visits[0] == 40
        for node, visits in enumerate(tree.visits):
            assert visits >= sum(tree.visits[tree.first[node] : tree.end[node]])


def test_the_papers_search_visits_the_root_150_times() -> None:
    paper = ADED.paper()
    tree = mcts(
        adaptive_table([[1, 2, 3, 1, 2, 4, 1, 2]]), key(1, 2), iterations=paper.iterations, length=paper.length,
        c1=paper.c1, c2=paper.c2, reward=paper.reward, rng=Random(0),
    )  # fmt: skip
    assert tree.visits[0] == 150


def test_the_official_reward_sees_the_token_that_is_there_already() -> None:
    options: dict[str, Any] = {"iterations": 1, "length": 4, "c1": 32.0, "c2": 8.0}
    table = adaptive_table([[1, 2, 3, 4, 5]])
    assert mcts(table, key(1, 2), reward="path", rng=Random(0), **options).rewards[0] == pytest.approx(1 + 3)
    assert mcts(table, key(1, 2), reward="official", rng=Random(0), **options).rewards[0] == 1.0
    same = adaptive_table([[1, 1, 1, 1, 1, 1]])
    assert mcts(same, key(1, 1), reward="official", rng=Random(0), **options).rewards[0] == pytest.approx(1 + 3)


def test_a_table_of_single_successors_gives_one_chain() -> None:
    found = drafting(ADED.paper(adaptive=False), [1, 2], CHAIN)
    tree = found.propose(99)
    assert (list(tree.tokens), list(tree.parents)) == ([2, 3, 4, 5, 6], [-1, 0, 1, 2, 3])
    # By the search: three keys behind the root; then the most likely next token.
    table = adaptive_table(CHAIN)
    searched = mcts(table, key(1, 2), iterations=150, length=4, c1=32.0, c2=8.0, reward="path", rng=Random(0))
    assert searched.keys == [key(1, 2), key(2, 3), key(3, 4), key(4, 5)]
    assert max(most_visited(table, searched, 24), key=len) == (3, 4, 5, 6)


def test_drafts_end_where_the_table_ends() -> None:
    tree = drafting(ADED.paper(adaptive=False), [5, 6], CHAIN).propose(99)
    assert list(tree.tokens) == [6, 7, 8]
    assert len(drafting(ADED.paper(adaptive=False), [7, 8], CHAIN).propose(99)) == 1
    assert len(drafting(ADED.paper(adaptive=False), [9, 9], CHAIN).propose(99)) == 1


def test_the_most_visited_are_taken_with_their_likeliest_next() -> None:
    table = adaptive_table([[1, 2, 3, 5]] * 3 + [[1, 2, 4]])
    tree = mcts(table, key(1, 2), iterations=20, length=2, c1=32.0, c2=8.0, reward="path", rng=Random(0))
    # Root, then 3 (prior 3/4), then 4, which nothing follows.
    assert most_visited(table, tree, 24) == [(3,), (3, 5), (4,)]
    assert most_visited(table, tree, 2) == [(3,), (3, 5)]


def test_the_trim_drops_what_has_most_distinct_tokens() -> None:
    paths = [(1, 2, 3), (1,), (4, 4, 4), (1, 2, 5, 6), (7, 8)]  # 3, 1, 1, 4, 2 distinct tokens
    assert trim(paths, 11) == [(1,), (7, 8), (1, 2, 3), (4, 4, 4), (1, 2, 5, 6)]
    assert trim(paths, 10) == [(1,), (7, 8), (1, 2, 3), (4, 4, 4)]
    assert trim(paths, 6) == [(1,), (7, 8), (4, 4, 4)]
    assert trim(paths, 1) == [(1,)]


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple), max_size=12, unique=True))
def test_a_trim_fits(paths: list[tuple[int, ...]]) -> None:
    kept = trim(paths, 6)
    assert sum(len(set(path)) for path in kept) <= 6
    assert {*kept} <= {*paths}
    dropped = [len(set(path)) for path in paths if path not in kept]
    assert not dropped or not kept or min(dropped) >= max(len(set(path)) for path in kept)


def test_the_other_searches() -> None:
    table = adaptive_table([[1, 2, 3, 5]] * 3 + [[1, 2, 4, 6]])
    root = key(1, 2)
    assert greedy(table, root, 9) == [(3, 5)]
    assert greedy(table, root, 1) == [(3,)]
    assert greedy(table, key(9, 9), 9) == []
    assert full(table, root, 9, 99) == [(3,), (4,), (3, 5), (4, 6)]
    assert full(table, root, 1, 99) == [(3,), (4,)]
    assert full(table, root, 9, 3) == [(3,), (4,), (3, 5)]
    assert best_first(table, root, 9, 99) == [(3,), (3, 5), (4,), (4, 6)]
    assert best_first(table, root, 9, 2) == [(3,), (3, 5)]


def test_drafts_shrink_with_the_rows_that_share_a_pass() -> None:
    corpus = [[1, 2, 3, 5]] * 3 + [[1, 2, 4, 6]]  # 3 and 5 with 3/4, 4 and 6 with 1/4
    for count, size in ((1, 5), (4, 3), (40, 1)):
        rows = [drafting(ADED(prompt=0, adaptive=False, token_cost=0.1), [1, 2], corpus) for _ in range(count)]
        assert [len(tree) for tree in ADEDSession(rows).propose(range(count), [99] * count)] == [size] * count


def test_what_is_verified_is_worth_its_cost() -> None:
    table = adaptive_table([[1, 2, 3, 5]] * 3 + [[1, 2, 4, 6]])
    tree = trie(2, [(4, 6), (3, 5), (3, 9)], 9)  # nodes 4, 6, 3, 5, 9
    found = path_probs(table, key(1, 2), tree)
    assert found == pytest.approx([1, 0.25, 0.25, 0.75, 0.75, 0])
    # With the first costs: 1.75 tokens for 1.3, 2.5 for 1.4, 2.75 for 1.5, 3 for 1.6, 3 for 1.7.
    for costs, kept in (
        ((0.2, 0.1), [2, 4, 6, 3, 5]), ((0.2, 0.2), [2, 3, 5]), ((0.6, 0.1), [2, 4, 6, 3, 5]), ((0.0, 0.74), [2, 3, 5]),
        ((1.8, 0.1), [2]), ((0.0, 0.76), [2]),
    ):  # fmt: skip
        part = prune_by_cost(found, lambda k, draft=costs[0], token=costs[1]: 1 + draft + token * k)
        assert list(tree.subtree(part).tokens) == kept, costs


def test_what_promises_too_much_is_trusted_less_and_tried_again_later() -> None:
    row = drafting(ADED(adaptive=False, discount=0.0, length=3, draft_cost=0.35, token_cost=0.04), [1, 2], CHAIN)
    sizes = []
    for _ in range(60):  # the table is sure of 3, 4, 5, and never right
        sizes.append(len(row.propose(9)))
        row.observe(said(1, 2))
    assert sizes[0] > 1
    assert 1 in sizes[:5]
    quiet = sizes.index(1)
    assert any(size > 1 for size in sizes[quiet:])
    assert sum(size > 1 for size in sizes) < 20


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), max_size=12),
    st.floats(0, 2),
    st.floats(0, 0.5),
    st.randoms(use_true_random=False),
)
def test_the_verified_part_is_the_best_of_all_parts(
    paths: list[tuple[int, ...]], draft_cost: float, token_cost: float, draws: Random
) -> None:
    tree = trie(9, paths, 7)
    likely = [1.0]
    for node in range(1, len(tree)):
        likely.append(likely[tree.parents[node]] * draws.random())

    def worth(nodes: Sequence[int]) -> float:
        return (1 + sum(likely[node] for node in nodes)) / (1 + (draft_cost + token_cost * len(nodes) if nodes else 0))

    parts = [
        part
        for count in range(len(tree))
        for part in combinations(range(1, len(tree)), count)
        if all(tree.parents[node] in (0, *part) for node in part)
    ]
    root, *nodes = prune_by_cost(likely, lambda k: 1 + draft_cost + token_cost * k)
    assert root == 0
    assert tuple(nodes) in parts
    assert worth(nodes) == pytest.approx(max(map(worth, parts)))


@settings(max_examples=40)
@given(SEQUENCES, st.lists(st.integers(0, V - 1), min_size=2, max_size=20), st.data())
def test_a_draft_stays_in_its_bounds(sequences: list[list[int]], ids: list[int], data: st.DataObject) -> None:
    found = ADED(
        search=data.draw(st.sampled_from(["mcts", "greedy", "full", "best"])),
        trim=data.draw(st.sampled_from(["visits", "distinct"])),
        nodes=data.draw(st.integers(1, 20)),
        length=data.draw(st.integers(1, 5)),
        choices=data.draw(st.integers(1, 20)),
        draft_cost=data.draw(st.sampled_from([0.0, 0.3])),
    )
    tree = drafting(found, ids, [*sequences, [1, 2, 3]]).propose(99)
    assert tree.tokens[0] == ids[-1]
    assert len(tree) <= found.nodes + 1
    assert max(tree.depths) <= found.length
    paths = [tuple(tree.tokens[n] for n in tree.path(node)) for node in range(len(tree))]
    assert len(set(paths)) == len(paths)


# --- the target's own output -----------------------------------------------------------------------------------------

PROMPT = [9, 30, 31, 32, 9, 30, 31, 32, 9, 30]
FREE: dict[str, Any] = {"draft_cost": 0.0, "token_cost": 0.0}
"""Verify whatever is drafted."""
TABLES: dict[str, Any] = {
    "none": None,
    "adversarial": [[x, y, z] for x in range(9, 40, 7) for y in range(9, 40, 3) for z in (5, 6, 7)],
}


@pytest.mark.parametrize("family", DECODERS)
def test_greedy_output_is_stock_for_any_table(family: str) -> None:
    model = tiny_model(family, layers=2, dtype=torch.float64)
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    expected = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=14)
    own = [row[mask_row.bool().tolist().index(True) :].tolist() for row, mask_row in zip(expected, mask, strict=False)]
    for corpus in (*TABLES.values(), own):
        decoder = ADED(corpus=corpus, **FREE)
        found = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=14, custom_generate=decoder)
        assert torch.equal(found, expected)
        if corpus is own:  # a table of the output itself is mostly right
            assert decoder.statistics.tokens_per_pass > 1.5
            assert decoder.statistics.accepted > 0


@pytest.mark.parametrize("search", ["greedy", "full", "best"])
@pytest.mark.parametrize("constants", ["ours", "paper"])
def test_every_variant_is_lossless(search: Any, constants: str) -> None:
    model = tiny_model("llama", layers=2, dtype=torch.float64)
    ids = torch.tensor([PROMPT])
    expected = model.generate(ids, do_sample=False, max_new_tokens=14)
    make = ADED.paper if constants == "paper" else ADED
    decoder = make(corpus=expected.tolist(), search=search, reward="official", carry_over=True)
    for _ in range(2):
        assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=14, custom_generate=decoder), expected)
    assert decoder.statistics.accepted > 0


WARPS: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "temperature": ({"temperature": 1.5}, [TemperatureLogitsWarper(1.5)]),
    "top_k": ({"temperature": 1.2, "top_k": 5}, [TemperatureLogitsWarper(1.2), TopKLogitsWarper(5)]),
    "top_p": ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
}


@pytest.mark.parametrize(
    ("warp", "draws"),
    [("temperature", 1_000), *(pytest.param(warp, 40_000, marks=pytest.mark.slow) for warp in WARPS)],
)
def test_sampling_keeps_the_joint_law_of_the_first_two_tokens(warp: str, draws: int) -> None:
    model = tiny_model("llama", layers=1, vocab_size=8, dtype=torch.float64, eos_token_id=None)
    ids, rows = torch.tensor([[3, 4, 5, 3, 4]]), 250
    given, warps = WARPS[warp]
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} | given
    law = _joint_law(model, ids, LogitsProcessorList(warps)).reshape(-1)
    counts = np.zeros(64)
    # A small search: what is drafted matters little here, as long as it branches.
    decoder = ADED(corpus=[[4, x, y] for x in range(8) for y in range(8)], iterations=8, length=2, **FREE)
    accepted = 0
    torch.manual_seed(0)
    for _ in range(draws // rows):
        found = model.generate(ids.expand(rows, -1), max_new_tokens=3, custom_generate=decoder, **options)
        counts += np.bincount((found[:, 5] * 8 + found[:, 6]).numpy(), minlength=64)
        accepted += decoder.statistics.accepted
    assert accepted > draws / 10
    assert p_value(counts, law) > 1e-4


@torch.no_grad()
def _joint_law(model: Any, ids: torch.Tensor, warps: LogitsProcessorList) -> np.ndarray:
    """Of the first two new tokens [V, V]."""
    after = torch.cat([ids.expand(8, -1), torch.arange(8)[:, None]], 1)
    laws = [torch.softmax(warps(seen, model(seen).logits[:, -1].float()), -1).double() for seen in (ids, after)]
    joint: np.ndarray = (laws[0][0][:, None] * laws[1]).numpy()
    return joint


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_logits_of_a_node_are_its_paths(family: str) -> None:
    model = tiny_model(family, layers=2, dtype=torch.float64)
    table = Table.build([[30, x, y] for x in (5, 6, 7) for y in (8, 9)] + [[9, 30, 5], [9, 30, 6], [9, 30, 7]], VOCAB)
    tree: TokenTree = ADEDRow(ADED.paper(adaptive=False), table, PROMPT).propose(99)
    assert len(tree) > 6
    cached = CachedModel(model)
    with torch.inference_mode():
        cached.prefill(torch.tensor([PROMPT[:-1]]), None)
        logits = cached.forward(cached.prepare_inputs(*stack([tree])))[0]
        for node in range(len(tree)):
            ids = [*PROMPT[:-1], *(tree.tokens[n] for n in tree.path(node))]
            assert torch.allclose(logits[node], model(torch.tensor([ids])).logits[0, -1], atol=1e-9)


# --- how it is called ------------------------------------------------------------------------------------------------


def test_nothing_leaks_from_run_to_run_unless_asked() -> None:
    model = tiny_model("llama", layers=2, dtype=torch.float64)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10}
    passes = {}
    for carry in (False, True):
        decoder = ADED(carry_over=carry, **FREE)
        for _ in range(3):
            model.generate(torch.tensor([PROMPT]), custom_generate=decoder, **options)
            passes.setdefault(carry, []).append(decoder.statistics.passes)
    assert len(set(passes[False])) == 1
    assert passes[True][2] < passes[True][0] == passes[False][0]


def test_texts_are_read_by_the_targets_tokenizer(tiny_dir: TinyDir, tmp_path: Path) -> None:
    checkpoint = load(tiny_dir("llama"))
    texts = ["the quick brown fox jumps over the lazy dog", "and then the dog sleeps in the sun"]
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(texts))
    tokenizer, model = checkpoint.tokenizer, checkpoint.model
    expected = Table.build([tokenizer(text)["input_ids"] for text in texts], VOCAB, discount=ADED().discount).arrays()
    ids = [tokenizer(text)["input_ids"] for text in texts]
    table = Table.build(ids, VOCAB, discount=ADED().discount)
    table.save(tmp_path / "t.safetensors")
    # The model knows where its tokenizer is; one in memory does not, and is told.
    for decoder in (
        ADED(corpus=texts), ADED(corpus=Corpus("mine", tuple(texts))), ADED(corpus=texts, tokenizer=tokenizer),
        ADED(corpus=ids), ADED(corpus=[np.array(row) for row in ids]), ADED(corpus=[torch.tensor(row) for row in ids]),
        ADED(corpus=table), ADED(corpus=tmp_path / "t.safetensors"),
    ):  # fmt: skip
        found = decoder.table(model).arrays()
        assert all(np.array_equal(found[name], array) for name, array in expected.items())
        assert decoder.table(model) is decoder.table(model)
    assert len(ADED(corpus=str(path)).table(model)) > 0
    assert len(ADED().table(model)) == 0


def test_a_corpus_of_another_tokenizer_is_refused(tiny_dir: TinyDir) -> None:
    model = load(tiny_dir("llama")).model
    small = tiny_model("llama", layers=1, vocab_size=50)
    texts = ["the quick brown fox jumps"]
    with pytest.raises(
        IntaglioError, match="the token id 160; the vocabulary has the ids 0 to 159, so it was made with"
    ):
        ADED(corpus=[[1, 2, 160]]).table(model)
    with pytest.raises(
        IntaglioError, match="counted over 10 token ids; the target has 160, so it was made with another"
    ):
        ADED(corpus=Table.build([[1, 2, 3]], 10)).table(model)
    with pytest.raises(IntaglioError, match=r"has ids up to 15.; the target has 50, so it is another model's"):
        ADED(corpus=texts, tokenizer=tiny_tokenizer("llama")).table(small)
    with pytest.raises(IntaglioError, match="is text and the target's tokenizer is not known; give tokenizer="):
        ADED(corpus=texts).table(small)
    other = Table.build([[1, 2, 3]], VOCAB, tokenizer="another")
    with pytest.raises(IntaglioError, match="counted with another tokenizer than the target's"):
        ADED(corpus=other, tokenizer=tiny_tokenizer("llama")).table(model)
    with pytest.raises(IntaglioError, match="no three tokens in a row"):
        ADED(corpus=[[1, 2]]).table(model)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"corpus": 3}, "a corpus cannot be int"),
        ({"corpus": []}, "the corpus is empty"),
        ({"corpus": ["a", [1]]}, r"corpus\[0\] is neither a text nor token ids"),
        ({"corpus": [[1.5]]}, r"corpus\[0\] is neither"),
        ({"nodes": 0}, "greater than or equal to 1"),
        ({"search": "beam"}, "'mcts', 'greedy', 'full' or 'best'"),
        ({"boost": 0.0}, "greater than 0"),
        ({"streamer": "x"}, "instance of BaseStreamer"),
    ],
)
def test_settings_that_are_wrong(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        ADED(**fields)


def test_the_papers_constants() -> None:
    paper = ADED.paper(seed=3)
    assert (paper.iterations, paper.length, paper.candidates, paper.choices, paper.nodes) == (150, 4, 24, 64, 64)
    assert (paper.boost, paper.cap, paper.window, paper.top) == (0.04, 3.0, 16, 12)
    assert (paper.c1, paper.c2, paper.trim, paper.seed) == (32.0, 8.0, "distinct", 3)
    assert (paper.prompt, paper.discount, paper.draft_cost, paper.token_cost) == (0, 0.0, 0.0, 0.0)


def test_streaming_and_the_callback(capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer, steps = tiny_model("llama", layers=2), tiny_tokenizer("llama"), []
    decoder = ADED(streamer=TextStreamer(tokenizer, skip_prompt=True), on_step=steps.append)
    found = model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=12, custom_generate=decoder)
    new = found[0, len(PROMPT) :].tolist()
    assert [token for step in steps for token in step.tokens] == new
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(new).rstrip("\n")
    assert decoder.statistics.tokens == len(new)


def test_what_the_loop_refuses_is_refused_here() -> None:
    model, ids = tiny_model("llama", layers=1), torch.tensor([PROMPT])
    with pytest.raises(IntaglioError, match="num_beams is 2"):
        model.generate(ids, num_beams=2, max_new_tokens=2, custom_generate=ADED())


def test_it_can_be_the_drafter_of_a_loop_of_ones_own() -> None:
    model, ids = tiny_model("llama", layers=1, dtype=torch.float64), torch.tensor([PROMPT])
    loop = Speculative(ADED(corpus=[PROMPT]))
    found = model.generate(ids, do_sample=False, max_new_tokens=6, custom_generate=loop)
    assert torch.equal(found, model.generate(ids, do_sample=False, max_new_tokens=6))


def test_fit_notes_what_it_read() -> None:
    checkpoint = Checkpoint(tiny_model("llama", layers=1), tiny_tokenizer("llama"), "tiny")
    seen: list[int] = []
    ADED(nodes=7).fit(
        checkpoint, ["the quick brown fox"] * 2 + ["a dog"], seed=5, progress=lambda *w: seen.append(w[0])
    )
    (step,) = checkpoint.record.steps
    assert (step.slug, step.verb, step.seed, step.parameters["corpus"]) == ("aded", "fit", 5, None)
    assert step.chosen["documents"] == 2  # one stands twice
    assert seen == [0]
    with pytest.raises(IntaglioError, match="aded has no corpus to count the table in"):
        ADED().fit(checkpoint)


def test_a_fitted_table_comes_back_with_its_fields_and_overrides() -> None:
    checkpoint = Checkpoint(tiny_model("llama", layers=1), tiny_tokenizer("llama"), "tiny")
    ADED(nodes=7, window=5).fit(checkpoint, ["the quick brown fox", "a dog"])
    back, changed = checkpoint.decoder("aded"), checkpoint.decoder("aded", window=9)
    assert (back.nodes, back.window, changed.nodes, changed.window) == (7, 5, 7, 9)
    assert isinstance(back.corpus, Table)
    assert back.tokenizer is checkpoint.tokenizer
