"""Combiner against its card: supports, exact rows, degenerate cases, costs, and generation by appending."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

import intaglio
from intaglio.checkpoint import Checkpoint, load
from intaglio.errors import IntaglioError
from intaglio.masks import (
    Causal,
    Window,
    attention_functions,
    clear_visibility,
    set_attention,
    set_visibility,
    temporary_visibility,
)
from intaglio.masks.method import Visibility
from intaglio.methods.attention.combiner import Combiner
from intaglio.methods.attention.combiner.functional import document_rows
from intaglio.methods.attention.combiner.grid import Tokens
from intaglio.methods.attention.combiner.layers import CombinerAttention, CombinerCacheLayer, LayerConfig
from intaglio.modeling.anatomy import CACHE, anatomy, attention
from intaglio.speculative.target_model import CachedModel
from intaglio.trainer import CausalLM, train
from tests.alive import alive
from tests.families import DECODERS, tiny_model, tiny_tokenizer

EXAMPLES = (
    {"segment": 4, "window": "drop"},
    {"variant": "logn", "window": "drop"},
    {"variant": "row_major", "segment": 3, "window": "drop"},
    {"variant": "mixture", "segment": 4, "window": "drop"},
)
BASE = {"segment": 4}
ALIVE = {
    "variant": "mixture",
    "segment": 3,
    "layers": [-1],
    "window": "drop",
    "activation": "relu",
    "pool": "mean",
    "row_summary": alive("wsum", variant="row_major"),
    "size_bias": True,
}
CAUSAL = ("fixed", "logn", "row_major", "mixture")
T = 13
IDS = torch.randint(8, 150, (3, T), generator=torch.Generator().manual_seed(3))


def observe(method: Combiner) -> Any:
    """Logits alone: the record would repeat the fields. Two layers with a window, two without."""
    kinds = ["sliding_attention", "full_attention"] * 2
    checkpoint = Checkpoint(tiny_model("gemma3", layer_types=kinds), source="tiny")
    with torch.no_grad():
        return method.apply(checkpoint).model(IDS).logits


def combined(variant: str = "fixed", family: str = "llama", *, model: Any = None, **fields: Any) -> Any:
    """Return a tiny model with Combiner in its two layers."""
    model = tiny_model(family, layers=2) if model is None else model
    own = {} if variant == "logn" else {"segment": 4}
    return Combiner(**{"variant": variant, "window": "drop", **own, **fields}).apply(Checkpoint(model)).model


def layer(variant: str, segment: int, **fields: Any) -> CombinerAttention:
    """Return an attention function in float64 for two heads of size 4 and a width of 8."""
    own = {"activation": "identity", "pool": "max", "row_summary": "wsum", "size_bias": False, **fields}
    function = CombinerAttention(LayerConfig(variant, segment, **own, head_size=4, shape=(8, 8, 8)))  # type: ignore[arg-type]
    function.draw(torch.Generator().manual_seed(1))
    return function.double().requires_grad_(False)


def random_tokens(
    function: CombinerAttention, length: int, *, value: Tensor | None = None, scale: float = 1.0
) -> Tokens:
    generator = torch.Generator().manual_seed(length)
    query, key, drawn = (scale * torch.randn(1, 2, length, 4, generator=generator).double() for _ in range(3))
    hidden = torch.randn(1, length, 8, generator=generator).double()
    value = drawn if value is None else value
    real = torch.ones(1, length, dtype=torch.bool)
    return Tokens(query, key, value, hidden, *function.activate(query, key), real)


def implied(variant: str, segment: int, length: int, **fields: Any) -> Tensor:
    """Return p(j|i) of both heads, [2, L, L]: the outputs for one-hot values."""
    scale = fields.pop("scale", 1.0)
    function, one_hot = layer(variant, segment, **fields), torch.eye(length).double().expand(1, 2, -1, -1)
    return function.form.parallel(random_tokens(function, length, value=one_hot, scale=scale))[0][0]


def direct_and_spans(variant: str, i: int, m: int, length: int) -> tuple[list[int], list[list[int]]]:
    """Return the direct tokens of query i and its spans, as the card lists them."""
    row, column, rows = i // m, i % m, -(-length // m)
    cells = [[r * m + c for c in range(m) if r * m + c < length] for r in range(rows)]
    own_row, own_column = cells[row], [line[column] for line in cells if column < len(line)]
    if variant == "fixed":
        return [j for j in own_row if j <= i], cells[:row]
    if variant == "logn":
        bits = [bit for bit in range(i.bit_length()) if i >> bit & 1]
        return [i], [list(range(((i >> bit) - 1) << bit, (i >> bit) << bit)) for bit in bits]
    if variant == "mixture":
        above = [[cells[r][t] for r in range(row)] for t in range(m) if t != column]
        sides = [part for line in cells[:row] for part in (line[:column], line[column + 1 :])]
        return [j for j in own_row if j <= i] + [j for j in own_column if j < i], [s for s in above + sides if s]
    above = [[line[t] for line in cells[:row]] for t in range(m)]
    below = [[line[t] for line in cells[row + 1 :] if t < len(line)] for t in range(m)]
    sides = [part for line in cells for part in (line[:column], line[column + 1 :])]
    return own_row + own_column, [s for s in above + below + sides if s]


def one_by_one(variant: str, x: Tokens, m: int, biased: bool = False) -> Tensor:
    """Return the outputs [H, L, D] from the card's equations, query by query."""
    outputs = []
    for query, key, value in zip(x.query[0], x.key[0], x.value[0], strict=True):
        for i in range(len(query)):
            direct, spans = direct_and_spans(variant, i, m, len(query))
            items = [(query[i] @ key[j], value[j]) for j in direct]
            for s in spans:
                inside = (query[s].amax(0) @ key[s].T).softmax(-1) @ value[s]
                bias = math.log(len(s)) if biased else 0.0
                items.append((query[i] @ key[s].amax(0) + bias, inside))
            weights = torch.stack([score for score, _ in items]).softmax(-1)
            outputs.append(weights @ torch.stack([known for _, known in items]))
    return torch.stack(outputs).view(2, -1, x.value.shape[-1])


@pytest.mark.parametrize("length", [12, 11, 5])
@pytest.mark.parametrize("variant", ["fixed", "logn", "mixture", "bidirectional_mixture"])
def test_the_blocked_form_is_the_equation(variant: str, length: int) -> None:
    for m in (3, 4):
        for biased in (False, True):
            function = layer(variant, m, size_bias=biased)
            x = random_tokens(function, length)
            expected = one_by_one(variant, x, m, biased)
            torch.testing.assert_close(function.form.parallel(x)[0][0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("summary", ["proj", "wsum", "wsum_proj", "none"])
def test_row_major_is_the_equation(summary: str) -> None:
    """k^ = W2 LN(x + W1 y), read at the query's column; the row's softmax is unmasked."""
    m, function = 3, layer("row_major", 3, row_summary=summary)
    x = random_tokens(function, 11)
    q, k, v, hidden = x.query[0], x.key[0], x.value[0], x.hidden[0]  # type: ignore[index]
    full = 9  # two more tokens are in a row that nobody reads
    rows = [slice(r, r + m) for r in range(0, full, m)]
    probs = [(q[:, s] @ k[:, s].mT).softmax(-1) for s in rows]
    y, average = (torch.cat([p @ t[:, s] for p, s in zip(probs, rows, strict=True)], 1) for t in (v, k))
    k_hat = {"wsum": average, "none": k[:, :full]}.get(summary)
    if k_hat is None:
        into = function.summary_in((y if summary == "proj" else average).transpose(0, 1).flatten(1))
        k_hat = function.summary_out(function.summary_norm(hidden[:full] + into)).view(full, 2, 4).transpose(0, 1)
    got = function.form.parallel(x)[0][0]
    for i in range(11):
        first, column = i // m * m, i % m
        earlier = list(range(column, first, m))
        scores = torch.cat([q[:, i, None] @ k[:, first : i + 1].mT, q[:, i, None] @ k_hat[:, earlier].mT], -1)
        values = torch.cat([v[:, first : i + 1], y[:, earlier]], 1)
        torch.testing.assert_close(got[:, i], (scores.softmax(-1) @ values)[:, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("m", [1, 3, 4, 12])
@pytest.mark.parametrize("variant", CAUSAL)
def test_rows_are_distributions_over_exactly_the_past(variant: str, m: int) -> None:
    """Feed v = identity: rows are nonnegative, sum to 1, positive exactly on j <= i, and 0 above the diagonal."""
    for probs in implied(variant, m, 12):
        torch.testing.assert_close(probs.sum(-1), torch.ones(12).double(), rtol=0, atol=1e-12)
        assert torch.equal(probs > 0, torch.ones(12, 12).tril() > 0)
        assert torch.equal(probs, probs.tril())


@pytest.mark.parametrize("length", [12, 11])
def test_the_bidirectional_mixture_reaches_every_token(length: int) -> None:
    for probs in implied("bidirectional_mixture", 4, length):
        torch.testing.assert_close(probs.sum(-1), torch.ones(length).double(), rtol=0, atol=1e-12)
        assert (probs > 0).all()


@pytest.mark.parametrize(
    ("variant", "m", "rows"),
    [
        ("fixed", 1, 12),
        ("fixed", 12, 12),
        ("mixture", 1, 12),
        ("mixture", 12, 12),
        ("logn", 0, 2),
        ("row_major", 12, 12),
    ],
)
def test_degenerate_cases_are_full_attention(variant: str, m: int, rows: int) -> None:
    """Fixed and mixture with m = 1 or m = L, and logn's rows 0 and 1, equal softmax attention to 1e-12."""
    function = layer(variant, m)
    x = random_tokens(function, 12)
    full = F.scaled_dot_product_attention(x.query, x.key, x.value, is_causal=True, scale=1.0)
    got = function.form.parallel(x)[0]
    torch.testing.assert_close(got[:, :, :rows], full[:, :, :rows], rtol=0, atol=1e-12)
    assert rows == 12 or not torch.allclose(got[:, :, 2], full[:, :, 2])


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_degenerate_segments_give_the_stock_logits_in_every_family(family: str) -> None:
    """m = 1 and m = L are dense attention to 1e-5, with the model's own scale of the scores."""
    own = {"query_pre_attn_scalar": 16} if family == "gemma3" else {}
    stock, ids = tiny_model(family, layers=2, **own), IDS[:, :8]  # no longer than the windows
    expected = stock(ids, use_cache=False).logits
    for variant, segment in (("fixed", 8), ("fixed", 1), ("mixture", 8)):
        got = combined(variant, segment=segment, model=copy.deepcopy(stock))(ids, use_cache=False).logits
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
def test_scores_are_divided_by_the_root_of_the_width_unless_the_model_says_otherwise() -> None:
    model = combined()
    expected = model(IDS).logits
    for block in model.model.layers:
        block.self_attn.scaling = None
    assert torch.allclose(model(IDS).logits, expected, atol=1e-6)


def test_equal_scores_give_the_cards_rows() -> None:
    """q = k = 0, L = 4, m = 2: the rows of fixed, logn and mixture."""
    common = [[1, 0, 0, 0], [0.5, 0.5, 0, 0]]
    blocks = [*common, [0.25, 0.25, 0.5, 0], [1 / 6, 1 / 6, 1 / 3, 1 / 3]]
    mixture = [*common, [0.25, 0.5, 0.25, 0], [0.4, 0.2, 0.2, 0.2]]
    for variant, rows in (("fixed", blocks), ("logn", blocks), ("mixture", mixture)):
        for probs in implied(variant, 2, 4, scale=0.0):
            torch.testing.assert_close(probs, torch.tensor(rows, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", ["fixed", "logn", "row_major"])
def test_a_span_weighs_one_token_unless_its_size_is_added(variant: str) -> None:
    """With all keys equal, full attention is not recovered; it needs + log|S|, `size_bias`."""
    even = torch.ones(12, 12).tril().double()
    even = even / even.sum(-1, keepdim=True)
    plain, biased = (implied(variant, 3, 12, scale=0.0, size_bias=bias)[0] for bias in (False, True))
    torch.testing.assert_close(biased, even, rtol=0, atol=1e-12)
    assert (plain[-1] - even[-1]).abs().max() > 0.02


@pytest.mark.parametrize("variant", [*CAUSAL, "bidirectional_mixture"])
def test_constant_values_come_out_as_they_are(variant: str) -> None:
    function = layer(variant, 3)
    constant = torch.arange(4.0).double().expand(1, 2, 11, 4)
    got = function.form.parallel(random_tokens(function, 11, value=constant))[0]
    torch.testing.assert_close(got, constant, rtol=0, atol=1e-12)


def test_values_that_are_constant_in_segments_are_averaged_by_segment() -> None:
    function = layer("fixed", 3)
    x = random_tokens(function, 12)
    x.value[:] = x.value[:, :, ::3].repeat_interleave(3, 2)
    pooled = x.key.unflatten(2, (4, 3)).amax(3)
    own = (x.query[:, :, 9:] @ x.key[:, :, 9:].mT).masked_fill(torch.ones(3, 3).triu(1) > 0, -torch.inf)
    weights = torch.cat([x.query[:, :, 9:] @ pooled[:, :, :3].mT, own.logsumexp(-1, keepdim=True)], -1).softmax(-1)
    got = function.form.parallel(x)[0][:, :, 9:]
    torch.testing.assert_close(got, weights @ x.value[:, :, ::3], rtol=0, atol=1e-12)


@pytest.mark.parametrize("pool", ["max", "mean", "sum"])
@pytest.mark.parametrize("activation", ["identity", "relu", "deepset"])
def test_pooling_is_of_activated_queries_and_keys(activation: str, pool: str) -> None:
    function = layer("fixed", 4, activation=activation, pool=pool)
    x = random_tokens(function, 8)
    query, key = x.query[:, :, :4], x.key[:, :, :4]
    if activation == "deepset":
        query, key = query @ function.query_in.weight.T, key @ function.key_in.weight.T
    if activation != "identity":
        query, key = query.clamp(min=0), key.clamp(min=0)
    q_s, k_s = (getattr(t, {"max": "amax"}.get(pool, pool))(2, keepdim=True) for t in (query, key))
    v_s = (q_s @ x.key[:, :, :4].mT).softmax(-1) @ x.value[:, :, :4]
    scores = torch.cat([x.query[:, :, 4:5] @ k_s.mT, x.query[:, :, 4:5] @ x.key[:, :, 4:5].mT], -1)
    expected = scores.softmax(-1) @ torch.cat([v_s, x.value[:, :, 4:5]], 2)
    torch.testing.assert_close(function.form.parallel(x)[0][:, :, 4:5], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pool", ["mean", "sum"])
def test_the_mixture_pools_running_spans_alike(pool: str) -> None:
    function = layer("mixture", 2, pool=pool)
    x = random_tokens(function, 6)
    _, state = function.form.parallel(x, keep=True)
    columns = x.key.unflatten(2, (3, 2))
    expected = columns.sum(2) / (3 if pool == "mean" else 1)
    torch.testing.assert_close(state.running["key"], expected, rtol=0, atol=1e-12)  # type: ignore[union-attr]


@pytest.mark.parametrize("variant", CAUSAL)
def test_one_layer_depends_on_exactly_the_past(variant: str) -> None:
    """d out_i / d x_j = 0 for j > i and nonzero for j <= i in one layer, for every head."""
    model = combined(variant, model=tiny_model("llama", layers=1))
    parts = anatomy(model)
    embeds = parts.embedding(IDS[:1]).detach().requires_grad_()
    heads: list[Tensor] = []
    parts.blocks[0].self_attn.o_proj.register_forward_pre_hook(lambda module, args: heads.append(args[0]))
    parts.base(inputs_embeds=embeds, use_cache=False)
    for i in (5, 12):
        for head in heads[0][0, i].split(8):
            (gradient,) = torch.autograd.grad(head @ torch.arange(1.0, 9.0), embeds, retain_graph=True)
            assert torch.equal(gradient[0].abs().sum(-1) > 0, torch.arange(T) <= i)


class Meter(TorchDispatchMode):
    """Counts the entries of all softmaxes, and the largest buffer in numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.untyped_storage().nbytes() // result.element_size())
            self.entries += result.numel() if func is torch.ops.aten._softmax.default else 0
        return result


@pytest.mark.parametrize("length", [256, 1024])
def test_scores_and_buffers_grow_as_the_card_says(length: int) -> None:
    """Score entries are L (m + L/m) for fixed and L (log2 L + 1) for logn; no buffer is larger."""
    m, bits = int(length**0.5), length.bit_length() - 1
    spans = {"fixed": length, "logn": length * (bits - 1), "row_major": length * m, "mixture": length * 3 * m}
    joint = {"fixed": 2 * m, "logn": bits + 1, "row_major": 2 * m, "mixture": 5 * m}
    for variant, items in joint.items():
        function = layer(variant, m)
        x = random_tokens(function, length)
        with Meter() as meter:
            function.form.parallel(x)
        assert meter.entries == 2 * (length * items + spans[variant])
        assert meter.largest <= 2 * length * max(items, 2 * 4)  # row_major: keys and values of size 4


def steps(model: Any, ids: Tensor, mask: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the logits of ids read piece by piece into one cache."""
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, logits, start = DynamicCache(config=model.config), [], 0
    for size in sizes:
        end = start + size
        inputs = {"input_ids": ids[:, start:end], "position_ids": places[:, start:end], CACHE: cache}
        with torch.no_grad():
            logits.append(model(**inputs, attention_mask=mask[:, :end], use_cache=True).logits)
        start = end
    return torch.cat(logits, 1)


@given(st.data())
@settings(max_examples=6)
@pytest.mark.parametrize("variant", CAUSAL)
def test_appending_equals_the_parallel_form(variant: str, data: st.DataObject) -> None:
    """Rows padded on the left, read in pieces of any sizes, of which the first may be all padding: equal to 1e-5."""
    pool = data.draw(st.sampled_from(("max", "mean", "sum"))) if variant != "row_major" else "max"
    extra = {} if variant == "logn" else {"segment": data.draw(st.integers(1, 5))}
    model = combined(variant, pool=pool, size_bias=data.draw(st.booleans()), **extra)
    total = data.draw(st.integers(2, T))
    first = data.draw(st.integers(1, total))
    sizes = [first]
    while sum(sizes) < total:
        sizes.append(data.draw(st.integers(1, min(3, total - sum(sizes)))))
    pads = [0, *(data.draw(st.integers(0, total - 1)) for _ in range(2))]
    mask = torch.arange(total) >= torch.tensor(pads)[:, None]
    got = steps(model, IDS[:, :total], mask.long(), sizes)
    for row, pad in enumerate(pads):
        with torch.no_grad():
            alone = model(IDS[row : row + 1, pad:total], use_cache=False).logits
        torch.testing.assert_close(got[row : row + 1, pad:], alone, rtol=0, atol=1e-5 * float(alone.abs().max()))


@pytest.mark.parametrize("variant", ["fixed", "logn", "mixture"])
@torch.no_grad()
def test_appending_takes_activation_pool_and_size_bias_along(variant: str) -> None:
    model = combined(variant, activation="relu", pool="mean", size_bias=True)
    expected = model(IDS, use_cache=False).logits
    got = steps(model, IDS, torch.ones_like(IDS), [3] + [1] * (T - 3))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", DECODERS)
def test_every_family_generates_the_same_from_a_padded_batch_and_without_a_cache(family: str) -> None:
    model = combined("fixed", family, segment=3)
    options: dict[str, Any] = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}
    mask = torch.arange(T) >= torch.tensor([0, 2, 5])[:, None]
    batch = model.generate(IDS, attention_mask=mask.long(), **options)
    for row, pad in enumerate((0, 2, 5)):
        alone = model.generate(IDS[row : row + 1, pad:], use_cache=False, **options)
        assert torch.equal(batch[row, pad:], alone[0])


LATENT = {
    "vocab_size": 160, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "first_k_dense_replace": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("fields", [{"variant": "row_major"}, {"activation": "deepset"}])
@torch.no_grad()
def test_keys_and_values_of_latent_attention_may_differ_in_size(fields: dict[str, Any]) -> None:
    stock = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v3", **LATENT)).eval()
    model = combined(model=stock, **fields)
    expected = model(IDS, use_cache=False).logits
    got = steps(model, IDS, torch.ones_like(IDS), [3] + [1] * (T - 3))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("variant", CAUSAL)
def test_beams_are_reordered_with_their_spans(variant: str) -> None:
    model = combined(variant)
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 3}
    cached, plain = (model.generate(IDS, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, plain)


def test_the_cache_of_fixed_holds_one_segment_and_the_spans() -> None:
    model = combined("fixed")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, **{CACHE: cache}, use_cache=True)
    own = cache.layers[0]
    assert isinstance(own, CombinerCacheLayer)
    assert (own.get_seq_length(), own.get_mask_sizes(2), own.get_max_length()) == (T, (T + 2, 0), -1)
    heads, size, segment, rows = 4, 8, 4, T // 4 + 1
    assert own.bytes == 3 * (8 + 4 * heads * size * (3 * segment + 2 * rows))
    own.batch_select_indices(torch.tensor([0, 2]))
    own.batch_repeat_interleave(2)
    assert own.state.length.tolist() == [T] * 4  # type: ignore[union-attr]
    own.crop(0)
    with pytest.raises(IntaglioError, match="cannot be removed"):
        own.crop(-1)
    own.reset()
    assert (own.get_seq_length(), own.bytes) == (0, 0)


def test_documents_become_rows() -> None:
    places, real = document_rows(torch.tensor([[0, 0, 1, 1, 1], [-1, 0, 0, 0, -1]]))
    assert [row[kept].tolist() for row, kept in zip(places, real, strict=True)] == [[0, 1], [2, 3, 4], [6, 7, 8]]
    places, real = document_rows(torch.tensor([[-1, 0], [-1, -1]]))
    assert real.tolist() == [[True], [False]]


@pytest.mark.parametrize("variant", CAUSAL)
@torch.no_grad()
def test_padding_and_packed_documents_do_not_matter(variant: str) -> None:
    model = combined(variant)
    alone = [model(IDS[row : row + 1, :n], use_cache=False).logits for row, n in ((0, 7), (1, 6))]
    packed = torch.cat([IDS[:1, :7], IDS[1:2, :6]], 1)
    places = torch.cat([torch.arange(7), torch.arange(6)])[None]
    got = model(packed, position_ids=places, use_cache=False).logits
    torch.testing.assert_close(got, torch.cat(alone, 1), rtol=0, atol=2e-5)
    mask = (torch.arange(T) < torch.tensor([7, 6, T])[:, None]).long()
    right = model(IDS, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(right[:1, :7], alone[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
@torch.no_grad()
def test_an_encoder_takes_the_bidirectional_mixture(family: str) -> None:
    model = combined("bidirectional_mixture", family, segment=3)
    alone = model(IDS[:1, :8]).logits
    mask = (torch.arange(T) < torch.tensor([8, T, T])[:, None]).long()
    torch.testing.assert_close(model(IDS, attention_mask=mask).logits[:1, :8], alone, rtol=0, atol=2e-5)
    other = IDS[:1, :8].clone()
    other[0, 7] += 1
    assert not torch.allclose(model(other).logits[0, 0], alone[0, 0])  # sees to the right


@pytest.mark.parametrize(
    ("variant", "drops"), [("fixed", True), ("logn", True), ("row_major", True), ("mixture", False)]
)
def test_dropout_is_where_the_official_code_has_it(variant: str, drops: bool) -> None:
    model = combined(variant, model=tiny_model("llama", layers=1, attention_dropout=0.5))
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        got = [model.train()(IDS, use_cache=False).logits for _ in range(2)]
    assert all(torch.equal(logits, expected) is not drops for logits in got)
    assert torch.equal(*got) is not drops


@pytest.mark.parametrize("variant", [*CAUSAL, "bidirectional_mixture"])
def test_each_weight_has_its_own_dropout(variant: str) -> None:
    """At a rate of 1 only the weights without dropout are left: direct ones, and all of `mixture`."""
    function, one_hot = layer(variant, 4), torch.eye(12).double().expand(1, 2, -1, -1)
    left = function.form.parallel(replace(random_tokens(function, 12, value=one_hot), dropout=1.0))[0][0, 0] > 0
    i, j = torch.arange(12)[:, None], torch.arange(12)
    expected = {
        "fixed": i < 0,
        "row_major": i < 0,
        "logn": (i == j) | (i % 2 == 1) & (j == i - 1),  # a block of one token is that token
        "mixture": j <= i,
        "bidirectional_mixture": (i // 4 == j // 4) | (i % 4 == j % 4),
    }[variant]
    assert torch.equal(left, expected.expand(12, 12))


def test_the_learned_part_drops_its_summary_and_normalises_as_flax_does() -> None:
    function = layer("row_major", 3, row_summary="proj")
    summary, hidden = torch.ones(1, 2, 1, 3, 4).double(), 1e-3 * torch.arange(24).double().sin().view(1, 1, 3, 8)
    got = function.project(summary, hidden, 1.0)
    expected = function.summary_out(F.layer_norm(hidden, (8,), eps=1e-6)).view(1, 1, 3, 2, 4).permute(0, 3, 1, 2, 4)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", CAUSAL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_stays_finite(variant: str, dtype: torch.dtype) -> None:
    logits = combined(variant, model=tiny_model("llama", layers=2, dtype=dtype))(IDS, use_cache=False).logits
    assert logits.dtype == dtype
    assert logits.isfinite().all()


def test_training_reaches_all_weights_and_the_result_loads(tmp_path: Any) -> None:
    checkpoint = Checkpoint(tiny_model("llama", layers=2), tiny_tokenizer("llama"), source="tiny")
    Combiner(variant="row_major", segment=4).apply(checkpoint, seed=5)
    before = {name: p.detach().clone() for name, p in checkpoint.model.named_parameters()}
    texts = ["the quick brown fox jumps over the lazy dog and then the dog sleeps"] * 4
    train(
        checkpoint, texts, objective=CausalLM(length=24, pack=True), steps=2, batch_size=2, learning_rate=1e-2, warmup=0
    )
    assert all(not torch.equal(before[name], p) for name, p in checkpoint.model.named_parameters())
    checkpoint.save(tmp_path / "out")
    back, again = load(tmp_path / "out"), copy.deepcopy(checkpoint.model)
    with torch.no_grad():
        expected = checkpoint.model(IDS).logits
        assert torch.equal(back.model(IDS).logits, expected)
        assert torch.equal(again(IDS).logits, expected)


def test_the_seed_draws_the_learned_part() -> None:
    method = Combiner(variant="row_major", segment=4)
    checkpoints = [method.apply(Checkpoint(tiny_model("llama")), seed=seed) for seed in (1, 1, 2)]
    assert [checkpoint.record.steps[0].seed for checkpoint in checkpoints] == [1, 1, 2]
    drawn = [checkpoint.model.state_dict() for checkpoint in checkpoints]
    name = "model.layers.1.self_attn.intaglio_attention.summary_in.weight"
    assert torch.equal(drawn[0][name], drawn[1][name])
    assert not torch.equal(drawn[0][name], drawn[2][name])
    assert float(drawn[0][name].abs().max()) <= (6 / 64) ** 0.5


def test_two_steps_replace_different_layers(tmp_path: Any) -> None:
    checkpoint = Checkpoint(tiny_model("llama"), tiny_tokenizer("llama"), source="tiny")
    Combiner(segment=4, layers=[0, 1]).apply(checkpoint)
    Combiner(variant="logn", layers="2:").apply(checkpoint)
    variants = [function.config.variant for function in attention_functions(checkpoint.model).values()]
    assert variants == ["fixed", "fixed", "logn", "logn"]
    assert [step.chosen for step in checkpoint.record.steps] == [
        {"segment": 4, "layers": [0, 1]},
        {"segment": 0, "layers": [2, 3]},
    ]
    checkpoint.save(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out").model(IDS).logits, checkpoint.model(IDS).logits)


@pytest.mark.parametrize(("context", "segment"), [(128, 16), (256, 16), (2048, 64), (16384, 128)])
def test_the_default_segment_balances_its_costs(context: int, segment: int) -> None:
    assert Combiner().segment_of(tiny_model("llama", layers=1, max_position_embeddings=context).config) == segment
    assert Combiner().segment_of(SimpleNamespace()) == 128  # without a number of positions: the paper's
    assert Combiner.paper().segment == 128
    assert Combiner.paper(variant="logn").segment is None


@torch.no_grad()
def test_rules_of_other_layers_come_and_go() -> None:
    model = combined(model=tiny_model("llama"), layers=[0])
    expected = model(IDS).logits
    with temporary_visibility(model, {1: Causal() & Window(3)}):
        assert not torch.equal(model(IDS).logits, expected)
    clear_visibility(model)
    assert torch.equal(model(IDS).logits, expected)
    set_attention(model, {})
    stock = tiny_model("llama")
    assert torch.equal(model.generate(IDS, max_new_tokens=4), stock.generate(IDS, max_new_tokens=4))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"variant": "logn", "segment": 4}, "logn has none"),
    ({"variant": "row_major", "pool": "mean"}, "pools nothing"),
    ({"variant": "row_major", "activation": "relu"}, "pools nothing"),
    ({"row_summary": "wsum"}, "fixed has none"),
    ({"segment": 0}, "greater than or equal to 1"),
    ({"layers": "x"}, "accepted: all, numbers"),
]


@pytest.mark.parametrize(("fields", "sentence"), REFUSED)
def test_fields_that_do_not_fit_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises((ValidationError, IntaglioError), match=sentence):
        Combiner(**fields)


MODELS: list[tuple[str, dict[str, Any], str]] = [
    ("bert", {}, "variant is fixed, and bert is an encoder; take bidirectional_mixture"),
    ("llama", {"variant": "bidirectional_mixture"}, "llama is a decoder; take a causal variant"),
    ("mistral_window", {}, "layer 0 has a sliding window of 8"),
    ("gemma3", {"layers": [1, 3]}, "layer 1 has a sliding window of 8"),
    ("llama", {"layers": [9]}, "names the layer 9"),
]


@pytest.mark.parametrize(("family", "fields", "sentence"), MODELS)
def test_models_that_do_not_fit_are_refused_unchanged(family: str, fields: dict[str, Any], sentence: str) -> None:
    checkpoint = Checkpoint(tiny_model(family))
    with pytest.raises(IntaglioError, match=sentence):
        Combiner(**fields).apply(checkpoint)
    assert not attention_functions(checkpoint.model)
    assert not checkpoint.record.steps


def test_a_model_without_the_attention_interface_is_refused_unchanged() -> None:
    checkpoint = Checkpoint(tiny_model("llama"))
    checkpoint.model.config._attn_implementation = "other"
    with pytest.raises(IntaglioError, match="attention implementation 'other'"):
        Combiner(variant="row_major").apply(checkpoint)
    assert not attention_functions(checkpoint.model)
    assert not any(module._forward_pre_hooks for module in checkpoint.model.modules())


def test_a_rule_on_a_replaced_layer_is_refused_before_it_is_recorded() -> None:
    checkpoint = Combiner(segment=4, layers=[0, 1]).apply(Checkpoint(tiny_model("llama")))
    with pytest.raises(IntaglioError, match="layer 1 has the attention of another step"):
        Visibility(rule="bidirectional", layers=[1, 2]).apply(checkpoint)
    assert [step.slug for step in checkpoint.record.steps] == ["combiner"]
    Visibility(rule={"sliding": {"window": 4}}, layers=[2, 3]).apply(checkpoint)


def test_windowed_layers_keep_their_attention_by_default() -> None:
    model = Combiner(segment=4).apply(Checkpoint(tiny_model("gemma3"))).model
    assert list(attention_functions(model)) == [3]


def test_a_layer_is_replaced_once() -> None:
    checkpoint = Checkpoint(combined())
    with pytest.raises(IntaglioError, match="layer 0 has an attention function of another step"):
        Combiner().apply(checkpoint)
    ruled = Checkpoint(tiny_model("llama"))
    set_visibility(ruled.model, {2: Causal()})
    with pytest.raises(IntaglioError, match="layer 2 has a visibility rule"):
        Combiner().apply(ruled)
    capped = Checkpoint(tiny_model("gemma3", attn_logit_softcapping=20.0))
    with pytest.raises(IntaglioError, match="layer 3 caps its scores"):
        Combiner().apply(capped)


@torch.no_grad()
def test_inputs_that_do_not_fit_are_refused_in_a_sentence() -> None:
    model = combined()
    static = StaticCache(model.config, max_cache_len=32)
    with pytest.raises(IntaglioError, match="not in a StaticCache"):
        model(IDS, **{CACHE: static})
    stock = DynamicCache(config=model.config)
    tiny_model("llama", layers=2)(IDS, **{CACHE: stock})
    with pytest.raises(IntaglioError, match="holds the keys of stock attention"):
        model(IDS, **{CACHE: stock})
    with pytest.raises(IntaglioError, match="pass a 2-D attention_mask"):
        model(IDS, attention_mask=torch.ones(3, 1, T, T, dtype=torch.bool), use_cache=False)
    with pytest.raises(IntaglioError, match="attention functions of their own"):
        CachedModel(model)
    with (
        temporary_visibility(model, Causal() & Window(3)),
        pytest.raises(IntaglioError, match="cannot have a visibility rule as well"),
    ):
        model(IDS, use_cache=False)
    module, request = attention(anatomy(model).blocks[0]), _request(model)
    tensors = [torch.zeros(1, 4, 2, 8)] * 3
    for more in ({"softcap": 1.0}, {"s_aux": tensors[0]}):
        with pytest.raises(IntaglioError, match="does not cap scores"):
            attention_functions(model)[0](module, *tensors, request, "sdpa", **more)
    model.set_attn_implementation("sdpa")
    with pytest.raises(IntaglioError, match="drops the visibility rules"):
        model(IDS)


def _request(model: Any) -> Any:
    """Return the mask request of a pass over two tokens."""
    requests: list[Any] = []
    function = attention_functions(model)[0]
    handle = function.register_forward_pre_hook(lambda module, args: requests.append(args[4]))
    model(IDS[:1, :2], use_cache=False)
    handle.remove()
    return requests[0]


def test_it_is_public() -> None:
    assert intaglio.Combiner is Combiner
