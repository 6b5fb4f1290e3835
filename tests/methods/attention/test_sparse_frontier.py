"""SparseFrontier in models: dense at full budget, masked dense attention otherwise, batches, caches and refusals."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, StaticCache

from intaglio.checkpoint import Checkpoint, load
from intaglio.errors import IntaglioError
from intaglio.masks import Causal, set_visibility
from intaglio.methods.attention.sparse_frontier import SparseFrontier, cache_bytes, installed, named, uninstall
from intaglio.methods.attention.sparse_frontier.cache import Quest, SequenceCache, SnapKV, SparseLayer
from intaglio.methods.attention.sparse_frontier.prefill import SinkWindow
from intaglio.methods.attention.sparse_frontier.prompt_states import read_prompt
from intaglio.methods.attention.sparse_frontier.tiled_attention import kept_pairs
from intaglio.methods.base import validation_sentence
from intaglio.methods.decoding.aded import ADED
from intaglio.modeling.anatomy import CACHE, anatomy
from tests.families import DECODERS, HEADS, KV_HEADS, MAX_POSITIONS, PAD, tiny_model, tiny_tokenizer

SINK_WINDOW = {"name": "sink_window", "budget": 6, "sinks": 2, "block_size": 1}
QUEST = {"name": "quest", "budget": 8, "page_size": 4}
SNAPKV = {"name": "snapkv", "budget": 8, "num_queries": 4, "kernel_size": 3, "sinks": 1, "recent": 3}
EXAMPLES = (
    {"prefill": SINK_WINDOW, "cache": QUEST},
    {"prefill": {"name": "block_sparse", "block_size": 2, "blocks": 3}},
)
ALIVE: dict[str, object] = {"prefill": SINK_WINDOW | {"budget": 9}, "cache": SNAPKV, "layers": [0]}
FULL = 10_000
DENSE_PREFILL: dict[str, dict[str, Any]] = {
    "vertical_slash": {"columns": FULL, "offsets": FULL},
    "block_sparse": {"blocks": FULL, "block_size": 4},
    "flex_prefill": {"coverage": 1.0, "block_size": 8},
    "sink_window": {"budget": FULL},
    "random": {"budget": FULL},
    "oracle": {"budget": FULL},
}
POLICIES = ("quest", "snapkv", "ada_snapkv", "sink_window", "random", "oracle")
SPARSE_PREFILL: dict[str, dict[str, Any]] = {
    "vertical_slash": {"columns": 4, "offsets": 3, "sinks": 2, "recent": 2, "block_size": 4, "num_queries": 8},
    "block_sparse": {"blocks": 3, "block_size": 3},
    "flex_prefill": {"coverage": 0.3, "min_budget": 2, "sinks": 1, "recent": 1, "block_size": 2, "num_queries": 8},
    "sink_window": {"budget": 5, "sinks": 2, "block_size": 4},
    "random": {"budget": 6, "sinks": 1, "recent": 2, "block_size": 4},
    "oracle": {"budget": 5},
}
SPARSE_POLICY: dict[str, dict[str, Any]] = {
    "quest": {"budget": 8, "page_size": 4},
    "snapkv": {"budget": 8, "num_queries": 4, "kernel_size": 3, "sinks": 1, "recent": 3},
    "ada_snapkv": {"budget": 8, "num_queries": 4, "kernel_size": 3, "sinks": 1, "recent": 1, "min_ratio": 0.0},
    "sink_window": {"budget": 8, "sinks": 2},
    "random": {"budget": 8},
    "oracle": {"budget": 8},
}
IDS = torch.randint(8, 150, (1, 40), generator=torch.Generator().manual_seed(1))
PROMPT = 33


def observe(method: SparseFrontier) -> Any:
    """Logits of a prompt and of the tokens after it."""
    model = tiny_model("llama", layers=2)
    with method.attached(model):
        return passes(model, IDS)


@torch.no_grad()
def passes(model: Any, ids: Tensor, mask: Tensor | None = None, prompt: int = PROMPT, chunk: int = 1) -> Tensor:
    """Logits of a pass over the prompt and of passes over `chunk` tokens each, [B, T, V]."""
    cache, logits = DynamicCache(config=model.config), []
    ends = [prompt, *range(prompt + chunk, ids.shape[1] + 1, chunk)]
    for start, end in zip([0, *ends], ends, strict=False):
        seen = None if mask is None else mask[:, :end]
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)[:, start:end]
        out = model(ids[:, start:end], attention_mask=seen, position_ids=positions, **{CACHE: cache})
        logits.append(out.logits)
    return torch.cat(logits, 1)


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * max(1.0, float(b.abs().max())))


def padded(left: int, right: int = 0) -> tuple[Tensor, Tensor]:
    """Two rows, the second of them padded."""
    ids = torch.cat([IDS, IDS.roll(7, 1)])
    mask = torch.ones_like(ids)
    mask[1, :left] = 0
    if right:
        mask[1, -right:] = 0
    return ids.masked_fill(mask == 0, PAD), mask


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("name", DENSE_PREFILL)
def test_a_pattern_of_full_budget_is_dense_attention(name: str, family: str) -> None:
    """Budget >= n (V = n; K = nb; alpha = 1) equals dense attention to 1e-5; logits equal for any HF decoder."""
    ids, mask = padded(left=5)
    dense = passes(tiny_model(family), ids, mask)
    model = tiny_model(family)
    with SparseFrontier(prefill={"name": name, **DENSE_PREFILL[name]}).attached(model) as sparse:
        logits = passes(model, ids, mask)
    assert close(logits[mask.bool()], dense[mask.bool()])
    assert sparse.meter.prefill_pairs > 0
    assert sparse.meter.prefill_sparsity == 0


@pytest.mark.parametrize("family", [name for name in DECODERS if name != "mistral_window"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_of_full_budget_is_dense_attention(name: str, family: str) -> None:
    """Budget >= n (pages = all; capacity = n) equals dense attention to 1e-5; logits equal for any HF decoder."""
    ids, mask = padded(left=5)
    dense = passes(tiny_model(family), ids, mask)
    model = tiny_model(family)
    with SparseFrontier(cache={"name": name, "budget": 1024}).attached(model) as sparse:
        logits = passes(model, ids, mask)
    assert close(logits[mask.bool()], dense[mask.bool()])
    assert sparse.meter.decode_pairs > 0
    assert sparse.meter.decode_sparsity == 0


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_the_attention_implementation_below_does_not_matter(implementation: str) -> None:
    model = tiny_model("qwen3", layers=2)
    method = SparseFrontier(prefill={"name": "oracle", "budget": 5}, cache=QUEST)
    with method.attached(model):
        expected = passes(model, IDS)
    model.set_attn_implementation(implementation)
    with method.attached(model):
        assert close(passes(model, IDS), expected)
    assert model.config._attn_implementation == implementation


@contextmanager
def recorded(method: SparseFrontier, model: Any) -> Iterator[dict[tuple[int, int], Any]]:
    """Selections by layer and row; of a method with both parts the last is the cache's."""
    selected: dict[tuple[int, int], Any] = {}
    with method.attached(model) as sparse:
        sparse.observer = lambda layer, row, what, length: selected.update({(layer, row): what})
        yield selected


@pytest.mark.parametrize("family", ["llama", "mistral_window", "gpt_neox", "gemma3"])
@pytest.mark.parametrize("name", SPARSE_PREFILL)
@torch.no_grad()
def test_a_pattern_is_softmax_over_the_kept_keys(name: str, family: str) -> None:
    """Renormalisation: output = softmax restricted to kept keys; every pattern is causal, every row nonempty."""
    model = tiny_model(family, layers=1)
    method = SparseFrontier(prefill={"name": name, **SPARSE_PREFILL[name]})
    with recorded(method, model) as selected:
        logits = model(IDS).logits
        counted = installed(model).meter.prefill_computed  # type: ignore[union-attr]
    window = 8 if family in ("mistral_window", "gemma3") else None
    seen = kept_pairs(selected[0, 0], HEADS, IDS.shape[1], window)
    assert not bool(seen.triu(1).any())
    assert bool(seen.any(-1).all())
    assert 0 < int(seen.sum()) < HEADS * 40 * 41 / 2
    assert int(seen.sum()) == counted
    mask: Any = seen[None] if family != "gemma3" else dict.fromkeys(("full_attention", "sliding_attention"), seen[None])
    assert close(logits, model(IDS, attention_mask=mask).logits)


def test_patterns_and_policies_receive_scale_window_and_number_of_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    indices, keep = SinkWindow.indices, Quest.keep
    monkeypatch.setattr(SinkWindow, "indices", lambda *a: calls.append(a[3:]) or indices(*a))  # type: ignore[func-returns-value]
    monkeypatch.setattr(Quest, "keep", lambda *a: calls.append(a[3:]) or keep(*a))  # type: ignore[func-returns-value]
    model, scale = tiny_model("gemma3", query_pre_attn_scalar=32), 32**-0.5
    expected = passes(model, IDS)
    method = SparseFrontier(prefill={"name": "sink_window", "budget": FULL}, cache="quest")
    with recorded(method, model) as selected:
        assert close(passes(model, IDS), expected)
    windows = [(scale, 8, layer) for layer in range(3)]
    assert calls == [*windows, (scale, None, 3), (scale,)]
    assert selected[3, 0].layer == 3


@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize("name", ["snapkv", "ada_snapkv"])
@torch.no_grad()
def test_decoding_after_compression_is_softmax_over_the_kept_keys_and_all_new_ones(name: str, chunk: int) -> None:
    """Compression keeps decode position ids counted from the uncompressed length."""
    model = tiny_model("llama", layers=1)
    method = SparseFrontier(cache={"name": name, **SPARSE_POLICY[name]})
    with recorded(method, model) as selected:
        logits = passes(model, IDS, chunk=chunk)
    seen = torch.ones(HEADS, 40, 40, dtype=torch.bool).tril()
    for head in range(HEADS):
        kept = torch.zeros(PROMPT, dtype=torch.bool)
        kept[selected[0, 0].kept[head // (HEADS // KV_HEADS)]] = True
        seen[head, PROMPT:, :PROMPT] = kept
    assert close(logits, model(IDS, attention_mask=seen[None]).logits)


@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize("name", ["quest", "sink_window", "random", "oracle"])
@torch.no_grad()
def test_decoding_reads_a_softmax_over_what_the_policy_selects(name: str, chunk: int) -> None:
    model = tiny_model("llama", layers=1)
    policy = SparseFrontier(cache={"name": name, **SPARSE_POLICY[name]})
    rows: list[Tensor | None] = []
    kind = type(policy.cache)
    select = kind.select
    try:
        kind.select = lambda *a: rows.append(select(*a)) or rows[-1]  # type: ignore[method-assign, union-attr, func-returns-value]
        with policy.attached(model):
            logits = passes(model, IDS, chunk=chunk)
    finally:
        kind.select = select  # type: ignore[method-assign, union-attr]
    seen = torch.ones(HEADS, 40, 40, dtype=torch.bool).tril()
    unit = 4 if name == "quest" else 1
    assert len(rows) == 7
    for query, units in enumerate(rows, PROMPT):
        assert units is not None
        assert units.shape == (KV_HEADS, 8 // unit + (name == "quest"))
        for head in range(HEADS):
            keys = torch.zeros(40, dtype=torch.bool)
            for index in units[head // (HEADS // KV_HEADS)].tolist():
                keys[index * unit : (index + 1) * unit] = True
            seen[head, query] &= keys
    assert close(logits, model(IDS, attention_mask=seen[None]).logits)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("prefill", [None, {"name": "vertical_slash", **SPARSE_PREFILL["vertical_slash"]}])
def test_a_row_of_a_padded_batch_is_what_it_is_alone(name: str, prefill: Any) -> None:
    method = SparseFrontier(prefill=prefill, cache={"name": name, **SPARSE_POLICY[name]})
    ids, mask = padded(left=6)
    model = tiny_model("llama", layers=2)
    with method.attached(model):
        together = passes(model, ids, mask)
        apart = [passes(model, ids[:1]), passes(model, ids[1:, 6:], prompt=PROMPT - 6)]
    assert close(together[:1], apart[0])
    assert close(together[1:, 6:], apart[1])


@torch.no_grad()
def test_right_padding_takes_no_part() -> None:
    method = SparseFrontier(prefill={"name": "block_sparse", **SPARSE_PREFILL["block_sparse"]})
    ids, mask = padded(left=0, right=9)
    model = tiny_model("gemma3")
    with method.attached(model):
        together, alone = model(ids, attention_mask=mask).logits, model(ids[1:, :-9]).logits
    assert close(together[1:, :-9], alone)


@pytest.mark.parametrize("name", POLICIES)
def test_generate_decodes_step_by_step_and_beams_are_reordered(name: str) -> None:
    model = tiny_model("llama", layers=2)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}
    ids, mask = padded(left=4)
    for beams in (1, 3):
        dense = model.generate(ids, attention_mask=mask, num_beams=beams, **options)
        with SparseFrontier(cache={"name": name, "budget": 1024}).attached(model):
            assert torch.equal(model.generate(ids, attention_mask=mask, num_beams=beams, **options), dense)
        with SparseFrontier(cache={"name": name, **SPARSE_POLICY[name]}).attached(model) as sparse:
            out = model.generate(ids, attention_mask=mask, num_beams=beams, **options)
        assert out.shape[1] <= 48
        assert 0.5 < sparse.meter.decode_sparsity < 1


@pytest.mark.parametrize("name", ["snapkv", "ada_snapkv"])
def test_compression_frees_the_prompts_keys(name: str) -> None:
    policy = SparseFrontier(cache={"name": name, **SPARSE_POLICY[name]}).cache
    query, key, value = (torch.randn(heads, 500, 8) for heads in (HEADS, KV_HEADS, KV_HEADS))
    dropped = [weakref.ref(key), weakref.ref(value), weakref.ref(query)]
    sequence = SequenceCache(policy, query, key, value, 0.3, 0)  # type: ignore[arg-type]
    dense = key.nbytes + value.nbytes
    del query, key, value
    gc.collect()
    assert [ref() for ref in dropped] == [None] * 3
    assert sum(sequence.lengths) == 8 * KV_HEADS
    storage = {state.untyped_storage() for buffer in sequence.buffers for state in (buffer.keys, buffer.values)}
    assert sum(each.nbytes() for each in storage) + 8 * 8 * KV_HEADS == sequence.bytes
    assert sequence.bytes <= dense * (8 + 64 + 1) / 500


def test_cache_bytes_of_a_model() -> None:
    sizes = {}
    for name in ("quest", "snapkv", "ada_snapkv"):
        model, cache = tiny_model("llama", layers=2), DynamicCache()
        with SparseFrontier(cache={"name": name, **SPARSE_POLICY[name]}).attached(model), torch.no_grad():
            model(IDS.repeat(1, 3), **{CACHE: cache})
        assert [type(layer) for layer in cache.layers] == [SparseLayer] * 2
        sizes[name] = cache_bytes(cache)
    stock = DynamicCache()
    with torch.no_grad():
        tiny_model("llama", layers=2)(IDS.repeat(1, 3), **{CACHE: stock})
    assert cache_bytes(stock) == 2 * 2 * 120 * KV_HEADS * 8 * 4
    assert sizes["snapkv"] < cache_bytes(stock) < sizes["quest"]
    assert sizes["ada_snapkv"] < cache_bytes(stock)


NESTED = {
    "prefill": {
        "vertical_slash": {"columns": 6, "offsets": 5, "sinks": 3, "recent": 3, "block_size": 2, "num_queries": 3},
        "block_sparse": {"blocks": 5, "block_size": 2},
        "flex_prefill": {"coverage": 0.8, "min_budget": 9, "sinks": 2, "recent": 2, "block_size": 4, "num_queries": 3},
        "sink_window": {"budget": 9, "sinks": 3, "block_size": 2},
        "random": {"budget": 9, "seed": 3, "sinks": 3, "recent": 4, "block_size": 2},
        "oracle": {"budget": 3},
    },
    "cache": {
        "quest": {"budget": 4, "page_size": 2, "share_pages": False},
        "snapkv": {"budget": 12, "num_queries": 20, "kernel_size": 7, "sinks": 3, "recent": 6},
        "ada_snapkv": {"budget": 12, "num_queries": 20, "kernel_size": 7, "sinks": 3, "recent": 6, "min_ratio": 1.0},
        "sink_window": {"budget": 12, "sinks": 5},
        "random": {"budget": 12, "seed": 3},
        "oracle": {"budget": 3},
    },
}


@pytest.mark.parametrize(
    ("part", "name", "field"),
    [(part, name, field) for part, names in NESTED.items() for name, fields in names.items() for field in fields],
)
def test_every_setting_changes_the_logits(part: str, name: str, field: str) -> None:
    base = {"name": name, **(SPARSE_PREFILL if part == "prefill" else SPARSE_POLICY)[name]}
    runs = []
    for settings in (base, base | {field: NESTED[part][name][field]}):
        model = tiny_model("llama")
        with SparseFrontier(**{part: settings}).attached(model):
            runs.append(passes(model, IDS))
    assert not close(*runs)


def test_a_setting_that_is_not_listed_above_is_refused() -> None:
    for part, names in NESTED.items():
        for name, fields in names.items():
            settings = getattr(SparseFrontier(**{part: name}), part)
            assert set(fields) == set(type(settings).model_fields) - {"name"}


def test_defaults_are_those_of_the_study() -> None:
    settings: dict[str, Any] = {name: SparseFrontier(prefill=name).model_dump()["prefill"] for name in DENSE_PREFILL}
    tiled = {"sinks": 4, "recent": 64, "block_size": 64}
    assert settings["vertical_slash"] == tiled | {
        "name": "vertical_slash",
        "num_queries": 256,
        "columns": 512,
        "offsets": 512,
    }
    assert settings["block_sparse"] == {"name": "block_sparse", "block_size": 16, "blocks": 64}
    assert settings["flex_prefill"] == tiled | {
        "name": "flex_prefill",
        "coverage": 0.65,
        "min_budget": 512,
        "num_queries": 512,
    }
    cached: dict[str, Any] = {name: SparseFrontier(cache=name).model_dump()["cache"] for name in POLICIES}
    assert cached["quest"] == {"name": "quest", "budget": 1024, "page_size": 16, "share_pages": True}
    snapkv = {"budget": 1024, "num_queries": 256, "kernel_size": 21, "sinks": 4, "recent": 128}
    assert cached["snapkv"] == snapkv | {"name": "snapkv"}
    assert cached["ada_snapkv"] == snapkv | {"name": "ada_snapkv", "min_ratio": 0.2}
    assert {settings[name]["budget"] for name in ("sink_window", "random", "oracle")} == {1024}
    assert {cached[name]["budget"] for name in ("sink_window", "random", "oracle")} == {1024}
    assert cached["sink_window"]["sinks"] == 4


def test_the_papers_choice_is_quest_unless_a_part_is_given() -> None:
    assert SparseFrontier.paper() == SparseFrontier(cache="quest")
    assert SparseFrontier.paper(layers=[1]) == SparseFrontier(cache="quest", layers=[1])
    assert SparseFrontier.paper(prefill="oracle").cache is None


def test_names_of_the_command_line_and_their_budgets() -> None:
    assert named("quest", 64).cache.model_dump()["budget"] == 64  # type: ignore[union-attr]
    assert named("vertical_slash", 99).prefill.model_dump()["columns"] == 99  # type: ignore[union-attr]
    assert named("vertical_slash", 99).prefill.model_dump()["offsets"] == 99  # type: ignore[union-attr]
    assert named("block_sparse", 160).prefill.model_dump()["blocks"] == 10  # type: ignore[union-attr]
    assert named("flex_prefill", 77).prefill.model_dump()["min_budget"] == 77  # type: ignore[union-attr]
    assert named("ada_snapkv").cache == SparseFrontier(cache="ada_snapkv").cache
    with pytest.raises(IntaglioError, match="no sparse attention named 'quests'; did you mean quest"):
        named("quests")
    with pytest.raises(IntaglioError, match="budget 100 of snapkv: cache: budget is 100; at least the forced 4 sinks"):
        named("snapkv", 100)


@pytest.mark.parametrize(
    "fields",
    [
        {"prefill": {"name": "vertical_slash", "columns": 3}},
        {"prefill": {"name": "vertical_slash", "offsets": 63}},
        {"prefill": {"name": "flex_prefill", "min_budget": 63}},
        {"prefill": {"name": "block_sparse", "blocks": 2}},
        {"prefill": {"name": "sink_window", "budget": 4}},
        {"prefill": {"name": "random", "budget": 67}},
        {"cache": {"name": "snapkv", "budget": 131}},
        {"cache": {"name": "ada_snapkv", "budget": 131}},
        {"cache": {"name": "snapkv", "kernel_size": 4}},
        {"cache": {"name": "quest", "budget": 40}},
        {"cache": {"name": "sink_window", "budget": 4}},
        {"cache": {"name": "block_sparse"}},
        {"prefill": "quest"},
        {},
    ],
)
def test_budgets_below_the_forced_tokens_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SparseFrontier(**fields)


@pytest.mark.parametrize(
    ("cache", "sentence"),
    [
        (
            {"name": "quest", "heads": 3},
            "cache.heads: there is no such field here; accepted: budget, name, page_size, share_pages",
        ),
        ({"name": "quets"}, "cache: there is no 'quets'; did you mean quest?"),
        ({"budget": 16}, "cache: the field 'name' is missing"),
    ],
)
def test_wrong_fields_and_names_are_compared_with_those_of_the_policies(cache: Any, sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        SparseFrontier(cache=cache)
    assert validation_sentence(caught.value, SparseFrontier, {"cache": cache}) == sentence


def test_the_least_accepted_budgets() -> None:
    SparseFrontier(prefill={"name": "vertical_slash", "columns": 4, "offsets": 64})
    SparseFrontier(prefill={"name": "flex_prefill", "min_budget": 64})
    SparseFrontier(prefill={"name": "sink_window", "budget": 5})
    SparseFrontier(prefill={"name": "random", "budget": 68})
    for name in ("snapkv", "ada_snapkv"):
        SparseFrontier(cache={"name": name, "budget": 132})
    SparseFrontier(cache={"name": "sink_window", "budget": 5})


def test_a_policy_is_refused_for_layers_with_a_window() -> None:
    with pytest.raises(IntaglioError, match="layer 0 has a sliding window of 8 tokens"):
        SparseFrontier(cache="quest").install(tiny_model("mistral_window"))
    with pytest.raises(IntaglioError, match="layer 2 has a sliding window of 8 tokens"):
        SparseFrontier(cache="quest", layers=[2, 3]).install(tiny_model("gemma3"))
    model, cache = tiny_model("gemma3"), DynamicCache(config=tiny_model("gemma3").config)
    with SparseFrontier(cache="quest").attached(model), torch.no_grad():
        model(IDS, **{CACHE: cache})
    assert [isinstance(layer, SparseLayer) for layer in cache.layers] == [False, False, False, True]


def refused(model: Any, match: str, method: SparseFrontier, **arguments: Any) -> None:
    with method.attached(model), torch.no_grad(), pytest.raises(IntaglioError, match=match) as caught:
        model(**{"input_ids": IDS, **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fields", EXAMPLES)
def test_other_caches_and_masks_are_refused(fields: dict[str, Any]) -> None:
    model, method = tiny_model("llama"), SparseFrontier(**fields)
    static = StaticCache(config=model.config, max_cache_len=64)
    refused(model, "a StaticCache was given; sparse attention needs a plain DynamicCache", method, **{CACHE: static})
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
    refused(model, r"an attention_mask \(1, 1, 40, 40\) cannot be combined with", method, attention_mask=mask)
    longer = torch.randint(8, 150, (1, MAX_POSITIONS + 1))
    refused(model, "129 tokens are more than the 128 positions", method, input_ids=longer)
    with method.attached(model), torch.no_grad():
        assert model(longer[:, :MAX_POSITIONS]).logits.shape[1] == MAX_POSITIONS
    refused(model, "packed position_ids", method, position_ids=torch.arange(20).repeat(2)[None], use_cache=False)
    refused(model, "row 0 of the batch has no tokens", method, attention_mask=torch.zeros_like(IDS))


def test_a_cache_read_without_the_policy_is_refused() -> None:
    model, cache = tiny_model("llama"), DynamicCache()
    with torch.no_grad():
        model(IDS, **{CACHE: cache})
    refused(
        model,
        "holds 40 tokens that were read without the policy quest",
        SparseFrontier(cache="quest"),
        **{CACHE: cache},
    )


def test_speculative_decoding_is_refused_in_a_sentence() -> None:
    model = tiny_model("llama")
    with SparseFrontier(cache=QUEST).attached(model), pytest.raises(IntaglioError, match="speculative decoding"):
        model.generate(IDS, custom_generate=ADED(), max_new_tokens=4, do_sample=False)
    with pytest.raises(IntaglioError, match="cannot take tokens back"):
        SparseLayer(SnapKV(), 0).crop(-1)


def test_encoders_rules_and_another_implementation_are_refused() -> None:
    with pytest.raises(IntaglioError, match="bert is an encoder; sparse attention needs a decoder"):
        SparseFrontier(cache="quest").install(tiny_model("bert"))
    model = tiny_model("llama")
    set_visibility(model, {0: Causal()})
    with pytest.raises(IntaglioError, match="cannot be combined with visibility rules"):
        SparseFrontier(cache="quest").install(model)
    model = tiny_model("llama")
    SparseFrontier(cache="quest").install(model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(IntaglioError, match="set to 'sdpa', which drops the sparse attention"):
        model(IDS)
    uninstall(model)
    assert torch.equal(model(IDS).logits, tiny_model("llama")(IDS).logits)


def test_capped_scores_are_refused_before_any_work() -> None:
    parts = anatomy(tiny_model("gemma3", attn_logit_softcapping=20.0))
    with pytest.raises(IntaglioError, match="layer 0 of gemma3_text caps its scores or has learned sinks"):
        SparseFrontier(cache="quest").check_model(parts)


def test_a_family_without_the_attention_interface_is_refused_in_a_single_sentence(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AutoConfig.for_model("bloom", vocab_size=160, hidden_size=32, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.clear()
    with pytest.raises(IntaglioError, match="BloomModel does not call transformers' attention interface"):
        SparseFrontier(cache="quest").install(model)
    assert not caplog.records


def test_a_saved_checkpoint_decodes_the_same_and_a_second_step_replaces_the_first(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny_model("llama"), tiny_tokenizer("llama"), "tiny")
    SparseFrontier(cache=SNAPKV).apply(checkpoint)
    SparseFrontier(cache=QUEST, layers=[1, 2]).apply(checkpoint)
    expected = passes(checkpoint.model, IDS)
    checkpoint.save(tmp_path / "out")
    back = load(tmp_path / "out")
    assert close(passes(back.model, IDS), expected)
    state = installed(back.model)
    assert state is not None
    assert state.policy == SparseFrontier(cache=QUEST).cache
    assert state.cache_layers == {1, 2}
    assert back.kind == "runtime"
    assert len(back.record.live) == 1


def test_a_copied_model_keeps_its_own_installation() -> None:
    model = tiny_model("llama", layers=2)
    SparseFrontier(cache=QUEST).install(model)
    other = copy.deepcopy(model)
    uninstall(model)
    expected = passes(tiny_model("llama", layers=2), IDS)
    assert torch.equal(passes(model, IDS), expected)
    assert not torch.equal(passes(other, IDS), expected)


@pytest.mark.parametrize("name", POLICIES)
@torch.no_grad()
def test_a_prompt_that_was_read_once_serves_every_policy(name: str) -> None:
    model = tiny_model("llama", layers=2)
    method = SparseFrontier(cache={"name": name, **SPARSE_POLICY[name]})
    with method.attached(model):
        expected = passes(model, IDS)[:, PROMPT:]
    states = read_prompt(model, IDS[:, :PROMPT])
    assert states.length == PROMPT
    assert installed(model) is None
    with method.attached(model):
        cache = states.cache(method.cache)  # type: ignore[arg-type]
        logits = [model(IDS[:, i : i + 1], **{CACHE: cache}).logits for i in range(PROMPT, 40)]
    assert close(torch.cat(logits, 1), expected)


def test_layers_with_a_window_keep_their_stock_layers_after_a_recorded_prompt() -> None:
    """Policies apply to the other layers; the prompt is longer than the window."""
    model = tiny_model("gemma3")
    method = SparseFrontier(cache={"name": "quest", **SPARSE_POLICY["quest"]})
    with method.attached(model):
        expected = passes(model, IDS)[:, PROMPT:]
    states = read_prompt(model, IDS[:, :PROMPT])
    assert states.windowed
    for _ in range(2):  # a cache of its own each time
        with method.attached(model), torch.no_grad():
            cache = states.cache(method.cache)  # type: ignore[arg-type]
            logits = [model(IDS[:, i : i + 1], **{CACHE: cache}).logits for i in range(PROMPT, 40)]
        assert close(torch.cat(logits, 1), expected)


def test_a_long_window_is_read_whole_when_a_prompt_is_recorded() -> None:
    """The window is longer than the default budget of the baseline that reads it tile by tile."""
    model = tiny_model("gemma3", sliding_window=1200, max_position_embeddings=2048)
    ids = torch.randint(8, 150, (1, 1150), generator=torch.Generator().manual_seed(2))
    method = SparseFrontier(cache={"name": "quest", "budget": 1200})
    with torch.no_grad():
        expected = model(ids).logits[:, -1:]
        states = read_prompt(model, ids[:, :-1])
        with method.attached(model):
            logits = model(ids[:, -1:], **{CACHE: states.cache(method.cache)}).logits  # type: ignore[arg-type]
    assert close(logits, expected)


def test_a_prompt_is_recorded_of_one_row() -> None:
    with pytest.raises(IntaglioError, match="of one row, in a model with layers without a sliding window"):
        read_prompt(tiny_model("llama"), IDS.repeat(2, 1))
