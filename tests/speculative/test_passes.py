"""What makes a pass cheap changes nothing: grouped heads are not repeated, and the cache has room behind its rows."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from intaglio.speculative import tree_attention
from intaglio.speculative.cache import ROOM, drop_last, is_windowed, preallocated_cache
from intaglio.speculative.statistics import Statistics
from intaglio.speculative.target_model import CachedModel, format_mask, stack
from intaglio.speculative.tree import TokenTree
from tests.speculative.toys import prompt, target

TREE = TokenTree([5, 6, 7, 8, 9, 10], [-1, 0, 0, 1, 1, 2])


@pytest.mark.parametrize("family", ["llama", "qwen3_window", "gemma3", "phi3"])
def test_grouped_heads_are_read_as_they_are_with_the_same_bits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = target(family)
    logits = {}
    for configs in (tree_attention.configs(model, model.device), []):
        assert len(configs) <= 1
        monkeypatch.setattr("intaglio.speculative.target_model.configs", lambda *_, configs=configs: configs)
        cached = CachedModel(model)
        with torch.inference_mode():
            cached.prefill(prompt(13))
            seen = _count_grouped(monkeypatch)  # without a mask, stock does not repeat either
            logits[bool(configs)] = cached.extend(*stack([TREE]))
        assert (seen[0] == len(model.model.layers)) == bool(configs)
        monkeypatch.undo()
    assert torch.equal(logits[True], logits[False])
    assert model.config._attn_implementation == "sdpa"


def _count_grouped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls, stock = [0], torch.nn.functional.scaled_dot_product_attention

    def count(*args: Any, **options: Any) -> Any:
        calls[0] += bool(options.get("enable_gqa"))
        return stock(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    return calls


def test_what_the_grouped_function_does_not_understand_is_stocks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def stock(*args: Any, **options: Any) -> Any:
        asked.append(options)
        return args[1], None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", stock)
    module = target("llama").model.layers[0].self_attn
    query, key, mask = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8), torch.ones(1, 1, 3, 3, dtype=torch.bool)
    tree_attention.attend(module, query, key, key, mask, sliding_window=None, position_ids=mask, is_causal=True)
    assert not asked
    tree_attention.attend(module, query, key, key, None)
    tree_attention.attend(module, query, query, query, mask)
    tree_attention.attend(module, query, key, key, mask, position_bias=mask)
    assert [set(options) for options in asked] == [
        {"dropout", "scaling"}, {"dropout", "scaling"}, {"dropout", "scaling", "position_bias"}
    ]  # fmt: skip


def test_a_pass_that_fails_leaves_the_model_as_it_was() -> None:
    model = target("llama")
    cached = CachedModel(model)
    with pytest.raises(IndexError):
        cached.prefill(torch.tensor([[9999]]))
    assert model.config._attn_implementation == "sdpa"
    # A model that another thread is passing through is one with stock attention all the same.
    with tree_attention.grouped(tree_attention.configs(model, model.device)):
        assert CachedModel(model).implementation == "sdpa"
    assert model.config._attn_implementation == "sdpa"


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(1, 200), st.integers(0, 250), st.booleans()), min_size=1, max_size=6))
def test_a_roomy_layer_holds_what_the_stock_one_does(steps: list[tuple[int, int, bool]]) -> None:
    ours, stock = preallocated_cache(), DynamicCache()
    draws = torch.Generator().manual_seed(0)
    rows = 2
    for new, dropped, select in steps:
        keys, values = torch.randn(2, rows, 3, new, 4, generator=draws)
        found = [cache.update(keys, values, 0) for cache in (ours, stock)]
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(*found, strict=True))
        if select and rows == 2:
            rows = 1
            for cache in (ours, stock):
                cache.batch_select_indices(torch.tensor([1]))
        for cache in (ours, stock):
            cache.crop(-min(dropped, cache.get_seq_length()))
        assert ours.get_seq_length() == stock.get_seq_length()


def test_a_roomy_layer_writes_in_place_and_can_be_copied() -> None:
    cache = preallocated_cache()
    cache.update(torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 4), 0)
    place = cache.layers[0].keys.data_ptr()
    for new in (1, ROOM - 1):
        cache.update(torch.zeros(1, 2, new, 4), torch.zeros(1, 2, new, 4), 0)
        assert cache.layers[0].keys.data_ptr() == place
    other = copy.deepcopy(cache)
    cache.update(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4), 0)
    assert cache.layers[0].keys.data_ptr() != place
    assert other.get_seq_length() == 5 + ROOM
    assert torch.equal(other.layers[0].keys, cache.layers[0].keys[:, :, :-1])


def test_the_last_slots_are_dropped_and_no_more() -> None:
    config = target("mistral_window").config
    for cache in (DynamicCache(config=config), preallocated_cache()):
        layers = cache.layers
        for index in range(2):
            cache.update(torch.arange(6.0).view(1, 1, 6, 1), torch.arange(6.0).view(1, 1, 6, 1), index)
        if is_windowed(cache):
            cache.activate_past_recording()
            for index in range(2):
                cache.update(torch.arange(6.0, 10).view(1, 1, 4, 1), torch.arange(6.0, 10).view(1, 1, 4, 1), index)
        before = [layer.keys.flatten().tolist() for layer in layers[:2]]
        length = cache.get_seq_length()
        drop_last(cache.layers, 0)
        assert cache.get_seq_length() == length
        drop_last(cache.layers[1:2], 3)
        assert [layer.keys.flatten().tolist() for layer in layers[:2]] == [before[0], before[1][:-3]]
        assert (cache.get_seq_length(0), cache.get_seq_length(1)) == (length, length - 3)
        drop_last(cache.layers, 1)
        assert layers[1].values.flatten().tolist() == before[1][:-4]
    drop_last(DynamicCache(config=config).layers, 2)  # nothing is there


def test_a_mask_as_attention_takes_it() -> None:
    seen = torch.tensor([[True, False]])
    for name in ("sdpa", "intaglio_sdpa", "flex_attention"):
        assert format_mask(seen, name, torch.float32) is seen
    for name in ("eager", "intaglio_eager"):
        assert format_mask(seen, name, torch.bfloat16).tolist() == [[0.0, torch.finfo(torch.bfloat16).min]]


def test_a_pass_is_booked() -> None:
    found = Statistics()
    start = time.perf_counter()
    for rows in (3, 2):
        found.record_pass(rows, start, torch.device("cpu"))
    assert (found.passes, found.row_passes) == (2, 5)
    assert 0 < found.model_seconds <= 2 * (time.perf_counter() - start)
