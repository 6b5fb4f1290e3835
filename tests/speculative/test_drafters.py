"""The plain drafters: what they propose, that they keep the output, and that a store survives the disk."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from intaglio.errors import IntaglioError
from intaglio.speculative import DecodingRun, Speculative, Step, TokenTree
from intaglio.speculative.drafters import DraftModel, NGramStore, PromptLookup
from tests.speculative.toys import prompt, ragged, target


def session(drafter: Any, seen: list[int], first: int) -> Any:
    """A session of one row after the prefill, with `first` emitted."""
    run = DecodingRun(target("llama"), (tuple(seen),), False, target("llama").generation_config, 99)
    found = drafter.start(run)
    found.observe([Step(0, [first], 0, None, (), None, torch.zeros(1, 160), False)])
    return found


def same(found: list[tuple[int, float]], expected: list[tuple[int, float]]) -> bool:
    return found == [(token, pytest.approx(share)) for token, share in expected]


def paths(tree: TokenTree) -> set[tuple[int, ...]]:
    return {tuple(tree.tokens[n] for n in tree.path(node)[1:]) for node in range(1, len(tree))}


def test_prompt_lookup_takes_the_longest_match_and_the_latest() -> None:
    row = session(PromptLookup(nodes=9, longest=2, length=2, candidates=3), [1, 2, 3, 4, 1, 2, 5, 6, 9, 2, 7, 8, 1], 2)
    tree = row.propose([0], [9])[0]
    assert tree.tokens[0] == 2
    # (1, 2) was followed by 5 6 and before that by 3 4; (2) alone by 7 8 at last.
    assert list(tree.tokens) == [2, 5, 6, 3, 4, 7, 8]
    assert list(tree.parents) == [-1, 0, 1, 0, 3, 0, 5]
    assert paths(row.propose([0], [1])[0]) == {(5,), (3,), (7,)}
    assert len(row.propose([0], [0])[0]) == 1
    assert len(session(PromptLookup(), [1, 2, 3], 4).propose([0], [9])[0]) == 1


@given(
    st.lists(st.lists(st.integers(0, 4), max_size=12), max_size=5).filter(lambda texts: any(len(t) > 1 for t in texts))
)
def test_a_store_counts_what_follows_each_context(texts: list[list[int]]) -> None:
    store = NGramStore.build(texts, 160, order=3, top=3)
    counts: dict[tuple[int, ...], collections.Counter[int]] = collections.defaultdict(collections.Counter)
    for text in texts:
        for n in (1, 2):
            for place in range(len(text) - n):
                counts[tuple(text[place : place + n])][text[place + n]] += 1
    for context, following in counts.items():
        best = sorted(following.items(), key=lambda pair: (-pair[1], pair[0]))[:3]
        expected = [(token, count / following.total()) for token, count in best]
        assert same(store.following(context), expected)
    # An unknown context of two falls back to one token, at 0.4 of its value.
    for last in range(5):
        if (150, last) not in counts and (last,) in counts:
            expected = [(token, 0.4 * share) for token, share in store.following([last])]
            assert same(store.following([150, last]), expected)


def test_a_store_grows_its_tree_best_first() -> None:
    store = NGramStore.build([[1, 2, 3, 1, 2, 3, 1, 2, 4, 1, 5]], 160, order=2, nodes=4)
    tree = session(store, [9, 9], 1).propose([0], [8])[0]
    # After 1: 2 (3 of 4), 5 (1 of 4); after 2: 3 (2 of 3), 4; after 3: 1 always. 2 .75, 2 3 .5, 2 3 1 .5, 2 3 1 2 .375.
    assert list(tree.tokens) == [1, 2, 3, 1, 2]
    assert list(tree.parents) == [-1, 0, 1, 2, 3]
    assert len(session(store, [9], 77).propose([0], [8])[0]) == 1


def test_a_store_is_bounded_and_keeps_the_frequent() -> None:
    rng = np.random.default_rng(0)
    texts = [rng.zipf(1.3, 400) % 150 for _ in range(20)]
    whole, small = NGramStore.build(texts, 160), NGramStore.build(texts, 160, contexts=50, top=2)
    for table, full in zip(small.tables, whole.tables, strict=True):
        assert table["following"].shape == (50, 2)
        # What was given up while counting is missing from the totals, never from the most frequent pair.
        assert table["totals"].max() <= full["totals"].max()
        assert table["keys"][table["totals"].argmax()] == full["keys"][full["totals"].argmax()]
        assert table["counts"].max() == full["counts"].max()


def test_a_store_survives_the_disk_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.safetensors"
    store = NGramStore.build([prompt(60, seed)[0].tolist() for seed in range(3)], 160)
    store.save(path)
    again = NGramStore.load(path, nodes=3)
    assert (again.vocabulary, again.nodes) == (160, 3)
    for mine, theirs in zip(again.tables, store.tables, strict=True):
        assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)
    before = path.read_bytes()
    again.save(path)
    assert path.read_bytes() == before
    with pytest.raises(IntaglioError, match="there is no n-gram store"):
        NGramStore.load(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(IntaglioError, match="is no n-gram store"):
        NGramStore.load(tmp_path / "text")
    save_file(load_file(path), tmp_path / "plain")
    with pytest.raises(IntaglioError, match="is no n-gram store"):
        NGramStore.load(tmp_path / "plain")


@pytest.mark.parametrize(
    ("texts", "options", "sentence"),
    [
        ([[1, 2, 200]], {}, "the token id 200; the vocabulary has the ids 0 to 159"),
        ([[-1, 2]], {}, "the token id -1"),
        ([[1], []], {}, "no two tokens in a row"),
        ([[1, 2]], {"order": 1}, "order is 1"),
        ([[1, 2]], {"order": 12}, "with a vocabulary of 160 at most 8 fits"),
        ([[1, 2]], {"top": 0}, "top is 0"),
        ([[1, 2]], {"nodes": 0}, "nodes is 0"),
    ],
)
def test_corpora_and_settings_that_make_no_store(
    texts: list[list[int]], options: dict[str, int], sentence: str
) -> None:
    with pytest.raises(IntaglioError, match=sentence):
        NGramStore.build(texts, 160, **options)


DRAFTS = {
    "lookup": lambda: PromptLookup(),
    "store": lambda: NGramStore.build([prompt(80, seed)[0].tolist() for seed in range(3)], 160),
    "other model": lambda: DraftModel(target("mistral"), (2, 2)),
    "the target": lambda: DraftModel(target("llama"), (1, 1, 1)),
    "the target, a tree": lambda: DraftModel(target("llama"), (2, 1, 2)),
    "sure only": lambda: DraftModel(target("llama"), (2, 1, 2), confidence=0.5),
    "a windowed draft": lambda: DraftModel(target("gemma3"), (1, 2)),
}


@pytest.mark.parametrize("name", DRAFTS)
def test_every_drafter_keeps_greedy_output(name: str) -> None:
    model = target("llama")
    for inputs in ({"input_ids": prompt(9)}, ragged([4, 9, 2])):
        options = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": [2, 15, 33, 60], "pad_token_id": 0}
        expected = model.generate(**inputs, **options)
        for _ in range(2):  # no state of the first run may show in the second
            decoder = Speculative(DRAFTS[name]())
            assert torch.equal(model.generate(**inputs, custom_generate=decoder, **options), expected)
        if name == "the target" and "attention_mask" not in inputs:
            assert decoder.statistics.lengths[:-1] == [3] * (len(decoder.statistics.lengths) - 1)


@settings(max_examples=5)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_a_target_that_drafts_for_itself_is_always_accepted(seed: int, widths: list[int]) -> None:
    """The draft's cache, masks and positions are then right, step after step; sampling accepts a first child always."""
    model = target("mistral_window")
    for sampling in (False, True):
        decoder = Speculative(DraftModel(model, widths), generator=torch.Generator().manual_seed(seed))
        options = {"max_new_tokens": 13, "do_sample": sampling, "eos_token_id": None, "pad_token_id": 0}
        model.generate(**ragged([5, 11], seed), custom_generate=decoder, **options)
        rooms = [min(len(widths), 12 - done) for done in range(0, 12, len(widths) + 1)]
        assert decoder.statistics.lengths == [room for room in rooms for _ in range(2)]


def test_drawn_children_come_with_their_law_in_the_order_drawn() -> None:
    model = target("llama")
    steps: list[Step] = []
    decoder = Speculative(DraftModel(target("mistral"), (3, 2), temperature=0.5), on_step=steps.append)
    model.generate(prompt(6), custom_generate=decoder, do_sample=True, max_new_tokens=9, eos_token_id=None, top_k=20)
    trees = [step.tree for step in steps if step.tree is not None and len(step.tree) > 1]  # the last may have no room
    assert trees
    for tree in trees:
        assert tree.q is not None
        for node, law in tree.q.items():
            tokens = [tree.tokens[child] for child in tree.children[node]]
            assert len(set(tokens)) == len(tokens)
            assert bool((law[tokens] > 0).all())
            assert int((law > 0).sum()) <= 20
            assert float(law.sum()) == pytest.approx(1, abs=1e-5)
