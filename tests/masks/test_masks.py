"""Rules on stock models, against stock models that are handed masks filled in one element at a time."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from intaglio.errors import IntaglioError
from intaglio.masks import (
    Alibi,
    AttentionSinks,
    Bidirectional,
    BlockDiagonal,
    Causal,
    Dilated,
    ExplicitMask,
    IgnoreSlidingWindow,
    PrefixLM,
    Rule,
    Window,
    clear_visibility,
    get_visibility,
    rule_from_dict,
    set_scores,
    set_visibility,
    temporary_visibility,
    visible,
)
from intaglio.masks.attention_interface import MaskRequest, request
from intaglio.modeling.anatomy import CACHE, CACHES, attention, blocks
from tests.families import DECODERS, DESIGN_FAMILIES, ENCODERS, FAMILIES, HEADS, WINDOW, tiny_model

B, L = 2, 18
PADS = {"none": ((0, 0), (0, 0)), "left": ((5, 0), (0, 0)), "right": ((0, 5), (0, 0))}
Sees = Callable[[int, int, int], bool]  # head, query, key, counted from the first real token


def batch(pad: str = "none") -> dict[str, Tensor]:
    ids = torch.randint(5, 160, (B, L), generator=torch.Generator().manual_seed(7))
    mask = torch.ones(B, L, dtype=torch.long)
    for row, (left, right) in enumerate(PADS[pad]):
        mask[row, :left] = 0
        mask[row, L - right :] = 0
    return {"input_ids": ids, "attention_mask": mask}


_PATTERN = torch.rand(L, L, generator=torch.Generator().manual_seed(1)) < 0.5
_BY_HEAD = torch.rand(HEADS, L, L, generator=torch.Generator().manual_seed(2)) < 0.5
_PATTERN_LIST, _BY_HEAD_LIST = _PATTERN.tolist(), _BY_HEAD.tolist()
_DOCUMENTS = [0] * 4 + [1] * 5 + [2] * 9


def _causal(h: int, q: int, k: int) -> bool:
    return k <= q


def _everything(h: int, q: int, k: int) -> bool:
    return True


# Each rule beside the same rule in plain Python.
MIXED: dict[int, tuple[Rule, Sees]] = {
    0: (Causal(), _causal),
    1: (Bidirectional(), _everything),
    2: (ExplicitMask(_PATTERN), lambda h, q, k: _PATTERN_LIST[q][k]),
    3: (ExplicitMask(_BY_HEAD), lambda h, q, k: _BY_HEAD_LIST[h][q][k]),
}
STRUCTURED: dict[int, tuple[Rule, Sees]] = {
    1: (PrefixLM(3), lambda h, q, k: k <= q or k < 3),
    2: (Causal() & (Window(4) | AttentionSinks(2)), lambda h, q, k: k <= q and (q - k < 4 or k < 2)),
    3: (
        BlockDiagonal(torch.tensor(_DOCUMENTS)) & ~Dilated(3, 2),
        lambda h, q, k: _DOCUMENTS[q] == _DOCUMENTS[k] and q - k not in (-4, -2, 0, 2, 4),
    ),
}


def window_of(family: str, layer: int) -> int | None:
    """Number of positions a layer sees to one side, itself included, as the families' configurations say."""
    if family == "mistral_window" or (family == "gemma3" and layer % 4 != 3):
        return WINDOW
    return WINDOW // 2 + 1 if family == "modernbert" and layer % 3 else None


@functools.cache
def filled(sees: Sees, window: int | None, pad: str) -> Tensor:
    """The mask of one layer, bool [B, HEADS, L, L], element by element."""
    real = batch(pad)["attention_mask"].tolist()
    mask = torch.zeros(B, HEADS, L, L, dtype=torch.bool)
    for b, h, q, k in itertools.product(range(B), range(HEADS), range(L), range(L)):
        inside = window is None or -window < q - k < window
        # What padded queries see is of no account, but a rule must have an answer for them.
        first = real[b].index(1)
        if real[b][k] and inside and sees(h, max(q - first, 0), max(k - first, 0)):
            mask[b, h, q, k] = True
    return mask


@contextmanager
def handed_over(model: Any, masks: dict[int, Tensor]) -> Iterator[None]:
    """A stock model whose layers are handed explicit 4-D masks in the place of the model's own."""
    with ExitStack() as stack:
        for layer, mask in masks.items():
            block = blocks(model)[layer]
            place = list(inspect.signature(block.forward).parameters).index("attention_mask")

            def hand_over(module: Any, args: Any, kwargs: Any, place: int = place, mask: Tensor = mask) -> Any:
                if "attention_mask" in kwargs:
                    return args, {**kwargs, "attention_mask": mask}
                return (*args[:place], mask, *args[place + 1 :]), kwargs

            stack.callback(block.register_forward_pre_hook(hand_over, with_kwargs=True).remove)
        yield


def added(seen: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """A bool mask in the form that eager attention adds to its scores."""
    return torch.where(seen, bias, torch.finfo(torch.float32).min)


@pytest.mark.parametrize(("base", "pad"), [("sdpa", "none"), ("sdpa", "left"), ("sdpa", "right"), ("eager", "left")])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rules_equal_hand_written_masks_bit_for_bit(family: str, base: str, pad: str) -> None:
    model, inputs = tiny_model(family, attn_implementation=base), batch(pad)
    stock = model(**inputs).logits
    set_visibility(model, None)
    assert torch.equal(model(**inputs).logits, stock)
    for rules in (MIXED, STRUCTURED):
        clear_visibility(model)
        masks = {layer: filled(sees, window_of(family, layer), pad) for layer, (_, sees) in rules.items()}
        with handed_over(model, masks if base == "sdpa" else {layer: added(mask) for layer, mask in masks.items()}):
            expected = model(**inputs).logits
        set_visibility(model, {layer: rule for layer, (rule, _) in rules.items()})
        result = model(**inputs).logits
        # Padded queries look their rules up at positions that do not exist; what they see is never read.
        real = inputs["attention_mask"].bool()
        assert torch.equal(result[real], expected[real])
        assert (result - stock)[real].abs().max() > 0.5
        assert result.isfinite().all()
    clear_visibility(model)
    assert model.config._attn_implementation == base
    assert torch.equal(model(**inputs).logits, stock)


@pytest.mark.parametrize(("base", "pad"), [("sdpa", "none"), ("eager", "left")])
@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_all_causal_is_stock(family: str, base: str, pad: str) -> None:
    model, inputs = tiny_model(family, attn_implementation=base), batch(pad)
    stock = model(**inputs).logits
    set_visibility(model, Causal())
    real = inputs["attention_mask"].bool()
    assert torch.equal(model(**inputs).logits[real], stock[real])


@pytest.mark.parametrize("base", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [f for f in DECODERS if not FAMILIES[f].windowed])
@torch.no_grad()
def test_all_bidirectional_is_is_causal_false(family: str, base: str) -> None:
    model, inputs = tiny_model(family, attn_implementation=base), batch("left")
    model.config.is_causal = False
    expected = model(**inputs, use_cache=False).logits
    model.config.is_causal = True
    set_visibility(model, Bidirectional())
    real = inputs["attention_mask"].bool()
    assert torch.equal(model(**inputs).logits[real], expected[real])


@pytest.mark.parametrize("family", DESIGN_FAMILIES)
@torch.no_grad()
def test_padding_changes_nothing(family: str) -> None:
    model, ids = tiny_model(family), batch()["input_ids"][:1, :12]
    set_visibility(model, {0: Causal() & (Window(3) | AttentionSinks(2)), 1: PrefixLM(4), 2: Bidirectional()})
    alone = model(input_ids=ids).logits
    for left, right in ((4, 0), (0, 4)):
        padded = torch.nn.functional.pad(ids, (left, right))
        mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        result = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, left : left + 12]
        torch.testing.assert_close(result, alone, rtol=0, atol=5e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_come_from_the_right_only_where_a_rule_lets_them(family: str) -> None:
    model = tiny_model(family)
    embeds = model.get_input_embeddings()(batch()["input_ids"][:1]).detach().requires_grad_()

    def reach() -> Tensor:
        """Whether position 4 of the output depends on each input position, bool [L]."""
        logits = model(inputs_embeds=embeds).logits
        (gradient,) = torch.autograd.grad(logits[0, 4].square().sum(), embeds)
        return gradient[0].abs().sum(-1) > 0

    set_visibility(model, Causal())
    assert reach().tolist() == [True] * 5 + [False] * (L - 5)
    set_visibility(model, {layer: Causal() for layer in range(3)} | {3: Bidirectional()})
    window = window_of(family, 3)
    assert reach().tolist() == [True] * (L if window is None else 4 + window) + [False] * (
        0 if window is None else L - 4 - window
    )


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "modernbert"])
def test_gradients_under_checkpointing_are_the_same(family: str, reentrant: bool) -> None:
    model = tiny_model(family).train()
    rules = {0: Bidirectional(), 1: PrefixLM(3), 3: Causal() & Window(2)}
    set_visibility(model, rules)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        # Two forwards with different padding before one backward: each recomputation needs the masks of its own.
        total = sum(model(**batch(pad)).logits.square().mean() for pad in ("left", "right"))
        total.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for first, second in zip(plain, gradients(), strict=True):
        assert torch.equal(first, second)


LEFT_LOOKING: dict[int, Rule] = {
    0: Causal() & Window(3),
    1: Causal() & (Window(2) | AttentionSinks(2)),
    3: Causal() & ExplicitMask(torch.rand(HEADS, 40, 40, generator=torch.Generator().manual_seed(5)) < 0.7),
}


def generated(model: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    out = model.generate(
        **inputs, max_new_tokens=7, min_new_tokens=7, do_sample=False, return_dict_in_generate=True,
        output_logits=True, **options,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize(
    ("family", "base"), [(family, "sdpa") for family in DECODERS] + [("llama", "eager"), ("gemma3", "eager")]
)
def test_generate_with_caches_equals_generate_without(family: str, base: str) -> None:
    model, inputs = tiny_model(family, attn_implementation=base), batch("left")
    set_visibility(model, LEFT_LOOKING)
    ids, logits = generated(model, inputs, use_cache=False)
    options: list[dict[str, Any]] = [
        {}, {CACHE: DynamicCache()}, {"cache_implementation": "static"},
    ]  # fmt: skip
    for option in options:
        cached_ids, cached_logits = generated(model, inputs, **option)
        assert torch.equal(cached_ids, ids), option
        torch.testing.assert_close(cached_logits, logits, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_static_cache_filled_by_hand() -> None:
    model, ids = tiny_model("llama"), batch()["input_ids"]
    set_visibility(model, LEFT_LOOKING)
    whole = model(input_ids=ids, use_cache=False).logits
    cache = StaticCache(model.config, max_cache_len=32)
    for start, end in ((0, 6), (6, 7), (7, 12), (12, L)):
        part = model(input_ids=ids[:, start:end], **{CACHE: cache}, use_cache=True).logits
        torch.testing.assert_close(part, whole[:, start:end], rtol=0, atol=2e-5)


@torch.no_grad()
def test_the_request_keeps_the_offset_it_was_made_with() -> None:
    length = torch.tensor([3])
    kept = request(batch_size=1, q_length=2, kv_length=8, q_offset=length, kv_offset=0, allow_is_causal_skip=True)
    length.add_(2)
    assert kept.visible(Causal(), 1)[0, 0].sum(-1).tolist() == [4, 5]
    assert request(attention_mask=kept) is kept


def test_a_prefix_generates_without_a_cache() -> None:
    model, inputs = tiny_model("llama"), batch("left")
    set_visibility(model, {2: PrefixLM(6)})
    ids, _ = generated(model, inputs)  # makes no cache
    with torch.no_grad():
        for step in range(L, L + 7):
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, step - L), value=1)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = model(input_ids=ids[:, :step], attention_mask=mask, position_ids=positions).logits[:, -1]
            assert logits[:, [2]].shape == (B, 1)
            logits[:, 2] = -torch.inf  # min_new_tokens keeps the end token away
            assert torch.equal(logits.argmax(-1), ids[:, step])


def test_a_rule_that_looks_right_has_no_cache() -> None:
    model, inputs = tiny_model("llama"), batch("left")
    before = model.generation_config.use_cache
    set_visibility(model, {2: PrefixLM(6)})
    assert getattr(model(**inputs), CACHE) is None
    assert getattr(model(inputs["input_ids"], inputs["attention_mask"], use_cache=True), CACHE) is None
    for name in CACHES:  # the old name is still taken by a newer transformers
        with pytest.raises(IntaglioError, match="looks right cannot be used with a KV cache"):
            model(**inputs, **{name: DynamicCache()})
    with pytest.raises(IntaglioError, match="pass use_cache=False"):
        model.generate(**inputs, max_new_tokens=2, use_cache=True)
    set_visibility(model, Causal())
    assert getattr(model(**inputs), CACHE) is not None
    assert model.generate(**inputs, max_new_tokens=2).shape == (B, L + 2)
    assert model.generation_config.use_cache == before  # the checkpoint's own settings are never touched


def test_generation_is_refused_where_a_new_token_would_change_what_earlier_ones_saw() -> None:
    model, inputs = tiny_model("llama"), batch("left")
    set_visibility(model, {1: PrefixLM(14)})
    with pytest.raises(
        IntaglioError, match="both ways among the first 14 tokens, and the prompt has 13; give a longer"
    ):
        model.generate(**inputs, max_new_tokens=2)
    with pytest.raises(IntaglioError, match="and the prompt has 5"):
        model.generate(inputs["input_ids"][:, :5], max_new_tokens=2)
    for rule in (Bidirectional(), Window(3), ~Causal(), PrefixLM(3) | Window(2)):
        set_visibility(model, {1: PrefixLM(2), 2: rule})
        for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with pytest.raises(IntaglioError, match="this model cannot generate: layer 2 sees later tokens") as caught:
                twin.generate(**inputs, max_new_tokens=2)
            assert "\n" not in str(caught.value)
    twin = copy.deepcopy(model)
    clear_visibility(twin)
    assert twin.generate(**inputs, max_new_tokens=2).shape == (B, L + 2)
    with pytest.raises(IntaglioError, match="cannot generate"):
        model.generate(**inputs, max_new_tokens=2)


def test_a_wide_rule_looks_past_the_window() -> None:
    model, inputs = tiny_model("mistral_window"), batch()
    set_visibility(
        model,
        {0: IgnoreSlidingWindow(Bidirectional()), 1: Bidirectional(), 2: IgnoreSlidingWindow(Causal() & Window(12))},
    )
    seen = visible(model, L)[:, 0]
    assert seen[0].all()
    assert seen[1].sum(-1).tolist() == [min(q + WINDOW, L) - max(q - WINDOW + 1, 0) for q in range(L)]
    assert seen[2].sum(-1).tolist() == [min(q + 1, 12) for q in range(L)]
    assert rule_from_dict(IgnoreSlidingWindow(Causal()).to_dict()) == IgnoreSlidingWindow(Causal())
    with pytest.raises(IntaglioError, match="the rule 'wide' takes rule, not nothing"):
        rule_from_dict({"kind": "wide"})
    masks = {0: filled(_everything, None, "none")}
    stock = tiny_model("mistral_window")
    with handed_over(stock, masks), torch.no_grad():
        expected = stock(**inputs).logits
    set_visibility(model, {0: IgnoreSlidingWindow(Bidirectional())})
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)


def test_the_guard() -> None:
    model, inputs = tiny_model("llama"), batch()
    set_visibility(model, {1: Bidirectional()})
    model.set_attn_implementation("sdpa")
    with pytest.raises(IntaglioError, match="set to 'sdpa', which drops the visibility rules"):
        model(**inputs)
    with pytest.raises(IntaglioError, match="drops the visibility rules"):
        copy.deepcopy(model)(**inputs)
    set_visibility(model, {1: Bidirectional()})
    model(**inputs)
    model.set_attn_implementation("eager")
    clear_visibility(model)
    assert model.config._attn_implementation == "eager"  # the user's last word
    model(**inputs)
    clear_visibility(model)


def test_refusals() -> None:
    model, inputs = tiny_model("llama"), batch()
    for rules, words in [
        ({4: Causal()}, "names the layer 4; the model has the layers 0 to 3"),
        ({-1: Causal()}, "names the layer -1"),
        ({True: Causal()}, "names the layer True"),
        ({"0": Causal()}, "names the layer '0'"),
        ({0: "causal"}, "layer 0 was given 'causal', which is not a visibility rule"),
        ("causal", "layer 0 was given 'causal'"),
    ]:
        with pytest.raises(IntaglioError, match=words):
            set_visibility(model, rules)  # type: ignore[arg-type]
    with pytest.raises(IntaglioError, match="layer 2 was given 3, which is not a score rule"):
        set_scores(model, {2: 3})  # type: ignore[dict-item]
    assert model.config._attn_implementation == "sdpa"  # nothing was changed

    set_visibility(model, {0: ExplicitMask(torch.ones(L, L)), 1: Causal()})
    for mask in (torch.ones(B, 1, L, L, dtype=torch.bool), torch.zeros(B, 1, L, L)):
        with pytest.raises(IntaglioError, match=r"an attention_mask \(2, 1, 18, 18\) cannot be combined"):
            model(input_ids=inputs["input_ids"], attention_mask=mask)
    packed = torch.tensor([list(range(8)) + list(range(10))] * B)
    with pytest.raises(IntaglioError, match="cannot be combined with packed position_ids"):
        model(input_ids=inputs["input_ids"], position_ids=packed, use_cache=False)
    with pytest.raises(IntaglioError, match="covers 18 positions, and the input has 19"):
        model(input_ids=torch.ones(1, 19, dtype=torch.long))
    set_visibility(model, ExplicitMask(torch.ones(3, L, L)))
    with pytest.raises(IntaglioError, match="made for 3 heads, and the input has 4"):
        model(**inputs)
    set_visibility(model, PrefixLM((1, 2, 3)))
    with pytest.raises(IntaglioError, match="made for 3 rows, and the input has 2"):
        model(**inputs)


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "paged|sdpa"])
def test_implementations_that_read_no_mask_function_are_refused(name: str) -> None:
    model = tiny_model("llama")
    model.config._attn_implementation_internal = name
    with pytest.raises(IntaglioError, match=r"reads no mask function; load the model with .* sdpa, eager or flex"):
        set_visibility(model, Causal())


def test_packed_positions_without_a_rule_stay_stock() -> None:
    model, ids = tiny_model("llama"), batch()["input_ids"]
    packed = torch.tensor([list(range(8)) + list(range(10))] * B)
    stock = model(input_ids=ids, position_ids=packed, use_cache=False).logits
    set_visibility(model, {})
    assert torch.equal(model(input_ids=ids, position_ids=packed, use_cache=False).logits, stock)
    # The rule for packed rows says the same.
    documents = BlockDiagonal(torch.tensor([0] * 8 + [1] * 10))
    set_visibility(model, Causal() & documents)
    ruled = model(input_ids=ids, position_ids=packed, attention_mask=torch.ones_like(ids), use_cache=False).logits
    assert torch.equal(ruled, stock)


def test_kinds_of_layers_without_a_mask_are_refused() -> None:
    model = tiny_model("qwen3")
    model.config.layer_types = ["full_attention", "chunked_attention"] * 2
    with pytest.raises(IntaglioError, match="layer 1 is 'chunked_attention' and cannot have a visibility rule"):
        set_visibility(model, Causal())


def test_get_copy_pickle_and_reload(tmp_path: Path) -> None:
    model, inputs = tiny_model("llama"), batch()
    stock = model(**inputs).logits
    assert get_visibility(model) == {}
    rules = {1: Bidirectional(), 3: Causal() & Window(2)}
    set_visibility(model, {0: Bidirectional(), 1: Causal()})
    set_visibility(model, {**rules, 2: None})  # in place of all rules before
    assert get_visibility(model) == rules
    ruled = model(**inputs).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert get_visibility(twin) == rules
        assert torch.equal(twin(**inputs).logits, ruled)
        clear_visibility(twin)
        assert torch.equal(twin(**inputs).logits, stock)
    assert torch.equal(model(**inputs).logits, ruled)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**inputs).logits, stock)  # rules are no part of the stock format
    set_visibility(again, {layer: rule_from_dict(rule.to_dict()) for layer, rule in get_visibility(model).items()})
    assert torch.equal(again(**inputs).logits, ruled)


def test_layers_with_equal_rules_share_one_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model, built = tiny_model("llama"), []
    build = MaskRequest._build
    monkeypatch.setattr(MaskRequest, "_build", lambda self, *given: built.append(given[1]) or build(self, *given))
    table = torch.ones(L, L)
    set_visibility(model, {0: Window(2), 1: ExplicitMask(table), 2: Window(2), 3: ExplicitMask(table.clone())})
    model(**batch())
    assert built == [Window(2), ExplicitMask(table)]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_visible_is_where_attention_weights_are(family: str) -> None:
    model = tiny_model(family, attn_implementation="eager")
    length = 14
    ids = batch()["input_ids"][:1, :length]
    stock = torch.cat(model(input_ids=ids, output_attentions=True).attentions) > 0
    seen = visible(model, length)
    assert seen.dtype == torch.bool
    assert model.config._attn_implementation == "eager"
    assert torch.equal(seen.expand_as(stock), stock)
    assert seen.shape[1] == 1
    set_visibility(model, {0: Causal() & AttentionSinks(3), 1: ExplicitMask(_BY_HEAD), 2: PrefixLM(4)})
    # A row of the random pattern that sees nothing inside a window gets equal weights everywhere.
    ruled = torch.cat(model(input_ids=ids, output_attentions=True).attentions) > 0
    seen = visible(model, length)
    assert seen.shape == (4, HEADS, length, length)
    some = seen.any(-1)
    assert torch.equal(seen[some], ruled[some])


def test_visible_counts_and_checks_the_length() -> None:
    model = tiny_model("mistral_window")
    assert visible(model, 12)[0, 0].sum(-1).tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8, 8]
    for length in (0, 129):
        with pytest.raises(IntaglioError, match=f"length is {length}; 1 to 128 tokens are accepted"):
            visible(model, length)


def test_block_masks_of_rules_by_head_have_blocks_by_head() -> None:
    # Made for head 0 alone, they would leave out every block that other heads see and head 0 does not.
    far = torch.zeros(2, 384, 384, dtype=torch.bool)
    far[1, 256:, :128] = True
    asked = request(batch_size=1, q_length=384, kv_length=384, q_offset=0, kv_offset=0, allow_is_causal_skip=True)
    block_mask, bias = asked.mask(
        "flex_attention", Causal() & (Window(9) | ExplicitMask(far)), None, torch.zeros(1, 2, 384, 8)
    )
    assert bias is None
    assert block_mask.to_dense().int().tolist() == [
        [[[1, 0, 0], [1, 1, 0], [0, 1, 1]], [[1, 0, 0], [1, 1, 0], [1, 1, 1]]]
    ]
    shared, _ = asked.mask("flex_attention", Causal() & Window(9), None, torch.zeros(1, 2, 384, 8))
    assert shared.shape == (1, 1, 384, 384)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3", "bert"])
@torch.no_grad()
def test_flex_attention_agrees(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernel is compiled for minutes on a CPU; its uncompiled form computes the same.
    def uncompiled(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **more: Any) -> Any:
        return flex_attention(query, key, value, **more)

    monkeypatch.setattr("transformers.integrations.flex_attention.compile_friendly_flex_attention", uncompiled)
    model, inputs = tiny_model(family).requires_grad_(False), batch("left")
    rules = {layer: rule for layer, (rule, _) in {**MIXED, 1: STRUCTURED[1], 2: STRUCTURED[2]}.items()}
    scores = {2: Alibi(HEADS)}
    real = inputs["attention_mask"].bool()
    set_visibility(model, rules)
    set_scores(model, scores)
    expected = model(**inputs).logits[real]
    clear_visibility(model)
    model.set_attn_implementation("flex_attention")
    set_visibility(model, rules)
    set_scores(model, scores)
    assert model.config._attn_implementation == "intaglio_flex_attention"
    torch.testing.assert_close(model(**inputs).logits[real], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("base", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "modernbert"])
@torch.no_grad()
def test_scores_are_added_where_keys_are_seen(family: str, base: str) -> None:
    model, inputs = tiny_model(family, attn_implementation=base), batch("left")
    bias = torch.zeros(1, HEADS, L, L)
    for h in range(HEADS):
        for q in range(L):
            for k in range(L):
                bias[0, h, q, k] = -(2.0 ** (-8 * (h + 1) / HEADS)) * abs(q - k)
    rules = {1: STRUCTURED[1]}
    stock = _everything if FAMILIES[family].encoder else _causal
    seen = {n: filled(rules[n][1] if n in rules else stock, window_of(family, n), "left") for n in range(4)}
    with handed_over(model, {layer: added(mask, bias) for layer, mask in seen.items()}):
        expected = model(**inputs).logits
    set_scores(model, Alibi(HEADS))
    set_visibility(model, {1: rules[1][0]})
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).logits[real], expected[real], rtol=0, atol=2e-5)
    assert attention(blocks(model)[0]).intaglio_score == Alibi(HEADS)


@pytest.mark.slow
@torch.no_grad()
def test_dynamo_sees_one_graph() -> None:
    model, inputs = tiny_model("llama", layers=2), batch("left")
    set_visibility(model, {0: Causal() & Window(3), 1: Bidirectional()})
    expected = model(**inputs).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(**inputs).logits, expected)


@pytest.mark.parametrize("family", ENCODERS)
@torch.no_grad()
def test_left_looking_rules_make_an_encoder_causal(family: str) -> None:
    model, inputs = tiny_model(family), batch()
    set_visibility(model, Causal())
    whole = model(**inputs).logits
    half = model(input_ids=inputs["input_ids"][:, :9]).logits
    torch.testing.assert_close(whole[:, :9], half, rtol=0, atol=1e-5)


def test_temporary_rules_give_way_to_the_earlier_ones() -> None:
    model, ids = tiny_model("llama", layers=2), torch.arange(5, 15)[None]
    with torch.no_grad():
        stock = model(ids).logits
        with temporary_visibility(model, Bidirectional()):
            assert not torch.equal(model(ids, use_cache=False).logits, stock)
        assert torch.equal(model(ids).logits, stock)
        assert model.config._attn_implementation == "sdpa"
        set_visibility(model, Causal() & Window(2))
        ruled = model(ids).logits
        with pytest.raises(ZeroDivisionError), temporary_visibility(model, {0: Bidirectional()}):
            raise ZeroDivisionError
        assert torch.equal(model(ids).logits, ruled)
