"""Masks, positions and kept rows: node logits equal those of a plain forward of the node's own path."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache

from intaglio.errors import IntaglioError
from intaglio.speculative import TokenTree
from intaglio.speculative.target_model import CachedModel, stack
from tests.families import EXTRA_FAMILIES
from tests.speculative.toys import DESIGN_DECODERS, prompt, ragged, random_tree, target

# Norms and eager softmax compute in float32 inside a float64 model; a wrong mask moves logits by 0.1 and more.
EXACT = {"rtol": 0.0, "atol": 5e-5}


def plain(model: Any, ids: list[int]) -> torch.Tensor:
    """Logits [V] after a sequence, without a cache."""
    return model(torch.tensor([ids]), use_cache=False).logits[0, -1]


def check_nodes(model: Any, seen: list[int], tree: TokenTree, logits: torch.Tensor) -> None:
    for node in range(len(tree)):
        expected = plain(model, seen + [tree.tokens[n] for n in tree.path(node)])
        torch.testing.assert_close(logits[node], expected, **EXACT)


@torch.no_grad()
def follow(model: Any, cache: DynamicCache | None, length: int, seed: int, rounds: int = 2) -> None:
    """Read a prompt, then trees one after the other, each time keeping the path to a random node."""
    draws = random.Random(seed)
    ids = prompt(length, seed)
    cached = CachedModel(model, cache)
    seen = ids[0].tolist()
    torch.testing.assert_close(cached.prefill(ids)[0], plain(model, seen), **EXACT)
    for _ in range(rounds):
        tree = random_tree(draws, draws.randrange(160), draws.randint(0, 10))
        check_nodes(model, seen, tree, cached.extend(*stack([tree]))[0])
        path = tree.path(draws.randrange(len(tree)))
        cached.keep_rows([path])
        seen += [tree.tokens[node] for node in path]
        assert cached.cache.get_seq_length() == cached.width == len(seen)


@pytest.mark.parametrize(
    ("family", "implementation"),
    [*itertools.product(DESIGN_DECODERS, ("sdpa", "eager")), *((name, "sdpa") for name in EXTRA_FAMILIES)],
)
def test_every_node_sees_its_path_and_kept_rows_serve_the_next_tree(family: str, implementation: str) -> None:
    model = target(family, implementation)
    follow(model, None, 13, seed=1)
    follow(model, DynamicCache(config=model.config), 13, seed=2)


@settings(max_examples=8)
@given(st.integers(0, 10**6), st.integers(1, 20), st.booleans())
def test_any_tree_after_any_prompt(seed: int, length: int, own: bool) -> None:
    model = target("gemma3")
    follow(model, None if own else DynamicCache(config=model.config), length, seed, rounds=1)


@torch.no_grad()
def test_a_windowed_cache_stays_as_small_as_its_window() -> None:
    model = target("mistral_window")
    cached = CachedModel(model, DynamicCache(config=model.config))
    cached.prefill(prompt(30))
    for _ in range(3):
        tree = random_tree(random.Random(0), 5, 9)
        cached.extend(*stack([tree]))
        cached.keep_rows([tree.path(9)])
        assert all(layer.keys.shape[-2] <= 7 for layer in cached.cache.layers)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3_window", "gemma3"])
def test_rows_of_a_batch_keep_paths_of_unlike_lengths(family: str, implementation: str) -> None:
    # In float64, stock eager attention gives a fully padded query no number at all, so padding is tried in float32.
    model = target(family, implementation, torch.float64 if implementation == "sdpa" else torch.float32)
    draws = random.Random(3)
    batch = ragged([9, 2, 14], seed=4)
    cached = CachedModel(model)
    cached.prefill(batch["input_ids"], batch["attention_mask"])
    seen = [row[keep == 1].tolist() for row, keep in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    for step in range(4):
        trees = [random_tree(draws, draws.randrange(160), draws.randint(0, 8)) for _ in seen]
        logits = cached.extend(*stack(trees))
        for ids, tree, row in zip(seen, trees, logits, strict=True):
            check_nodes(model, ids, tree, row)
        paths = [tree.path(draws.randrange(len(tree))) for tree in trees]
        cached.keep_rows(paths)
        seen = [[*ids, *(tree.tokens[n] for n in path)] for ids, tree, path in zip(seen, trees, paths, strict=True)]
        if step == 1:  # the middle row has ended
            cached.select_rows([0, 2])
            seen = [seen[0], seen[2]]
        used = [length - pad for length, pad in zip(cached.lengths, cached.pads, strict=True)]
        assert used == [len(ids) for ids in seen]
        assert cached.cache.get_seq_length() == cached.width


@torch.no_grad()
def test_a_tree_read_level_by_level_equals_one_read_at_once() -> None:
    model = target("qwen3_window")
    tree = TokenTree([5, 6, 7, 8, 9], [-1, 0, 0, 1, 2])
    ids = prompt(11)
    cached = CachedModel(model)
    cached.prefill(ids)
    levels = [
        cached.extend([[5]], [[0]], [[[True]]]),
        cached.extend([[6, 7]], [[1, 1]], [[[True, True, False], [True, False, True]]]),
        cached.extend([[8, 9]], [[2, 2]], [[[True, True, False, True, False], [True, False, True, False, True]]]),
    ]
    check_nodes(model, ids[0].tolist(), tree, torch.cat(levels, 1)[0])
    assert cached.pending == 5
    cached.keep_rows([[0, 2, 4]])
    torch.testing.assert_close(
        cached.extend([[3]], [[0]], [[[True]]])[0, 0], plain(model, [*ids[0].tolist(), 5, 7, 9, 3]), **EXACT
    )


@torch.no_grad()
def test_hidden_states_are_those_after_the_final_norm() -> None:
    model = target("gemma3")
    cached = CachedModel(model, hidden=True)
    ids = prompt(6)
    cached.prefill(ids)
    expected = model(ids, output_hidden_states=True).hidden_states[-1]
    assert cached.hidden_BQD is not None
    torch.testing.assert_close(cached.hidden_BQD, expected, **EXACT)


@torch.no_grad()
def test_padding_behind_a_prompt_and_a_full_cache_are_refused() -> None:
    model = target("llama")
    ids = prompt(4)
    with pytest.raises(IntaglioError, match="pad prompts on the left"):
        CachedModel(model).prefill(ids, torch.tensor([[1, 1, 1, 0]]))
    with pytest.raises(IntaglioError, match="pad prompts on the left"):
        CachedModel(model).prefill(ids, torch.tensor([[1, 0, 1, 1]]))
    cached = CachedModel(model)
    cached.prefill(ids)
    with pytest.raises(IntaglioError, match="the cache holds 4 tokens and the input has 4"):
        CachedModel(model, cached.cache).prefill(ids)
