"""Dropping blocks: the measures by hand, and a result that is what the stock loader makes of it."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from intaglio import report
from intaglio.checkpoint import Checkpoint, load, weights_digest
from intaglio.data.segments import Segments
from intaglio.errors import IntaglioError
from intaglio.masks import Bidirectional, Causal, Window, get_visibility, set_visibility
from intaglio.masks.method import Visibility
from intaglio.measures.language_modeling import quality
from intaglio.methods.base import Cost, Workload
from intaglio.methods.weights.drop_blocks import DropBlocks
from intaglio.methods.weights.drop_blocks.removal import _outer_attributes
from intaglio.modeling.anatomy import anatomy, blocks
from intaglio.recipe.plan import plan
from intaglio.recipe.run import carve
from intaglio.recipe.schema import Recipe
from tests.families import DECODERS, ENCODERS, FAMILIES, tiny_model, tiny_tokenizer
from tests.recipe.test_run import corpus, make_recipe  # noqa: F401

IDS = torch.randint(8, 150, (6, 16), generator=torch.Generator().manual_seed(0))
WAYS: list[dict[str, Any]] = [
    {},
    {"iterative": True},
    {"contiguous": True},
    {"by": "loss"},
    {"by": "loss", "iterative": False},
    {"by": "loss", "contiguous": True},
]


def tiny(family: str = "llama", **arguments: Any) -> Checkpoint:
    return Checkpoint(tiny_model(family, **arguments), tiny_tokenizer(family), "tiny")


def drop(checkpoint: Checkpoint, ids: Any = IDS, **fields: Any) -> Checkpoint:
    return DropBlocks(**fields).apply(checkpoint, ids, batch_size=4)


def chosen(checkpoint: Checkpoint) -> dict[str, Any]:
    return checkpoint.record.steps[-1].chosen


def measured(checkpoint: Checkpoint) -> list[float]:
    return list(chosen(checkpoint)["bars"]["items"].values())


def states(model: Any, ids: torch.Tensor = IDS, **more: Any) -> list[torch.Tensor]:
    """What enters each block, and what leaves the last, by hooks on the whole model."""
    seen: list[torch.Tensor] = []
    listed = blocks(model)

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    def note_last(module: Any, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in listed]
    handles.append(listed[-1].register_forward_hook(note_last))
    with torch.no_grad():
        model(ids, **more)
    for handle in handles:
        handle.remove()
    return seen


def without(model: Any, gone: list[int]) -> torch.Tensor:
    """Logits of the model with blocks that hand on what they get."""
    listed = blocks(model)
    for index in gone:
        listed[index].forward = lambda hidden_states, *args, **kwargs: hidden_states
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    for index in gone:
        del listed[index].forward
    return found


def silence(model: Any, *which: int) -> None:
    """Let blocks add nothing to the hidden state."""
    parts = anatomy(model)
    with torch.no_grad():
        for index in which:
            for linear in parts.linears(index):
                if linear.role in ("o", "down") or linear.name in ("attention.dense", "mlp.dense_4h_to_h"):
                    linear.module.weight.zero_()
                    if linear.module.bias is not None:
                        linear.module.bias.zero_()


# what is measured


@pytest.mark.parametrize("family", ["llama", "gemma3", "modernbert"])
def test_influence_by_hand(family: str) -> None:
    checkpoint = tiny(family)
    seen = states(checkpoint.model)
    expected = [1 - float(F.cosine_similarity(a, b, dim=-1).double().mean()) for a, b in pairwise(seen)]
    drop(checkpoint, count=1)
    bars = chosen(checkpoint)["bars"]["items"]
    assert bars == pytest.approx({f"block {i}": v for i, v in enumerate(expected) if f"block {i}" in bars}, abs=1e-6)
    assert len(bars) == (3 if family == "modernbert" else 4)
    least = min(bars, key=bars.__getitem__)
    assert chosen(checkpoint)["dropped"] == [int(least.removeprefix("block "))]
    assert chosen(checkpoint)["bars"]["marked"] == [least]


def test_distance_by_hand() -> None:
    checkpoint = tiny()
    last = [hidden[:, -1].double() for hidden in states(checkpoint.model)]
    expected = [
        float(F.cosine_similarity(last[start], last[start + 2], dim=-1).arccos().mean()) / math.pi for start in range(3)
    ]
    drop(checkpoint, count=2, contiguous=True)
    assert measured(checkpoint) == pytest.approx(expected, abs=1e-6)
    start = expected.index(min(expected))
    assert chosen(checkpoint)["dropped"] == [start, start + 1]
    assert next(iter(chosen(checkpoint)["bars"]["items"])) == "blocks 0 to 1"


@pytest.mark.parametrize("family", ["gemma3", "gpt_neox"])
def test_the_rise_of_the_loss_is_what_perplexity_rises_by(family: str) -> None:
    checkpoint = tiny(family)
    data = Segments.of(IDS)
    before = math.log(quality(checkpoint, data).perplexity or 0)
    rises = []
    for index in range(4):
        shorter = tiny(family)
        DropBlocks(layers=index).apply(shorter)
        rises.append(math.log(quality(shorter, data).perplexity or 0) - before)
    drop(checkpoint, count=1, by="loss")
    assert measured(checkpoint) == pytest.approx(rises, abs=1e-4)
    assert chosen(checkpoint)["dropped"] == [rises.index(min(rises))]


@pytest.mark.parametrize("way", [{"iterative": True}, {"by": "loss"}])
def test_measured_anew_is_the_same_as_one_step_after_the_other(way: dict[str, Any]) -> None:
    once, often = tiny("qwen3", layers=5), tiny("qwen3", layers=5)
    drop(once, count=3, **way)
    for _ in range(3):
        drop(often, count=1, **way)
    assert len(blocks(once.model)) == 2
    assert all(torch.equal(a, b) for a, b in zip(once.model.parameters(), often.model.parameters(), strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["gemma3", "gpt_neox"])
def test_blocks_that_do_nothing_go_and_nothing_changes(family: str, way: dict[str, Any]) -> None:
    checkpoint = tiny(family)
    silence(checkpoint.model, 1, 2)
    with torch.no_grad():
        before = checkpoint.model(IDS).logits
        drop(checkpoint, count=2, **way)
        assert torch.equal(checkpoint.model(IDS).logits, before)
    assert chosen(checkpoint)["dropped"] == [1, 2]
    assert min(measured(checkpoint)) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_padding_does_not_count(way: dict[str, Any]) -> None:
    ids = torch.cat([IDS[:4], torch.zeros(4, 5, dtype=torch.int64)], dim=1)
    mask = torch.cat([torch.ones(4, 16), torch.zeros(4, 5)], dim=1).bool()
    plain, padded = tiny(), tiny()
    drop(plain, IDS[:4], count=2, **way)
    drop(padded, Segments(ids, mask), count=2, **way)
    assert measured(padded) == pytest.approx(measured(plain), abs=1e-5)
    assert chosen(padded)["dropped"] == chosen(plain)["dropped"]


def test_batches_do_not_matter() -> None:
    found = []
    for batch_size in (1, 4, 6):
        checkpoint = tiny()
        DropBlocks(count=1).apply(checkpoint, IDS, batch_size=batch_size)
        found.append(measured(checkpoint))
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert found[0] == pytest.approx(found[2], abs=1e-6)


def test_keep() -> None:
    for keep in ([0, -1], "::3", 3):
        checkpoint = tiny()
        silence(checkpoint.model, 3)
        drop(checkpoint, count=1, keep=keep)
        assert 3 not in chosen(checkpoint)["dropped"]
    checkpoint = tiny()
    drop(checkpoint, count=2, contiguous=True, keep=[0])
    assert list(chosen(checkpoint)["bars"]["items"]) == ["blocks 1 to 2", "blocks 2 to 3"]


# what is left


@pytest.mark.parametrize("gone", [[1], [0, 2, 3]])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_is_what_the_stock_loader_reads(family: str, gone: list[int], tmp_path: Path) -> None:
    if family == "modernbert" and 0 in gone:
        gone = [index + 1 for index in gone if index < 3]
    checkpoint = tiny(family)
    stock, size = tiny_model(family), checkpoint.bytes
    kept = [index for index in range(4) if index not in gone]
    DropBlocks(layers=gone).apply(checkpoint)
    skipped, model = without(stock, gone), checkpoint.model
    assert torch.equal(model(IDS).logits, skipped)
    assert checkpoint.bytes == size - sum(p.nbytes for i in gone for p in blocks(stock)[i].parameters())
    checkpoint.save(tmp_path / "out")
    auto = AutoModelForMaskedLM if family in ENCODERS else AutoModelForCausalLM
    back = auto.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(back(IDS).logits, skipped)
    again = load(tmp_path / "out")
    assert torch.equal(again.model(IDS).logits, skipped)
    assert again.kind == "standalone"
    assert again.record == checkpoint.record
    for found in (model, back):
        parts = anatomy(found)
        assert parts.config.num_hidden_layers == len(parts.blocks) == len(kept)
        windows = anatomy(stock).windows
        assert parts.windows == tuple(windows[index] for index in kept)
        assert parts.tied == anatomy(stock).tied
        types = getattr(stock.config, "layer_types", None)
        assert getattr(parts.config, "layer_types", None) == (types and [types[index] for index in kept])
        for place, (index, block) in enumerate(zip(kept, parts.blocks, strict=True)):
            numbers = {m.layer_idx for m in block.modules() if hasattr(m, "layer_idx")}
            assert numbers <= {place}
            pairs = zip(block.parameters(), blocks(stock)[index].parameters(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_it_generates_with_a_cache_as_without(family: str) -> None:
    checkpoint = tiny(family, dtype=torch.float64)
    DropBlocks(layers=[0, 2]).apply(checkpoint)
    how = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids, mask = IDS[:2, :6].clone(), torch.ones(2, 6, dtype=torch.int64)
    ids[0, :2], mask[0, :2] = 0, 0  # padded on the left
    found = [checkpoint.model.generate(ids, attention_mask=mask, use_cache=c, **how) for c in (True, False)]
    assert torch.equal(*found)
    output = checkpoint.model(IDS, use_cache=True)
    cache = output.get("past_key_values", output.get("cache"))
    assert len(cache.layers) == 2
    assert all(layer.keys is not None for layer in cache.layers)


@settings(max_examples=8)
@given(st.sets(st.integers(0, 5), min_size=1, max_size=5))
def test_those_that_are_named_go_and_the_others_keep_order_and_values(gone: set[int]) -> None:
    checkpoint = tiny("gemma3", layers=6)
    before = blocks(checkpoint.model)
    DropBlocks(layers=sorted(gone)).apply(checkpoint)
    assert blocks(checkpoint.model) == [block for index, block in enumerate(before) if index not in gone]
    assert chosen(checkpoint) == {"blocks": 6, "dropped": sorted(gone)}


def test_patterns_that_no_longer_hold_leave_the_configuration() -> None:
    checkpoint = tiny("modernbert", global_attn_every_n_layers=3)
    checkpoint.config.global_attn_every_n_layers = 3
    DropBlocks(layers=1).apply(checkpoint)
    assert "global_attn_every_n_layers" not in checkpoint.config.to_dict()
    assert checkpoint.config.layer_types == ["full_attention", "sliding_attention", "full_attention"]


def test_lists_that_only_happen_to_be_as_long_stay() -> None:
    checkpoint = tiny("qwen3", layers=2, eos_token_id=[2, 3])
    DropBlocks(layers=0).apply(checkpoint)
    assert checkpoint.config.eos_token_id == [2, 3]
    assert checkpoint.config.layer_types == ["full_attention"]


@pytest.mark.parametrize("way", WAYS[2:4])
def test_it_is_deterministic_to_the_byte(way: dict[str, Any], tmp_path: Path) -> None:
    for name in ("a", "b"):
        checkpoint = tiny("mistral_window", dtype=torch.bfloat16)
        drop(checkpoint, count=2, **way)
        checkpoint.save(tmp_path / name)
        assert {p.dtype for p in checkpoint.model.parameters()} == {torch.bfloat16}
    assert weights_digest(tmp_path / "a") == weights_digest(tmp_path / "b")
    assert load(tmp_path / "a").record == load(tmp_path / "b").record


# what hangs on blocks


def test_visibility_follows_its_blocks(tmp_path: Path) -> None:
    checkpoint = tiny()
    Visibility(layers=[1, 3], rule="bidirectional").apply(checkpoint)
    Visibility(layers=[2], rule={"sliding": {"window": 3}}).apply(checkpoint)
    DropBlocks(layers=[0, 1]).apply(checkpoint)
    rules = {0: Causal() & Window(3), 1: Bidirectional()}
    assert get_visibility(checkpoint.model) == rules
    checkpoint.save(tmp_path / "out")
    back = load(tmp_path / "out")
    assert get_visibility(back.model) == rules
    assert torch.equal(back.model(IDS).logits, checkpoint.model(IDS).logits)
    DropBlocks(layers=1).apply(back)  # the one that looked right
    assert back.model.generate(IDS[:1, :4], max_new_tokens=2, do_sample=False).shape == (1, 6)


def test_where_every_rule_went_the_checkpoint_is_a_stock_one_again() -> None:
    checkpoint = tiny()
    Visibility(layers=[1, 3], rule="bidirectional").apply(checkpoint)
    DropBlocks(layers=[1, 3]).apply(checkpoint)
    assert checkpoint.kind == "standalone"
    assert get_visibility(checkpoint.model) == {}
    assert torch.equal(checkpoint.model(IDS).logits, without(tiny_model("llama"), [1, 3]))


def test_rules_that_are_set_from_python_follow_too() -> None:
    checkpoint = tiny()
    set_visibility(checkpoint.model, {3: Bidirectional()})
    DropBlocks(layers=[3]).apply(checkpoint)
    assert checkpoint.record.live == []
    assert checkpoint.model.generate(IDS[:1, :4], max_new_tokens=2, do_sample=False).shape == (1, 6)


def test_another_live_part_is_refused() -> None:
    checkpoint = tiny()
    checkpoint.set_runtime_state("other", {"thresholds": [1, 2, 3, 4]})
    with pytest.raises(IntaglioError, match="drop_blocks cannot follow other, whose live part belongs to the blocks"):
        drop(checkpoint, count=1)
    checkpoint.set_runtime_state("other", {})
    drop(checkpoint, count=1)


def test_what_was_fitted_before_is_stale(corpus: Path, tiny_dir: Any, tmp_path: Path) -> None:  # noqa: F811
    carve(
        make_recipe(corpus, [{"fit": {"aded": {"corpus": str(corpus)}}}]), tmp_path / "a", model=str(tiny_dir("llama"))
    )
    carve(make_recipe(corpus, [{"drop_blocks": {"layers": 0}}]), tmp_path / "b", model=str(tmp_path / "a"))
    with pytest.raises(IntaglioError, match="aded was fitted before drop_blocks changed the weights; fit it again"):
        load(tmp_path / "b").decoder("aded")


# in recipes


def test_with_pruning_training_and_fitting_in_one_recipe(corpus: Path, tmp_path: Path) -> None:  # noqa: F811
    tiny("qwen3").save(tmp_path / "model")
    steps: list[dict[str, Any]] = [
        {"wanda": {"sparsity": 0.5}},
        {"drop_blocks": {"count": 1}},
        {"drop_blocks": {"count": 1, "contiguous": True}},
        {"visibility": {"layers": [0], "rule": {"sliding": {"window": 4}}}},
        {"visibility": {"rule": "stock"}},
        {"train": {"steps": 2, "batch_size": 2, "length": 24}},
        {"fit": {"aded": {"corpus": str(corpus)}}},
    ]
    recipe = make_recipe(corpus, steps)
    told = plan(recipe, model=str(tmp_path / "model"))
    document = carve(recipe, tmp_path / "out", model=str(tmp_path / "model"))
    back = load(tmp_path / "out")
    assert len(blocks(back.model)) == 2
    assert document["after"]["bytes"] == back.bytes < document["before"]["bytes"]
    assert set(document["after"]["zero_fraction"].values()) == {0.5}
    assert told["left"] == document["after"]["parameters"] < told["parameters"] == document["before"]["parameters"]
    assert "fewer bytes" in report.summary(document)
    page = report.carve_page(document)
    assert page.count("Influence of each block") == 1
    assert page.count("Angular distance over each run of blocks") == 1
    assert ", dropped" in page
    assert "bars" not in document["steps"][1]["chosen"]
    ids = torch.arange(8, 14)[None]
    decoder = back.decoder("aded")
    how = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(back.model.generate(ids, custom_generate=decoder, **how), back.model.generate(ids, **how))


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ({"visibility": {"layers": [2], "rule": "causal"}}, "names the layer 2; the model has the layers 0 to 1"),
        ({"wanda": {"sparsity": 0.5, "ignore": ["layers.3.*"]}}, "names no layer of this model"),
        ({"layerwise_unmasking": {"groups": 4}}, "4 groups"),
        ({"drop_blocks": {"count": 2}}, "count is 2; the model has 2 blocks"),
    ],
)
def test_later_steps_are_held_against_what_is_left(
    after: dict[str, Any],
    words: str,
    corpus: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    tiny().save(tmp_path / "model")
    for first in ({"count": 2}, {"layers": [0, 1]}):
        recipe = make_recipe(corpus, [{"drop_blocks": first}, after])
        with pytest.raises(IntaglioError, match=words):
            plan(recipe, model=str(tmp_path / "model"))
        with pytest.raises(IntaglioError, match=words):
            carve(recipe, tmp_path / "out", model=str(tmp_path / "model"))
        assert not (tmp_path / "out").exists()


def test_windows_of_blocks_that_are_not_known_yet_are_not_guessed() -> None:
    parts = anatomy(tiny_model("gemma3"))
    assert DropBlocks(count=1).anatomy_after(parts).windows == (None,) * 3
    assert DropBlocks(layers=3).anatomy_after(parts).windows == (8,) * 3
    assert DropBlocks(count=1).anatomy_after(anatomy(tiny_model("mistral_window"))).windows == (8,) * 3


@pytest.mark.parametrize("way", [{"layers": [0]}, *({"count": 3, **way} for way in WAYS)])
def test_the_estimate_is_a_cost(way: dict[str, Any]) -> None:
    cost = DropBlocks(**way).estimate(Workload(((64, 32), (32, 64)), 4096, 8192, 32, 128, 32, 4, 8))
    assert isinstance(cost, Cost)
    assert (cost.flops > 0) == (cost.extra_bytes > 0) == ("count" in way)
    assert Recipe.from_dict({"steps": [{"drop_blocks": way}]}).steps == (DropBlocks(**way),)
    if way.get("by") == "loss":
        assert cost.flops > DropBlocks(count=3).estimate(Workload(((64, 32),), 4096, 8192, 32, 128, 32, 4, 8)).flops


# what is refused


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "give either count or layers"),
        ({"count": 1, "layers": [0]}, "give either count or layers"),
        ({"count": 0}, "greater than or equal to 1"),
        ({"layers": "two"}, "accepted: all, numbers, or a slice"),
        ({"count": 1, "keep": "x"}, "accepted: all, numbers, or a slice"),
        ({"layers": [0], "keep": [1]}, "keep works with count only"),
        ({"layers": [0], "by": "loss"}, "by works with count only"),
        ({"layers": [0], "iterative": False}, "iterative works with count only"),
        ({"count": 2, "contiguous": True, "iterative": True}, "set only one of them"),
        ({"count": 1, "by": "size"}, "should be 'influence' or 'loss'"),
    ],
)
def test_fields_that_do_not_fit(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(IntaglioError, match=words) as caught:
        Recipe.from_dict({"steps": [{"drop_blocks": fields}]})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [
        ("llama", {"count": 4}, "count is 4; the model has 4 blocks; accepted: 1 to 3"),
        ("llama", {"count": 9, "by": "loss"}, "count is 9; the model has 4 blocks; accepted: 1 to 3"),
        ("llama", {"count": 2, "keep": [0, 1, 2]}, "count is 2; only 1 of the model's 4 blocks may be removed"),
        ("llama", {"count": 1, "keep": "all"}, "count is 1; only 0 of the model's 4 blocks may be removed"),
        ("llama", {"count": 2, "keep": [1], "contiguous": True}, None),
        ("llama", {"count": 2, "keep": [1, 2], "contiguous": True}, "no 2 neighbouring blocks may be removed"),
        ("llama", {"count": 1, "keep": [4]}, "names the layer 4; the model has the layers 0 to 3"),
        ("llama", {"layers": [4]}, "names the layer 4; the model has the layers 0 to 3"),
        ("llama", {"layers": "all"}, "layers names all 4 blocks of the model"),
        ("bert", {"count": 1, "by": "loss"}, "by: loss needs a model that predicts the next token"),
        ("modernbert", {"layers": [0, 1]}, "layers names block 0, which this modernbert builds unlike the others"),
        ("modernbert", {"count": 4}, "accepted: 1 to 3"),
        ("modernbert", {"count": 3}, None),
    ],
)
def test_models_that_do_not_fit_are_left_as_they_are(family: str, fields: dict[str, Any], words: str | None) -> None:
    checkpoint = tiny(family)
    before = copy.deepcopy(checkpoint.model.state_dict())
    if words is None:
        drop(checkpoint, **fields)
        return
    with pytest.raises(IntaglioError, match=words) as caught:
        drop(checkpoint, **fields)
    assert "\n" not in str(caught.value)
    after = checkpoint.model.state_dict()
    assert before.keys() == after.keys()
    assert checkpoint.config.num_hidden_layers == 4
    assert checkpoint.record.steps == []


def test_a_family_that_ties_a_scale_to_the_place_is_refused_before_any_work() -> None:
    checkpoint = tiny("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(
        IntaglioError, match="blocks of this gpt2 cannot be dropped: scaling of attn depends on the"
    ) as e:
        DropBlocks(count=1).check_model(anatomy(checkpoint.model))
    assert "\n" not in str(e.value)
    DropBlocks(layers=[3]).apply(checkpoint)  # nothing moves


def test_missing_calibration_is_refused_and_nothing_changes() -> None:
    checkpoint = tiny()
    with pytest.raises(IntaglioError, match="calibration data is missing"):
        drop(checkpoint, None, count=1)
    assert len(blocks(checkpoint.model)) == 4


@pytest.mark.parametrize("way", WAYS)
def test_measures_that_are_not_finite_are_refused(way: dict[str, Any]) -> None:
    checkpoint = tiny()
    with torch.no_grad():
        blocks(checkpoint.model)[2].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(IntaglioError, match="the activations after block 2 are not finite") as caught:
        drop(checkpoint, count=1, **way)
    assert "\n" not in str(caught.value)
    assert len(blocks(checkpoint.model)) == 4


def test_a_loss_that_is_not_finite_without_a_block_is_refused() -> None:
    checkpoint = tiny()
    silence(checkpoint.model, 1, 2, 3)
    with torch.no_grad():  # block 0 takes away what the head could not bear
        checkpoint.model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(IntaglioError, match="the measure of block 0 is not finite"):
        drop(checkpoint, count=1, by="loss")


@pytest.mark.parametrize("other", ["shape", "kind"])
def test_parts_outside_the_blocks_that_depend_on_their_number_are_refused(other: str) -> None:
    parts = anatomy(tiny_model("llama"))
    old, new = tiny_model("llama"), tiny_model("llama")
    assert _outer_attributes(parts, old, new) == []
    inner: Any = new.model
    if other == "shape":
        inner.norm.weight = torch.nn.Parameter(torch.ones(7))
    else:
        inner.rotary_emb = torch.nn.Identity()
    with pytest.raises(IntaglioError, match="parts outside its blocks depend on the number of blocks"):
        _outer_attributes(parts, old, new)
